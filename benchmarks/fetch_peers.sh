#!/usr/bin/env bash
# Wheels of the other libraries of the comparison, for a GPU machine without a network (Linux x86_64, Python 3.12, CUDA 13).
#   benchmarks/fetch_peers.sh           Liger, CCE, TRL, flash-linear-attention and what they need: 5 MB in .whl/
#   benchmarks/fetch_peers.sh --cute    also the CuTe DSL, for QuACK and Liger's scaled cross-entropy: 15 MB in .whl/ and 92 MB
#                                       in parts of 32 MB in .whl-parts/, for copies of limited size
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
platforms=()
for name in manylinux_2_{39,35,34,31,28,27,24,17} manylinux2014 manylinux1; do
  platforms+=(--platform "${name}_x86_64")
done
fetch() {
  local folder=$1
  shift
  for wheel in "$@"; do
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
      -d "$folder" "$wheel"
  done
}
rm -rf .whl .whl-parts
fetch .whl liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash \
  flash-linear-attention==0.6.0 fla-core==0.6.0 einops==0.8.2
if [ "${1:-}" = --cute ]; then
  fetch .whl quack-kernels==0.6.5 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 \
    nvidia-cutlass-dsl-libs-core==4.8.1 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5
  fetch .whl-parts nvidia-cutlass-dsl-libs-cu13==4.8.1
  for wheel in .whl-parts/*.whl; do
    split -b 32m -d "$wheel" "$wheel.part" && rm "$wheel"
  done
fi
du -sh .whl .whl-parts 2>/dev/null || true
