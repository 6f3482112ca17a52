"""The peer of the sharding cases, one process a rank: `transformers` + PEFT under PyTorch's DDP or FSDP (`fully_shard`) over gloo, as a
careful user would set them up. LoRA on the linears; the vocabulary matrices train in place, a tied one once: no copies by
`modules_to_save`.

Usage, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set:
train_sharded.py '{"how": "ddp" | "fsdp" | "alone", "model", "rows_file", "threads", "lora": [modules]}'
where rows_file holds the ids of every row, in JSON: a step takes one for each rank.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import torch.distributed as dist
import transformers
from measure import peak_bytes, report
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
case = json.loads(sys.argv[1])
how, rank = case["how"], int(os.environ["RANK"])
torch.set_num_threads(case["threads"])
torch.manual_seed(0)
if how != "alone":
    dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32, attn_implementation="sdpa")
model.config.use_cache = False
lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=case["lora"], task_type="CAUSAL_LM")
model = get_peft_model(model, lora)
for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
    matrix.weight.requires_grad_(True)
model.train()
body = model
if how == "ddp":
    # The defaults' buckets of 25 MB are as good as larger ones here; views spare a copy of the gradients.
    model = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
elif how == "fsdp":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
trained = [parameter for parameter in body.parameters() if parameter.requires_grad]
adamw = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
rows = torch.tensor(json.loads(Path(case["rows_file"]).read_text()))
own = rows[rank :: int(os.environ["WORLD_SIZE"])]
seconds, losses = [], []
for ids in own.split(1):
    if how != "alone":
        dist.barrier()
    started = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    losses.append(loss.item())
    seconds.append(time.perf_counter() - started)
peaks = [peak_bytes()]
if how != "alone":
    peaks = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, peak_bytes())
    # Each rank's are of its own rows, as many targets each.
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, losses)
    losses = [sum(of_step) / len(of_step) for of_step in zip(*of_ranks)]
    dist.barrier()
    dist.destroy_process_group()
numel = sum(parameter.numel() for parameter in trained)
report(sum(seconds), steps=seconds, losses=losses, trained=numel, peaks=peaks)
