"""The peer of the training cases: `transformers` + PEFT as a careful user would set them up — SDPA, fused AdamW, no cache, gradients set
to none. Optimizer state has the weights' precision, as plain bf16 training has it.

Usage: train_model.py '{"model", "precision", "lora": [modules], "full": [modules], "rows_file", "rows", "threads", "recompute"}'
where rows_file holds the ids of every row, in JSON, and each step takes `rows` of them.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers
from measure import report
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
case = json.loads(sys.argv[1])
torch.set_num_threads(case["threads"])
torch.manual_seed(0)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[case["precision"]]
model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=dtype, attn_implementation="sdpa")
model.config.use_cache = False
if case["recompute"]:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
if case["lora"]:
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=case["lora"],
        modules_to_save=case["full"] or None,
        task_type="CAUSAL_LM",
        # LoRA's own matrices in the weights' precision too.
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
model.train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
adamw = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
rows = torch.tensor(json.loads(Path(case["rows_file"]).read_text()))
seconds, losses = [], []
for ids in rows.split(case["rows"]):
    started = time.perf_counter()
    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    losses.append(loss.item())
    seconds.append(time.perf_counter() - started)
report(sum(seconds), steps=seconds, losses=losses, trained=sum(parameter.numel() for parameter in trained))
