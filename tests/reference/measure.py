#!/usr/bin/env python3
"""What `transformers` and sacreBLEU say, written straightforwardly: one text at a time, no cache shared, no batches.

Serves one request after another, so that a test starts Python, torch and each model once: a line of JSON comes with `what`
and its settings, a line of JSON goes. All in f32.

    models     out, tokenizer                          two tiny models of odd shapes in out/llama and out/gpt2
    nll        model, texts, start, window, stride     tokens and nats of each text
    generate   model, prompts, new, penalty            tokens behind each prompt, greedy
    fewshot    model, shown, asked, template, joined_by, labels, written, shots, seed, protocol (mala, emma)
    sacrebleu  texts, references, tokenize             BLEU, chrF++, Self-BLEU
"""

import json
import os
import random
import shutil
import sys
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@cache
def load(path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    return torch, model, AutoTokenizer.from_pretrained(path)


def models(out, tokenizer):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    pieces = 32000
    llama = LlamaConfig(vocab_size=pieces, hidden_size=60, intermediate_size=100, num_hidden_layers=3, num_attention_heads=6,
                        num_key_value_heads=2, head_dim=14, max_position_embeddings=2048, tie_word_embeddings=False,
                        bos_token_id=1, eos_token_id=2)
    gpt2 = GPT2Config(vocab_size=pieces, n_embd=36, n_layer=2, n_head=3, n_inner=50, n_positions=2048, bos_token_id=1,
                      eos_token_id=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    for name, model in {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}.items():
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.15 * noise if parameter.dim() > 1 else 1 + 0.1 * noise)
        folder = os.path.join(out, name)
        model.save_pretrained(folder)
        for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]:
            if os.path.exists(os.path.join(tokenizer, file)):
                shutil.copy(os.path.join(tokenizer, file), folder)


def log_likelihoods(torch, model, ids):
    """Row i: ln p of every piece behind ids[: i + 1]."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


def nll(model, texts, start, window, stride):
    torch, model, tokenizer = load(model)
    found = []
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, targets = encoded["input_ids"], text
        if start == "none":
            targets = text[encoded["offset_mapping"][1][0] :]
        else:
            ids = [tokenizer.convert_tokens_to_ids(start), *ids]
        total, scored, at = 0.0, 1, 0
        while scored < len(ids):
            here = ids[at : at + window]
            of = log_likelihoods(torch, model, here)
            for position in range(scored, at + len(here)):
                total -= of[position - at - 1, ids[position]].item()
            scored = at + len(here)
            at = min(at + stride, scored - 1)
        found.append({"tokens": len(ids) - 1, "nats": total, "bytes": len(targets.encode())})
    return found


def generate(model, prompts, new, penalty):
    torch, model, tokenizer = load(model)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                             repetition_penalty=penalty, pad_token_id=0)
        made = out[0, ids.shape[1] :].tolist()
        if made[-1] == model.generation_config.eos_token_id:
            made = made[:-1]
        found.append(made)
    return found


def fewshot(model, shown, asked, template, joined_by, labels, written, shots, seed, protocol):
    """`labels` as the data names them, `written` as they stand in the template."""
    torch, model, tokenizer = load(model)
    rows = random.Random(seed).sample(range(len(shown)), shots)
    write = dict(zip(labels, written))

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def fill(item, label):
        return template.replace("{text}", item["text"]).replace("{label}", label)

    begin = "".join(fill(shown[row], write[shown[row]["label"]]) + joined_by for row in rows)
    found = []
    for item in asked:
        prompt = begin + fill(item, "").rstrip(" ")
        scores = []
        for label in written:
            if protocol == "emma":
                of = log_likelihoods(torch, model, encode(prompt))
                scores.append(-of[-1, encode("\n" + label)[-1]].item())
                continue
            before, ids = len(encode(prompt)), encode(prompt + " " + label)
            of = log_likelihoods(torch, model, ids)
            scores.append(-sum(of[at - 1, ids[at]].item() for at in range(before, len(ids))))
        found.append(scores)
    return {"rows": rows, "scores": found}


def sacrebleu(texts, references, tokenize):
    from sacrebleu.metrics import BLEU, CHRF

    bleu, alone = BLEU(tokenize=tokenize), BLEU(tokenize=tokenize, effective_order=True)
    others = [alone.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    return {
        "bleu": bleu.corpus_score(texts, references).score,
        "chrf": CHRF(word_order=2).corpus_score(texts, references).score,
        "self_bleu": sum(others) / len(others),
    }


def main():
    # Libraries print where they like; replies have standard output to themselves.
    replies, sys.stdout = sys.stdout, sys.stderr
    known = {function.__name__: function for function in [models, nll, generate, fewshot, sacrebleu]}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(known[request.pop("what")](**request)), file=replies, flush=True)


if __name__ == "__main__":
    main()
