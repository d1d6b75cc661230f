#!/usr/bin/env bash
# Fuzzes: fuzz/run.sh TARGET RUNS [SECONDS], or without a target all of them, one after the other. Needs a nightly Rust and
# cargo-fuzz (`cargo install cargo-fuzz`). SANITIZER=address also finds what a wrong `unsafe` does.
set -euo pipefail
cd "$(dirname "$0")"
. ./steps.sh
runs=${2:-1000000} seconds=${3:-0}
targets=${1:-$(cargo +nightly fuzz list --fuzz-dir .)}
for target in $targets; do
  left=$runs
  mkdir -p "corpus/$target"
  while [ "$left" -gt 0 ]; do
    step=$(step "$target" "$left")
    cargo +nightly fuzz run -s "${SANITIZER:-none}" --fuzz-dir . "$target" -- \
      -runs="$step" -max_total_time="$seconds" -timeout=1 -rss_limit_mb=4096 -max_len=8192 -print_final_stats=1
    left=$((left - step))
  done
done
