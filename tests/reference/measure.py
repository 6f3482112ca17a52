#!/usr/bin/env python3
"""What `transformers` says of a model, written straightforwardly: one text at a time, no cache shared, no batches.

    measure.py models OUT --tokenizer FOLDER        two tiny models of odd shapes in OUT/llama and OUT/gpt2
    measure.py nll MODEL DOCUMENTS.jsonl --start TOKEN --window N --stride N
    measure.py generate MODEL PROMPTS.jsonl --new N [--penalty P]
    measure.py fewshot MODEL SHOWN.jsonl ASKED.jsonl --template T --labels A,B --shots N --seed N --protocol mala|emma
    measure.py sacrebleu TEXTS.json                 BLEU, chrF++ and sentence BLEUs of the texts and references in it

Prints JSON. All in f32.
"""

import argparse
import json
import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load(path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    return torch, model, AutoTokenizer.from_pretrained(path)


def models(arguments):
    import shutil

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
        folder = os.path.join(arguments.out, name)
        model.save_pretrained(folder)
        for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]:
            if os.path.exists(os.path.join(arguments.tokenizer, file)):
                shutil.copy(os.path.join(arguments.tokenizer, file), folder)
    return {}


def nll(arguments):
    torch, model, tokenizer = load(arguments.model)
    start = tokenizer.convert_tokens_to_ids(arguments.start)
    found = []
    for document in lines(arguments.documents):
        ids = [start, *tokenizer(document["text"], add_special_tokens=False)["input_ids"]]
        total, scored, at = 0.0, 1, 0
        while scored < len(ids):
            window = ids[at : at + arguments.window]
            with torch.no_grad():
                logits = model(torch.tensor([window])).logits[0].double()
            for position in range(scored, at + len(window)):
                total -= torch.log_softmax(logits[position - at - 1], -1)[ids[position]].item()
            scored = at + len(window)
            at = min(at + arguments.stride, scored - 1)
        found.append({"tokens": len(ids) - 1, "nats": total})
    return found


def generate(arguments):
    torch, model, tokenizer = load(arguments.model)
    found = []
    for line in lines(arguments.prompts):
        ids = tokenizer(line["prompt"], return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=arguments.new,
                             repetition_penalty=arguments.penalty, pad_token_id=0)
        made = out[0, ids.shape[1] :].tolist()
        if made[-1] == model.generation_config.eos_token_id:
            made = made[:-1]
        found.append(made)
    return found


def fewshot(arguments):
    torch, model, tokenizer = load(arguments.model)
    shown, asked = lines(arguments.shown), lines(arguments.asked)
    labels = arguments.labels.split(",")
    rows = random.Random(arguments.seed).sample(range(len(shown)), arguments.shots)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def fill(item, label):
        return arguments.template.replace("{text}", item["text"]).replace("{label}", label)

    begin = "".join(fill(shown[row], shown[row]["label"]) + "\n" for row in rows)
    found = []
    for item in asked:
        prompt = begin + fill(item, "").rstrip(" ")
        scores = []
        for label in labels:
            with torch.no_grad():
                if arguments.protocol == "emma":
                    target = encode("\n" + label)[-1]
                    logits = model(torch.tensor([encode(prompt)])).logits[0, -1].double()
                    scores.append(-torch.log_softmax(logits, -1)[target].item())
                    continue
                before, ids = len(encode(prompt)), encode(prompt + " " + label)
                logits = model(torch.tensor([ids])).logits[0].double()
                of = [torch.log_softmax(logits[at - 1], -1)[ids[at]].item() for at in range(before, len(ids))]
                scores.append(-sum(of))
        found.append(scores)
    return {"rows": rows, "scores": found}


def sacrebleu(arguments):
    from sacrebleu.metrics import BLEU, CHRF

    with open(arguments.texts, encoding="utf-8") as file:
        case = json.load(file)
    texts, references = case["texts"], case["references"]
    bleu = BLEU(tokenize=case.get("tokenize", "13a"))
    alone = BLEU(tokenize=case.get("tokenize", "13a"), effective_order=True)
    return {
        "bleu": bleu.corpus_score(texts, references).score,
        "chrf": CHRF(word_order=2).corpus_score(texts, references).score,
        "sentences": [alone.sentence_score(text, [r[i] for r in references]).score for i, text in enumerate(texts)],
        "self_bleu": sum(alone.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts))
        / len(texts),
    }


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)

    def command(function, *positional):
        added = commands.add_parser(function.__name__)
        added.set_defaults(run=function)
        for name in positional:
            added.add_argument(name)
        return added

    command(models, "out").add_argument("--tokenizer")
    of_nll = command(nll, "model", "documents")
    of_nll.add_argument("--start")
    of_nll.add_argument("--window", type=int)
    of_nll.add_argument("--stride", type=int)
    of_generate = command(generate, "model", "prompts")
    of_generate.add_argument("--new", type=int)
    of_generate.add_argument("--penalty", type=float, default=1.0)
    of_fewshot = command(fewshot, "model", "shown", "asked")
    for option in ["--template", "--labels", "--protocol"]:
        of_fewshot.add_argument(option)
    of_fewshot.add_argument("--shots", type=int)
    of_fewshot.add_argument("--seed", type=int)
    command(sacrebleu, "texts")
    arguments = parser.parse_args()
    print(json.dumps(arguments.run(arguments)))


if __name__ == "__main__":
    main()
