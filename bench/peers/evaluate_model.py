"""What people run today to measure a model: `transformers`' forward passes and generation, `lm-eval`. One side of bench_eval.

    evaluate_model.py nll MODEL TEXTS THREADS        length-sorted batches, each padded to its longest
    evaluate_model.py generate MODEL PROMPTS THREADS NEW
    evaluate_model.py fewshot MODEL TASKS THREADS    lm-eval's own task loop over a folder with its YAML and data

Prints one line of JSON. f32, SDPA, no gradients.
"""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(path, threads):
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    return model, AutoTokenizer.from_pretrained(path)


@torch.inference_mode()
def nll(path, texts, threads):
    model, tokenizer = load(path, threads)
    with open(texts) as file:
        documents = [json.loads(line) for line in file]
    batch_tokens = 4096
    started = time.perf_counter()
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    rows = [[start, *tokenizer(d["text"], add_special_tokens=False)["input_ids"]][:1024] for d in documents]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    sums, at = [0.0] * len(rows), 0
    while at < len(order):
        longest = len(rows[order[at]])
        batch = order[at : at + max(1, batch_tokens // longest)]
        at += len(batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(rows[i])] = torch.tensor(rows[i])
            mask[row, : len(rows[i])] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for i, loss in zip(batch, (losses * mask[:, 1:]).double().sum(1).tolist()):
            sums[i] = loss
    seconds = time.perf_counter() - started
    tokens = sum(len(row) - 1 for row in rows)
    return {"seconds": seconds, "tokens": tokens, "nats": sum(sums), "tokens_per_s": tokens / seconds}


@torch.inference_mode()
def generate(path, prompts, threads, new):
    model, tokenizer = load(path, threads)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with open(prompts) as file:
        texts = [json.loads(line)["prompt"] for line in file]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    new = int(new)
    settings = dict(do_sample=False, pad_token_id=tokenizer.pad_token_id)
    model.generate(**batch, **settings, max_new_tokens=4, min_new_tokens=4)
    started = time.perf_counter()
    out = model.generate(**batch, **settings, max_new_tokens=new, min_new_tokens=new)
    seconds = time.perf_counter() - started
    made = (out.shape[1] - batch["input_ids"].shape[1]) * len(texts)
    return {"seconds": seconds, "tokens": made, "tokens_per_s": made / seconds}


def fewshot(path, tasks, threads):
    torch.set_num_threads(int(threads))
    # Behind the environment's own packages: torch and transformers are those of the other entries.
    sys.path.append(os.environ["PANGLOT_LM_EVAL"])
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=16)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    names = sorted(name for name in manager.all_tasks if name.startswith("articles"))
    started = time.perf_counter()
    found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True,
                                    random_seed=1234, fewshot_random_seed=1234)
    seconds = time.perf_counter() - started
    items = sum(len(samples) for samples in found["samples"].values())
    accuracy = sum(result["acc,none"] for result in found["results"].values()) / len(found["results"])
    return {"seconds": seconds, "items": items, "items_per_s": items / seconds, "accuracy": accuracy}


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    print(json.dumps({"nll": nll, "generate": generate, "fewshot": fewshot}[what](*arguments)))
