#!/bin/sh
# The table of docs/quantize.md: every type of one model with its size, bits per weight, error and perplexity.
#
#   cargo build --release
#   tools/quantize_table.sh SOURCE TEXT [CONTEXT]
#
# SOURCE is a float GGUF or a Hugging Face folder; perplexity is that of TEXT in windows of CONTEXT tokens.
set -eu
source=$1 text=$2 context=${3:-256}
bin=$(dirname "$0")/../target/release
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
types="F32 BF16 F16 Q8_0 Q6_K Q5_1 Q5_K_M Q5_K_S Q5_0 Q4_1 Q4_K_M Q4_K_S IQ4_NL Q4_0 IQ4_XS Q3_K_L Q3_K_M Q3_K_S Q2_K"
"$bin/quantize" "$source" "$work/{type}.gguf" "$(echo $types | tr ' ' ',')" > "$work/log" 2> /dev/null
echo "| type | size (MB) | bits/weight | error, share of weights' RMS | perplexity |"
echo "|---|---|---|---|---|"
for type in $types; do
    line=$(grep "^$type: " "$work/log")
    bits=$(echo "$line" | sed 's/.*, \([0-9.]*\) bits per weight.*/\1/')
    error=$(echo "$line" | sed -n 's/.*(\(.*%\)).*/\1/p')
    size=$(wc -c < "$work/$type.gguf")
    ppl=$("$bin/octet" perplexity -m "$work/$type.gguf" -f "$text" -c "$context" --json 2> /dev/null |
        sed 's/.*"ppl": *\([0-9.]*\).*/\1/')
    awk -v t="$type" -v s="$size" -v b="$bits" -v e="${error:-0%}" -v p="$ppl" \
        'BEGIN { printf "| %s | %.2f | %s | %s | %.2f |\n", t, s / 1e6, b, e, p }'
done
