"""The peer of `panglot-worker bench-gpu`: the same training by `transformers` + PEFT on the same GPU, as a careful user
would set it up: bf16, SDPA, fused AdamW, gradient checkpointing only where ours recomputes. Prints one line of JSON.

Ours keeps f32 master weights and moments; the peer's are bf16, which costs it less time and memory.
"""

import argparse
import json
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in {"layers": 32, "tokens": 4096, "rows": 1, "micro-rows": 1, "warmup": 3, "steps": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    settings = parser.parse_args()

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=260_224, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=settings.layers,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    # PEFT would make the adapters f32; here all is bf16, as on our side.
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).to("cuda")
    model.train()
    if settings.recompute != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), fused=True)

    n_micro = settings.rows // settings.micro_rows
    ids = torch.randint(config.vocab_size, (n_micro, settings.micro_rows, settings.tokens), device="cuda")

    def step() -> float:
        for micro in ids:
            loss = model(input_ids=micro, labels=micro).loss / n_micro
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    seconds = []
    for index in range(settings.warmup + settings.steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if index >= settings.warmup:
            seconds.append(time.perf_counter() - began)
    free, total = torch.cuda.mem_get_info()
    print(json.dumps({
        "seconds_per_step": statistics.median(seconds),
        "memory_bytes": total - free,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
    }))


main()
