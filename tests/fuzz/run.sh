#!/usr/bin/env bash
# Feeds arbitrary bytes to each reader of other programs' files, with libFuzzer's coverage guidance, on stable Rust.
#
#   tests/fuzz/run.sh [SECONDS]      seconds for each target, 60 if left out
#
# What it finds is kept in target/fuzz/corpus for the next time; a crash leaves its input in target/fuzz/crashes. Put that
# into regression/TARGET, where the ordinary tests read it from then on.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

seconds="${1:-60}"
out="${CARGO_TARGET_DIR:-target}/fuzz"
# What `cargo fuzz` passes: counters at every edge and traced comparisons. Checks for overflow are on, as in a debug build.
instrument="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Ccodegen-units=1"

# With a target of its own, build scripts are not instrumented: nothing would link them with libFuzzer.
host="$(rustc --version --verbose | sed -n 's/^host: //p')"

echo "Building the fuzz targets"
RUSTFLAGS="$(tr '\n' ' ' <<< "$instrument")" \
    cargo build --release --locked --quiet --target "$host" --manifest-path tests/fuzz/Cargo.toml --target-dir "$out"
for target in hostlist indexed jsonl manifest rendezvous sentencepiece slice; do
    seen="$out/corpus/$target"
    mkdir -p -- "$seen" "$out/crashes"
    echo "Fuzzing $target for $seconds s"
    "$out/$host/release/$target" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 -verbosity=0 \
        -artifact_prefix="$out/crashes/$target-" "$seen" "tests/fuzz/regression/$target" 2>&1 |
        grep -E 'executed_units|ERROR|panicked|SUMMARY|Test unit' || true
    if compgen -G "$out/crashes/$target-*" > /dev/null; then
        echo "Stopped: $target failed; its input is in $out/crashes" >&2
        exit 1
    fi
done
