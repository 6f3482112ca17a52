#!/usr/bin/env python3
"""Loads what Panglot exported with stock `transformers` and PEFT, no network, and writes their logits.

    load_export.py --ids FILE --out FILE [--dtype float32] DIR...

DIR is a model folder or an adapter folder (it has adapter_config.json, which names its base). --ids holds `ids` [rows, time]; --out
gets the logits of the i-th DIR as "i". An adapter is loaded as its README says, and has "i.merged" besides: the logits after
`merge_and_unload`, and "i.auto", where AutoPeftModelForCausalLM loaded it.
"""

import argparse
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--ids", required=True)
    arguments.add_argument("--out", required=True)
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("folders", nargs="+")
    arguments = arguments.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ids = load_file(arguments.ids)["ids"]
    dtype = getattr(torch, arguments.dtype)
    logits = {}
    for index, folder in enumerate(arguments.folders):
        if os.path.exists(os.path.join(folder, "adapter_config.json")):
            model = adapter(folder, dtype)
            logits[f"{index}"] = run(model, ids)
            logits[f"{index}.merged"] = run(model.merge_and_unload(), ids)
            if has_tokenizer(folder):
                logits[f"{index}.auto"] = run(AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype), ids)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
            assert not any(report.values()), report
            logits[f"{index}"] = run(model, ids)
        if has_tokenizer(folder):
            AutoTokenizer.from_pretrained(folder)
    save_file(logits, arguments.out)


def adapter(folder, dtype):
    """As the folder's README says."""
    with open(os.path.join(folder, "adapter_config.json")) as file:
        base = json.load(file)["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with safe_open(os.path.join(folder, "adapter_model.safetensors"), "pt") as file:
        for matrix in ("model.embed_tokens", "transformer.wte"):
            matrix = f"base_model.model.{matrix}.weight"
            if matrix in file.keys():
                model.resize_token_embeddings(file.get_slice(matrix).get_shape()[0], mean_resizing=False)
        # PEFT warns, and does no more, where a name fits nothing.
        names = set(file.keys())
    model = PeftModel.from_pretrained(model, folder)
    saved = {name.replace(".default", "").replace(".modules_to_save", "") for name in model.state_dict()}
    assert names <= saved, f"no module for {sorted(names - saved)[:5]}"
    return model


def has_tokenizer(folder):
    return os.path.exists(os.path.join(folder, "tokenizer_config.json"))


def run(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits.float().contiguous()


if __name__ == "__main__":
    main()
