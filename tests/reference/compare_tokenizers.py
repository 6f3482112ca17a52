#!/usr/bin/env python3
"""Encodes texts with every engine that reads a tokenizer folder, and says where one differs from the ids given.

    compare_tokenizers.py

Each line of standard input names a folder and a file of texts, with a tab between them; each line of standard output answers one. One
process for many of them: importing transformers takes longer than most comparisons.

The texts are JSON: {"texts": [...], "ids": [[...], ...], "thorough": n, "user_defined": [...]}: ids without special tokens around
them; the slower engines get the first n texts and every 50th of the others; strings that are one token wherever a text has them.
The answer is JSON: for each engine how many texts it encoded and the first that differ.

transformers' LlamaTokenizer builds its own pre-tokenizer, whatever the folder says: it puts no space in front of a text that begins
with one, and knows nothing of user-defined pieces. It is compared on the other texts. It is a BPE whatever the folder says, as is its
slow sister: a unigram model is not for them.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import sentencepiece
import tokenizers
import transformers
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


def main():
    transformers.utils.logging.set_verbosity_error()
    for line in sys.stdin:
        print(json.dumps(verdicts(*line.rstrip("\n").split("\t"))), flush=True)


def verdicts(folder, path):
    with open(path, encoding="utf-8") as file:
        given = json.load(file)
    cases, user_defined = list(zip(given["texts"], given["ids"], strict=True)), given["user_defined"]
    result = {}

    library = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, "tokenizer.model"))
    texts = [text for text, _ in cases]
    result["sentencepiece"] = compare(cases, library.encode(texts, num_threads=2), library.decode)

    thorough = given["thorough"]
    cases = cases[:thorough] + cases[thorough::50]
    texts = [text for text, _ in cases]
    engine = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    engine.encode_special_tokens = True
    ids = [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)]
    result["tokenizers"] = compare(cases, ids, lambda ids: engine.decode(ids, skip_special_tokens=False))

    auto = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    result[f"AutoTokenizer ({type(auto).__name__})"] = compare(cases, called(auto, texts), auto.decode)

    with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
        if json.load(file)["model"]["type"] == "Unigram":
            return result

    cut_otherwise = lambda text: text.startswith((" ", "▁")) or any(string in text for string in user_defined)
    usual = [(text, ids) for text, ids in cases if not cut_otherwise(text)]
    llama = LlamaTokenizer.from_pretrained(folder, split_special_tokens=True)
    result["LlamaTokenizer"] = compare(usual, called(llama, [text for text, _ in usual]), llama.decode)

    # The class of v5 that calls the library itself. It strips and splits at special tokens, so it gets texts without either.
    slow = SentencePieceBackend(vocab_file=os.path.join(folder, "tokenizer.model"), unk_token="<unk>")
    plain = [case for case in cases[:500] if "<unk>" not in case[0]]
    ids = [slow.convert_tokens_to_ids(slow.tokenize(text)) for text, _ in plain]
    result["SentencePieceBackend"] = compare(plain, ids, None)
    return result


def called(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def compare(cases, found, decode):
    different = [text for (text, ids), other in zip(cases, found, strict=True) if ids != other]
    undone = []
    if decode is not None:
        # Neither file can tell a ▁ of the text from a space.
        undone = [text for text, ids in cases if decode(ids) != text.replace("▁", " ")]
    return {
        "texts": len(cases),
        "different": len(different),
        "undone": len(undone),
        "first": [short(text) for text in different[:3] + undone[:3]],
    }


def short(text):
    return text if len(text) < 80 else text[:80] + "…"


if __name__ == "__main__":
    main()
