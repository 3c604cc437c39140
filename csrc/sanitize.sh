#!/bin/sh
# The C++ kernels' own tests under gcc's address and undefined-behaviour sanitizers:
#     csrc/sanitize.sh [PYTHON] [pytest arguments]
# AMX is emulated (tests/amx_emulation.h), whatever the processor has: its tests run too, and its loads are seen.
# Masked loads and stores of AVX-512 are not instrumented: the pages without access of tests/test_native_bounds.py watch
# those.
# The thread sanitizer does not see into torch's pool: tests/test_selftest.py runs it over the kernels without torch.
# Builds beside the checkout's own binary, which stays as it is. Leaks are not looked for: the interpreter has its own.
set -eu
python=${1:-python3}
[ $# -gt 0 ] && shift
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/${python##*/} ;; esac  # the folder changes below
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
VAR_KERNELS_BUILD_EXT=1 VAR_KERNELS_SANITIZE=address,undefined "$python" setup.py -q build_ext \
  --build-lib "$work/binary" --build-temp "$work/objects" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
cp -r csrc var_kernels tests pyproject.toml "$work"
cp "$work"/binary/var_kernels/kernels/_native.* "$work/var_kernels/kernels/"
cd "$work"
export OMP_NUM_THREADS=2 PYTHONPATH="$work" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so)" \
  "$python" -m pytest -q -p no:cacheprovider tests/test_native.py tests/test_native_gemm.py tests/test_native_bounds.py \
  tests/test_native_fuzz.py "$@"
