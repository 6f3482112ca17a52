"""A run of `transformers` + PEFT that goes on from torch's distributed checkpoint: when its first step has been taken.

save MODEL FOLDER ROWS TIME STARTED · resume MODEL FOLDER ROWS TIME STARTED: when it was started, in seconds since 1970.
"""

import os
import sys
import time
import warnings

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import torch.distributed.checkpoint as dcp
import transformers
from measure import report
from peft import LoraConfig, get_peft_model
from save_checkpoint import join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import AutoModelForCausalLM

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
what, folder, saved, rows, length, started = sys.argv[1:]
torch.set_num_threads(2)
join()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
lora = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    modules_to_save=["embed_tokens", "lm_head"],
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, lora)
model.train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
adamw = torch.optim.AdamW(trained, lr=1e-4, fused=True)
options = StateDictOptions(ignore_frozen_params=True, strict=False)
if what == "resume":
    weights, moments = get_state_dict(model, adamw, options=options)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=saved)
    set_state_dict(model, adamw, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)
ids = torch.randint(model.config.vocab_size, (int(rows), int(length)))
model(ids, labels=ids).loss.backward()
torch.nn.utils.clip_grad_norm_(trained, 1.0)
adamw.step()
adamw.zero_grad(set_to_none=True)
taken = time.time() - float(started)
if what == "save":
    weights, moments = get_state_dict(model, adamw, options=options)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=saved)
report(taken, trained=sum(parameter.numel() for parameter in trained))
