"""Makes the base model of the `vocab260k_*` cases: a pretrained one whose head is cut loose from its embedding, both grown.

Usage: grow_model.py FROM TO PIECES
"""

import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
source, to, pieces = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
base = model.get_input_embeddings().weight.detach()
generator = torch.Generator().manual_seed(0)
new = base[torch.randint(len(base), (pieces - len(base),), generator=generator)]
model.config.tie_word_embeddings = False
model.config.vocab_size = pieces
for name in ("model.embed_tokens", "lm_head"):
    module = model.get_submodule(name)
    module.weight = torch.nn.Parameter(torch.cat([base, new]))
model.save_pretrained(to)
AutoTokenizer.from_pretrained(source).save_pretrained(to)
