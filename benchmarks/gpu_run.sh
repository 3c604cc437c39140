#!/usr/bin/env bash
# Everything that needs a GPU, without network: the GPU tests, then every measurement, then the report.
#   benchmarks/gpu_run.sh [OUT]            OUT: benchmarks/results/<gpu name> by default
#   benchmarks/gpu_run.sh --dry-run [OUT]  the measurements and the report on tiny shapes on a CPU
# Calls go on where the last one ended: tests that passed and rows that are in OUT's CSVs are left out.
#   MINUTES=9   of the whole call      TEST_SECONDS=150   of them for the tests at most      JOBS=6   test processes
#   PACK=FILE   keep a tar of OUT there, renewed every 10 s: one file to copy back, also from a call that was cut
#   RETRY=1     measure again what failed or was not here      SECTIONS="compare step"   only these
# Wheels of other libraries in .whl/ (benchmarks/fetch_peers.sh) are unpacked into a folder of their own; PARTS: the folder
# with the parts of a wheel that was split.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
start=$SECONDS
dry=
if [ "${1:-}" = --dry-run ]; then
  dry=--dry-run
  shift
  out=${1:-$(mktemp -d)}
else
  out=${1:-}
  if [ -z "$out" ]; then
    out=benchmarks/results/$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || exit 1
  fi
fi
mkdir -p "$out"
status=0
if [ -n "${PACK:-}" ]; then
  pack() { tar -cf "$PACK.part" -C "$out" . && mv "$PACK.part" "$PACK"; }
  (while sleep 10; do pack; done) >/dev/null 2>&1 &
  trap "kill $!; pack" EXIT
fi
# What fails in the first call fails in every other: no driver, no C compiler for Triton's launchers, the wrong wheel.
if [ -z "$dry" ] && ! "$PYTHON" -c '
import torch
from var_kernels import linear_logprob
hidden, weight = (torch.randn(n, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for n in (8, 512))
linear_logprob(hidden, weight, torch.arange(8, device="cuda")).sum().backward()
torch.cuda.synchronize()
'; then
  echo "the first call on the GPU failed: nothing was measured" >&2
  exit 1
fi
if [ -z "$dry" ] && [ ! -e "$out/tests.finished" ]; then
  cat "$out/tests.csv" > "$out/tests.done" 2>/dev/null
  # Others may import what is not there.
  files=$(grep -lE 'mark\.gpu|def test.*\btarget\b' tests/test_*.py)
  GPU_TESTS_CSV="$out/tests.csv" GPU_TESTS_DONE="$out/tests.done" timeout -k 10 "${TEST_SECONDS:-150}" \
    "$PYTHON" -m pytest -p no:cacheprovider -p benchmarks.gpu_tests -n "${JOBS:-6}" --dist loadfile \
    -q --tb=short --show-capture=no --continue-on-collection-errors -m gpu $files > "$out/tests.log" 2>&1
  tested=$?
  case $tested in
    0 | 5) touch "$out/tests.finished" ;;
    124 | 137) echo "tests: cut off after ${TEST_SECONDS:-150} s; the next call goes on" ;;
    *) status=1 ;;
  esac
  grep -E '^(FAILED|ERROR) ' "$out/tests.log" | cut -c1-200 | head -n 30
  tail -n 1 "$out/tests.log"
  rm -f "$out/tests.done"
fi
if [ -z "$dry" ] && ls .whl/*.whl >/dev/null 2>&1; then
  peers=$(mktemp -d)
  for first in "${PARTS:-.whl-parts}"/*.part00; do
    [ -e "$first" ] && cat "${first%00}"* > "$peers/$(basename "${first%.part00}")"
  done
  # Unpacked, not installed: several of them share folders, which pip's --target would replace.
  for wheel in .whl/*.whl "$peers"/*.whl; do
    [ ! -e "$wheel" ] || "$PYTHON" -m zipfile -e "$wheel" "$peers" || echo "$wheel: not unpacked"
  done
  # Its .pth file is not read from there.
  export PYTHONPATH=$PYTHONPATH:$peers:$peers/nvidia_cutlass_dsl/dsl_packages
fi
# Fragments of one provider's memory must not make the next one fail.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
left=$("$PYTHON" -c "print(max(1, ${MINUTES:-9} - ($SECONDS - $start) / 60 - 0.5))")
"$PYTHON" benchmarks/gpu_bench.py $dry --out "$out" --minutes "$left" ${RETRY:+--retry} ${SECTIONS:+--sections $SECTIONS} || status=1
"$PYTHON" benchmarks/gpu_report.py "$out" || status=1
exit $status
