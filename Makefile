# Each target sets up what it needs; done once, that costs a moment and no network. The environment is setup/env.sh's.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-test build build-test demo test test-cluster soak fuzz soak-corpus soak-checkpoint bench-corpus bench-model bench-sharding bench-checkpoint bench-eval bench-cluster test-evaluation setup-eval gpu-check bench-gpu clean distclean
# setup and setup-test hold the same lock, cargo another: side by side nothing is won and the output is mixed.
.NOTPARALLEL:

ENV := . setup/env.sh;

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1 · \2/p' $(MAKEFILE_LIST) | column -t -s '·'

setup:  ## system packages, libtorch, the texts and the base model
	@setup/system.sh
	@setup/packages.py build

setup-test: setup  ## besides, the Python environment that the tests compare against
	@setup/packages.py test
	@setup/system.sh test

setup-eval: setup-test  ## besides, lm-evaluation-harness, which only bench-eval runs beside ours
	@setup/packages.py eval

build: setup  ## both programs, in target/release
	@$(ENV) cargo build --release --locked --workspace

# One set of features for all: what is built for one package alone is built once more for the next.
build-test: setup-test
	@$(ENV) cargo test --release --locked --workspace --no-run

demo: build  ## the whole road on real text in about 500 languages
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/panglot" demo configs/demo.yaml

test: setup-test  ## everything CI runs: formatting, lints, tests
	@$(ENV) cargo fmt --all --check
	@$(ENV) cargo clippy --release --locked --workspace --all-targets -- -D warnings
	@$(ENV) cargo test --release --locked --workspace --no-fail-fast

test-evaluation: build-test  ## likelihoods, texts and few-shot scores beside transformers in full, SmolLM2 too; minutes
	@$(ENV) cargo test --release --locked --workspace --test evaluation -- --include-ignored

test-cluster: build-test  ## every test on a real Slurm cluster of four nodes on this machine; minutes, as root
	@$(ENV) cargo test --release --locked --workspace --test cluster -- --include-ignored --skip soak --nocapture --test-threads=1

soak: build-test  ## a fault every 30 to 60 s for half an hour on that cluster; weights must equal the undisturbed run's
	@$(ENV) cargo test --release --locked --workspace --test cluster -- --ignored --exact soak::thirty_minutes --nocapture --test-threads=1

fuzz: setup  ## arbitrary bytes through the readers of other programs' files, a minute each
	@$(ENV) tests/fuzz/run.sh

soak-corpus: build  ## imports 2 GB of generated text under a limit of 1 GiB of memory; minutes, 6 GB of disk
	@$(ENV) cargo test --release --locked --workspace --test import -- --ignored --exact two_gigabytes_are_imported_in_one --nocapture

soak-checkpoint: build-test build  ## a thousand kills, 10,000 damages, 36 pairs of numbers of ranks; about an hour, goes on where it was stopped
	@mkdir -p runs/soak-checkpoint
	@$(ENV) cargo test --release --locked --workspace --test system_calls -- --soak | tee runs/soak-checkpoint/calls.log
	@$(ENV) cargo test --release --locked --workspace --test elastic -- --soak | tee runs/soak-checkpoint/ranks.log
	@$(ENV) cargo test --release --locked --workspace --test checkpoints -- --ignored --nocapture | tee runs/soak-checkpoint/kills.log
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/bench_checkpoint" counts

bench-corpus: setup-test build  ## the corpus crate side by side with its peers, into bench/results/corpus.json
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/panglot" prepare configs/demo.yaml
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/bench_corpus"

bench-model: setup-test build  ## training steps side by side with transformers + PEFT, into bench/results/model.json
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/panglot" prepare configs/demo.yaml
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/bench_model"

bench-cluster: setup-test build  ## how soon dead and hung ranks are noticed, and what a rendezvous takes, into bench/results/cluster.json
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/bench_cluster"

bench-sharding: setup-test build  ## four ranks side by side with DDP and FSDP, into bench/results/sharding.json; root, for the slow link
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/panglot" prepare configs/demo.yaml
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/bench_sharding"

bench-checkpoint: setup-test build  ## saves and resumes side by side with torch's, into bench/results/checkpoint.json
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/bench_checkpoint"

bench-eval: setup-eval build  ## evaluation and generation side by side with transformers and lm-eval, into bench/results/eval.json
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/panglot" prepare configs/demo.yaml
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/bench_eval"
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/bench_report"

gpu-check: build  ## every kernel, attention, training steps, ZeRO over NCCL and offload: this machine's GPU against its CPU
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/panglot-worker" gpu-check

bench-gpu: setup-test build  ## training a 7B model on this machine's GPU, side by side, into bench/results/gpu.json
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/panglot-worker" bench-gpu --python "$$PANGLOT_PYTHON" --out bench/results/gpu.json
	@$(ENV) "$${CARGO_TARGET_DIR:-target}/release/panglot-worker" bench-gpu --fp8 --python "$$PANGLOT_PYTHON" --out bench/results/gpu.json

clean:  ## removes what was built; runs and fetched packages stay
	@cargo clean

distclean: clean  ## besides, removes what set-up fetched
	@rm -rf -- .panglot
