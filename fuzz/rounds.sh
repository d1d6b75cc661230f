#!/usr/bin/env bash
# Fuzzes all targets in turn, some time each, until every one has had its executions: ten million for the readers of files, a
# million for the others. What was done is kept in LOGS, so that a run goes on where the last one ended.
#
#   fuzz/rounds.sh LOGS [SECONDS [TARGET…]]        SECONDS: of a round of one target (120)
#
# An execution that finds something ends the round of its target; LOGS/found says which. Needs what fuzz/run.sh needs.
set -euo pipefail
cd "$(dirname "$0")"
. ./steps.sh
logs=$(mkdir -p "$1" && cd "$1" && pwd) seconds=${2:-120}
shift $(($# > 2 ? 2 : $#))
readers="gguf safetensors safetensors_index tokenizer_model tokenizer_json imatrix session"
others="kv_cache batch_line batch_results tools profile chat_template json_schema regex grammar"
targets=${*:-$readers $others}
folder=${FUZZ_BIN:-target/x86_64-unknown-linux-gnu/release}
[ -n "${FUZZ_BIN:-}" ] || cargo +nightly fuzz build -s "${SANITIZER:-none}" --fuzz-dir .

goal() { case " $readers " in *" $1 "*) echo $((GOAL * 10)) ;; *) echo "$GOAL" ;; esac }
GOAL=${GOAL:-1000000}
# Executions of all rounds of a target.
done_of() { cat "$logs/$1.count" 2>/dev/null || echo 0; }
# The longest seed fits, and little more: short inputs are tried much faster.
longest() { find "corpus/$1" -name 'seed*' -printf '%s\n' | sort -n | tail -1; }

left=1
while [ "$left" = 1 ]; do
  left=0
  for target in $targets; do
    had=$(done_of "$target") want=$(goal "$target")
    [ "$had" -lt "$want" ] || continue
    left=1
    mkdir -p "corpus/$target" "artifacts/$target"
    long=$(longest "$target")
    most=$((${long:-0} > 1024 ? long + 512 : 1536))
    log="$logs/$target.last" begun=$SECONDS total=0 status=0
    while [ "$status" = 0 ] && [ $((had + total)) -lt "$want" ] && [ $((SECONDS - begun)) -lt "$seconds" ]; do
      runs=$(step "$target" $((want - had - total)))
      "$folder/$target" "corpus/$target" -runs="$runs" -max_total_time=$((seconds - SECONDS + begun)) -timeout=120 \
        -report_slow_units=120 -rss_limit_mb=4096 -max_len="$most" -print_final_stats=1 \
        -artifact_prefix="artifacts/$target/" >"$log" 2>&1 || status=$?
      n=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -1)
      total=$((total + ${n:-0}))
      echo $((had + total)) >"$logs/$target.count"
    done
    echo "$(date '+%F %T') $target $total executions, $(done_of "$target") of $want, exit $status" >>"$logs/log"
    [ "$status" = 0 ] || { echo "$target $(date '+%F %T') exit $status" >>"$logs/found"; cp "$log" "$logs/$target.failed-$(date +%s)"; }
    # It would go on failing at once.
    [ "$status" = 0 ] || [ "$total" -gt 0 ] || { echo "$target does not run: $log"; exit 1; }
  done
done
