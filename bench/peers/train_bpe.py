"""The peer of `bpe_train_*`: SentencePiece's own trainer, every character kept, no cap on sentences.

Usage: train_bpe.py TEXT PIECES THREADS
"""

import sys
import tempfile
import time

import sentencepiece
from measure import report

text, pieces, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with tempfile.TemporaryDirectory() as folder:
    started = time.perf_counter()
    sentencepiece.SentencePieceTrainer.train(
        input=text,
        model_prefix=f"{folder}/model",
        model_type="bpe",
        vocab_size=pieces,
        character_coverage=1.0,
        num_threads=threads,
        input_sentence_size=0,
        max_sentence_length=1 << 20,
        max_sentencepiece_length=16,
        normalization_rule_name="identity",
        split_by_unicode_script=False,
        split_by_number=False,
        train_extremely_large_corpus=True,
        minloglevel=2,
    )
    seconds = time.perf_counter() - started
    made = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/model.model").get_piece_size()
report(seconds, pieces=made)
