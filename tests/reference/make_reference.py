#!/usr/bin/env python3
"""What `transformers` + PEFT compute, for trainer/tests/parity.rs to compare with.

    make_reference.py OUT --pretrained DIR

Makes tiny models in OUT (of LLaMA's shapes: untied with as many key/value heads as heads, tied with shared ones, with scaled
rotary positions; of GPT-2's: tied with GELU's tanh form, untied with the exact one) and takes the pretrained one in DIR. For each case it writes OUT/CASE.safetensors:

    ids              [steps, rows, time]
    base_logits      of the model alone on ids[0]; base_loss beside it in reference.json
    start.NAME       LoRA's A and B, both random, so that no gradient is zero
    logits           with LoRA on ids[0]
    grad.NAME        of the mean loss on ids[0]
    end.NAME         after `steps` steps of torch.optim.AdamW with clipping by global norm, one batch of ids a step

A case may grow the vocabulary to some pieces in a matrix padded with rows that no piece has, and may keep documents of a row
from seeing each other. All in f32 but the cross-entropy. NAME is the parameter's name without PEFT's prefixes. Hyperparameters, losses and norms: OUT/reference.json.
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
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

STEPS, ROWS = 10, 2
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
ALL_MODULES = ["embed_tokens", "lm_head", *ALL_LINEARS, "norms"]
GPT2_LINEARS = ["c_attn", "c_proj", "c_fc"]
GPT2_MODULES = ["embed_tokens", "positions", "lm_head", *GPT2_LINEARS, "norms"]
# Our names of modules that GPT-2's files call otherwise.
GPT2_NAMES = {"embed_tokens": ["wte"], "positions": ["wpe"], "norms": ["ln_1", "ln_2", "ln_f"]}
# First positions of the documents in each row of a step.
DOCUMENTS = [[0, 7, 8, 19], [0]]
PADDED = {"pieces": 140, "rows": 160}
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
    gpt2 = tiny_gpt2(arguments.out, "tiny-gpt2", tied=True, activation="gelu_new", inner=None)
    gpt2_untied = tiny_gpt2(arguments.out, "tiny-gpt2-untied", tied=False, activation="gelu", inner=176)
    cases = [
        case(arguments.out, "tiny-mha-qv", mha, ["q_proj", "v_proj"], time=24),
        case(arguments.out, "tiny-mha-all", mha, ALL_LINEARS, time=24),
        case(arguments.out, "tiny-gqa-qv", gqa, ["q_proj", "v_proj"], time=24),
        case(arguments.out, "tiny-gqa-all", gqa, ALL_LINEARS, time=24),
        case(arguments.out, "tiny-mha-full", mha, [], time=24, full=ALL_MODULES),
        case(arguments.out, "tiny-gqa-full", gqa, [], time=24, full=ALL_MODULES),
        case(arguments.out, "tiny-gqa-mixed", gqa, ["q_proj", "down_proj"], time=24, full=["v_proj", "norms"]),
        case(arguments.out, "tiny-llama3-all", scaled, ALL_LINEARS, time=48),
        case(arguments.out, "tiny-mha-padded", mha, ["q_proj", "v_proj"], time=24, padded=PADDED),
        case(arguments.out, "tiny-gqa-padded", gqa, ["q_proj", "v_proj"], time=24, padded=PADDED),
        case(arguments.out, "tiny-gqa-documents", gqa, ["k_proj", "v_proj"], time=24, documents=DOCUMENTS),
        case(arguments.out, "tiny-gpt2-attn", gpt2, ["c_attn"], time=24),
        case(arguments.out, "tiny-gpt2-all", gpt2, GPT2_LINEARS, time=24),
        case(arguments.out, "tiny-gpt2-full", gpt2, [], time=24, full=GPT2_MODULES),
        case(arguments.out, "tiny-gpt2-mixed", gpt2, ["c_proj"], time=24, full=["positions", "c_fc", "norms"]),
        case(arguments.out, "tiny-gpt2-padded", gpt2, ["c_attn"], time=24, padded=PADDED),
        case(arguments.out, "tiny-gpt2-documents", gpt2, ["c_attn", "c_fc"], time=24, documents=DOCUMENTS),
        case(arguments.out, "tiny-gpt2-untied-all", gpt2_untied, GPT2_LINEARS, time=24),
        case(arguments.out, "tiny-gpt2-untied-full", gpt2_untied, [], time=24, full=GPT2_MODULES),
        case(arguments.out, "pretrained-all", arguments.pretrained, ALL_LINEARS, time=32),
    ]
    bf16 = curve(arguments.out, arguments.pretrained)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    with open(os.path.join(arguments.out, "reference.json"), "w") as file:
        json.dump({"versions": versions, "lora": LORA, "optimizer": OPTIMIZER, "cases": cases, "bf16": bf16}, file, indent=1)


CURVE_STEPS = 50


def curve(out, folder):
    """Losses of LoRA on all linears in bf16, PEFT's pairs f32, over 50 steps of text; and the same in f32, for what bf16
    costs. Ids [steps, 1, time] and the pairs' start are in OUT/bf16.safetensors."""
    text = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    time = 48
    ids = torch.tensor([text[start : start + time] for start in ((11 * step) % (len(text) - time) for step in range(CURVE_STEPS))])
    ids = ids.view(CURVE_STEPS, 1, time)
    tensors, losses = {"ids": ids}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        model.config.use_cache = False
        lora = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=ALL_LINEARS, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        trained = {ours(name): p for name, p in model.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for key, parameter in trained.items():
                if "lora_A" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
                tensors[f"start.{key}"] = parameter.detach().float().clone()
        adamw = torch.optim.AdamW(trained.values(), lr=5e-4, betas=(0.9, 0.99), weight_decay=0.0)
        losses[str(dtype)] = found = []
        for step in range(CURVE_STEPS):
            loss = cross_entropy(model(ids[step]).logits, ids[step])
            loss.backward()
            found.append(loss.item())
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            adamw.step()
            adamw.zero_grad()
    save_file({key: value.contiguous() for key, value in tensors.items()}, os.path.join(out, "bf16.safetensors"))
    return {"model": os.path.abspath(folder), "f32": losses["torch.float32"], "bf16": losses["torch.bfloat16"]}


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
    return save_random(LlamaForCausalLM(config), generator, os.path.join(out, name))


def tiny_gpt2(out, name, tied, activation, inner):
    """The same of GPT-2's architecture; biases too are random. Returns its folder."""
    generator = torch.Generator().manual_seed(len(name))
    config = GPT2Config(
        vocab_size=131,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_inner=inner,
        n_positions=48,
        activation_function=activation,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        tie_word_embeddings=tied,
    )
    return save_random(GPT2LMHeadModel(config), generator, os.path.join(out, name))


def save_random(model, generator, folder):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_scale else 0.12 * noise)
    model.save_pretrained(folder)
    return folder


def case(out, name, folder, targets, time, full=("embed_tokens", "lm_head"), padded=None, documents=None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    ids = batches(folder, model.config.vocab_size, time)
    if padded:
        grow(model, padded)
        ids = batches(folder, padded["pieces"], time)
    pieces = padded["pieces"] if padded else model.config.vocab_size
    seen = {"attention_mask": block_diagonal(documents, time)} if documents else {}
    tied = bool(model.config.tie_word_embeddings)
    tensors = {"ids": ids}
    with torch.no_grad():
        base = model(ids[0], labels=ids[0], **seen)
        base_logits = base.logits[..., :pieces]
        base_loss = cross_entropy(base_logits, ids[0]).item()
        tensors["base_logits"] = base_logits.clone()

    is_gpt2 = model.config.model_type == "gpt2"
    names = GPT2_NAMES if is_gpt2 else {"norms": NORMS}
    whole = [module for name in full for module in names.get(name, [name])]
    if targets:
        lora = LoraConfig(
            r=LORA["rank"],
            lora_alpha=LORA["alpha"],
            lora_dropout=0.0,
            target_modules=targets,
            modules_to_save=whole,
            ensure_weight_tying=tied and "lm_head" in whole,  # one matrix, trained once
            fan_in_fan_out=is_gpt2,
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
        logits = model(ids[step], **seen).logits[..., :pieces]
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
        # Of all rows of a padded matrix.
        "stock_base_loss": base_loss if padded else base.loss.item(),
        "padded": padded,
        "documents": documents,
        "losses": losses,
        "grad_norms": norms,
    }


def grow(model, padded):
    """New piece i starts as the mean of the base's pieces i and 7, whose text it would have been; padding is 0."""
    base = model.config.vocab_size
    model.resize_token_embeddings(padded["rows"], mean_resizing=False)
    with torch.no_grad():
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            for new in range(padded["pieces"] - base):
                matrix[base + new] = (matrix[new] + matrix[7]) / 2
            matrix[padded["pieces"] :] = 0


def block_diagonal(documents, time):
    """[rows, 1, time, time]: whether a position sees another, which is not later and of its own document. Positions go on
    through a row."""
    document = torch.zeros(len(documents), time, dtype=torch.long)
    for row, starts in enumerate(documents):
        for start in starts[1:]:
            document[row, start:] += 1
    same = document[:, :, None] == document[:, None, :]
    return (same & torch.ones(time, time, dtype=torch.bool).tril())[:, None]


def rates(name):
    """Learning rate and weight decay of a parameter: norms and biases have none of the latter."""
    vocabulary = ("embed_tokens", "lm_head", "wte", "wpe")
    kind = "lora" if "lora_" in name else "embeddings" if any(part in name for part in vocabulary) else "body"
    decay = 0.0 if "norm" in name or "ln_" in name or name.endswith(".bias") else OPTIMIZER["weight_decay"]
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
