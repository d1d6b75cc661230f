#!/usr/bin/env bash
# NVRTC, which compiles the GPU's kernels, and ptxas, which says what they take of a GPU, from NVIDIA's Python packages,
# unpacked (never installed) into $NVRTC_HOME (default ~/.cache/octet-nvrtc, about 0.4 GB). No GPU and no driver is needed.
#   bash nvrtc-env.sh && ( . ~/.cache/octet-nvrtc/env.sh && cargo test --lib offload::nvrtc -- --nocapture )
# CUDA 12 still compiles for sm_70; 13 does not.
set -euo pipefail
H=$(realpath -m "${NVRTC_HOME:-$HOME/.cache/octet-nvrtc}")
[ -f "$H/.ready" ] && exit 0
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "nvrtc-env.sh: needs Linux on x86-64 (found $(uname -sm))"; exit 1; }
rm -rf "$H"; mkdir -p "$H/wheels" "$H/tree"                          # what an interrupted or older run left
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$H/wheels" \
  "nvidia-cuda-nvrtc-cu12==12.9.*" "nvidia-cuda-nvcc-cu12==12.9.*"
for wheel in "$H"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$H/tree"; done
rm -r "$H/wheels"
nvrtc=$(find "$H/tree" -name 'libnvrtc.so.12')
ptxas=$(find "$H/tree" -name ptxas)
chmod +x "$ptxas"
printf 'export OCTET_NVRTC=%q OCTET_PTXAS=%q\n' "$nvrtc" "$ptxas" > "$H/env.sh"
"$ptxas" --version | tail -n 1
touch "$H/.ready"
