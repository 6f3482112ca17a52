#!/usr/bin/env python3
"""What `transformers` + PEFT compute, for trainer/tests/parity.rs to compare with.

    make_reference.py OUT --pretrained DIR

Makes two tiny models in OUT (a LLaMA-2 shape, untied, as many key/value heads as heads; and a tied one with shared key/value
heads) and takes the pretrained one in DIR. For each case it writes OUT/CASE.safetensors:

    ids              [steps, rows, time]
    base_logits      of the model alone on ids[0]; base_loss beside it in reference.json
    start.NAME       LoRA's A and B, both random, so that no gradient is zero
    logits           with LoRA on ids[0]
    grad.NAME        of the mean loss on ids[0]
    end.NAME         after `steps` steps of torch.optim.AdamW with clipping by global norm, one batch of ids a step

All in f32 but the cross-entropy. NAME is the parameter's name without PEFT's prefixes. Hyperparameters, losses and norms: OUT/reference.json.
"""

import argparse
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

STEPS, ROWS = 10, 2
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
ALL_MODULES = ["embed_tokens", "lm_head", *ALL_LINEARS, "norms"]
LORA = {"rank": 8, "alpha": 16.0}
# Weight decay, unequal learning rates and a clip that is always active: each would show if left out or misplaced.
OPTIMIZER = {
    "lr_lora": 2e-3,
    "lr_embeddings": 1e-3,
    "lr_body": 1.5e-3,
    "beta1": 0.9,
    "beta2": 0.99,
    "epsilon": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 0.05,
}
# Article 1 and on; a model that was trained on text should be compared on text.
TEXT = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and "
    "should act towards one another in a spirit of brotherhood. Everyone is entitled to all the rights and freedoms "
    "set forth in this Declaration, without distinction of any kind, such as race, colour, sex, language, religion, "
    "political or other opinion, national or social origin, property, birth or other status. Everyone has the right to "
    "life, liberty and security of person. No one shall be held in slavery or servitude."
)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("out")
    arguments.add_argument("--pretrained", required=True)
    arguments = arguments.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.makedirs(arguments.out, exist_ok=True)

    mha = tiny(arguments.out, "tiny-mha", heads=4, kv_heads=4, tied=False, head_dim=16)
    # head_dim is not hidden / heads here.
    gqa = tiny(arguments.out, "tiny-gqa", heads=8, kv_heads=2, tied=True, head_dim=16)
    # Frequencies on either side of the blend and in it: 2π·(1 … 5000^(7/8)) positions a turn, in a context of 32.
    llama3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 0.25, "high_freq_factor": 2.0,
              "original_max_position_embeddings": 32}
    scaled = tiny(arguments.out, "tiny-llama3", heads=4, kv_heads=2, tied=False, head_dim=16, rope=llama3)
    cases = [
        case(arguments.out, "tiny-mha-qv", mha, ["q_proj", "v_proj"], time=24),
        case(arguments.out, "tiny-mha-all", mha, ALL_LINEARS, time=24),
        case(arguments.out, "tiny-gqa-qv", gqa, ["q_proj", "v_proj"], time=24),
        case(arguments.out, "tiny-gqa-all", gqa, ALL_LINEARS, time=24),
        case(arguments.out, "tiny-mha-full", mha, [], time=24, full=ALL_MODULES),
        case(arguments.out, "tiny-gqa-full", gqa, [], time=24, full=ALL_MODULES),
        case(arguments.out, "tiny-gqa-mixed", gqa, ["q_proj", "down_proj"], time=24, full=["v_proj", "norms"]),
        case(arguments.out, "tiny-llama3-all", scaled, ALL_LINEARS, time=48),
        case(arguments.out, "pretrained-all", arguments.pretrained, ALL_LINEARS, time=32),
    ]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    with open(os.path.join(arguments.out, "reference.json"), "w") as file:
        json.dump({"versions": versions, "lora": LORA, "optimizer": OPTIMIZER, "cases": cases}, file, indent=1)


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 5000.0}


def tiny(out, name, heads, kv_heads, tied, head_dim, rope=DEFAULT_ROPE):
    """A model whose every parameter, norms too, is random and matters. Returns its folder."""
    generator = torch.Generator().manual_seed(len(name) + heads)
    config = LlamaConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.12 * noise)
    folder = os.path.join(out, name)
    model.save_pretrained(folder)
    return folder


def case(out, name, folder, targets, time, full=("embed_tokens", "lm_head")):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    ids = batches(folder, model.config.vocab_size, time)
    tied = bool(model.config.tie_word_embeddings)
    tensors = {"ids": ids}
    with torch.no_grad():
        base = model(ids[0], labels=ids[0])
        base_loss = cross_entropy(base.logits, ids[0]).item()
        tensors["base_logits"] = base.logits.clone()

    whole = [module for name in full for module in (NORMS if name == "norms" else [name])]
    if targets:
        lora = LoraConfig(
            r=LORA["rank"],
            lora_alpha=LORA["alpha"],
            lora_dropout=0.0,
            target_modules=targets,
            modules_to_save=whole,
            ensure_weight_tying=tied and "lm_head" in whole,  # one matrix, trained once
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    trained = {ours(name): p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in trained.items():
            if "lora_" in key:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (parameter.shape[1] ** -0.5 if "lora_A" in key else 0.02))
                tensors[f"start.{key}"] = parameter.clone()

    groups = [{"params": [p], **rates(key)} for key, p in trained.items()]
    betas = (OPTIMIZER["beta1"], OPTIMIZER["beta2"])
    adamw = torch.optim.AdamW(groups, betas=betas, eps=OPTIMIZER["epsilon"])
    losses, norms = [], []
    for step in range(STEPS):
        logits = model(ids[step]).logits
        loss = cross_entropy(logits, ids[step])
        loss.backward()
        if step == 0:
            tensors["logits"] = logits.detach().clone()
            tensors.update({f"grad.{key}": parameter.grad.clone() for key, parameter in trained.items()})
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), OPTIMIZER["max_grad_norm"]).item())
        adamw.step()
        adamw.zero_grad()
    tensors.update({f"end.{key}": parameter.detach().clone() for key, parameter in trained.items()})
    save_file({key: value.contiguous() for key, value in tensors.items()}, os.path.join(out, f"{name}.safetensors"))
    return {
        "name": name,
        "model": os.path.abspath(folder),
        "targets": targets,
        "full": list(full),
        "tied": tied,
        "base_loss": base_loss,
        "stock_base_loss": base.loss.item(),
        "losses": losses,
        "grad_norms": norms,
    }


def rates(name):
    """Learning rate and weight decay of a parameter: norms have none of the latter."""
    kind = "lora" if "lora_" in name else "embeddings" if "embed_tokens" in name or "lm_head" in name else "body"
    decay = 0.0 if "norm" in name else OPTIMIZER["weight_decay"]
    return {"lr": OPTIMIZER[f"lr_{kind}"], "weight_decay": decay}


def cross_entropy(logits, ids):
    """The mean over targets, of the f32 logits but in f64. Torch's f32 log_softmax sums 49,152 terms so roughly that the loss is off
    by 3e-6 and gradients by 2e-4 of their norm, 20 times what all layers together leave: it would hide what is compared here."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())


def batches(folder, pieces, time):
    if os.path.exists(os.path.join(folder, "tokenizer.json")):
        text = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
        starts = [(11 * row) % (len(text) - time) for row in range(STEPS * ROWS)]
        rows = [text[start : start + time] for start in starts]
        return torch.tensor(rows).view(STEPS, ROWS, time)
    return torch.randint(pieces, (STEPS, ROWS, time), generator=torch.Generator().manual_seed(2))


def ours(name):
    for prefix in ("base_model.model.", ".default", ".modules_to_save"):
        name = name.replace(prefix, "")
    return name


if __name__ == "__main__":
    main()
