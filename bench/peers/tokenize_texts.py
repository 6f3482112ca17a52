"""The peer of `tokenize`: the batch API of the Python package `tokenizers`, all cores.

Usage: tokenize_texts.py TOKENIZER_FOLDER TEXTS.jsonl BATCH
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from measure import report
from tokenizers import Tokenizer

folder, texts_path, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.no_truncation()
tokenizer.no_padding()
tokenizer.encode_special_tokens = True
with texts_path.open(encoding="utf-8") as lines:
    texts = [json.loads(line) for line in lines]

seconds, n_tokens, check = 0.0, 0, 0
for start in range(0, len(texts), batch):
    part = texts[start : start + batch]
    started = time.perf_counter()
    encodings = tokenizer.encode_batch(part, add_special_tokens=False)
    seconds += time.perf_counter() - started
    ids = np.concatenate([np.array(encoding.ids, dtype=np.uint64) for encoding in encodings])
    places = (np.arange(n_tokens, n_tokens + len(ids), dtype=np.uint64) % np.uint64(65521)) + np.uint64(1)
    check = (check + int((ids * places).sum(dtype=np.uint64))) % 2**64
    n_tokens += len(ids)
report(seconds, n_tokens=n_tokens, check=check)
