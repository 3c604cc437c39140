#!/usr/bin/env bash
# Everything that needs a GPU, without network: a probe, the measurements that decide defaults and bars, the GPU tests, the
# other measurements, the report. docs/gpu.md says what a first call decides.
#   benchmarks/gpu_run.sh [OUT]            OUT: benchmarks/results/<gpu name> by default
#   benchmarks/gpu_run.sh --dry-run [OUT]  the measurements and the report on tiny shapes on a CPU
# Calls go on where the last one ended: tests that passed and rows that are in OUT's CSVs are left out.
#   MINUTES=9   of the whole call      TEST_SECONDS=150   of them for the tests at most      JOBS=13   test processes
#   PACK=FILE   keep a tar of OUT there, renewed every 10 s: one file to copy back, also from a call that was cut
#   RETRY=1     measure again what failed or was not here      SECTIONS="compare step"   only these
#   PYTHON=...  the interpreter; else the first of .venv/bin/python and python3 that sees a GPU
#   WHEELS=DIR  other libraries' wheels and parts of wheels (benchmarks/fetch_peers.sh), by default in .whl and .whl-parts;
#               they are unpacked into a folder of their own
set -u
cd "$(dirname "$0")/.."
start=$SECONDS
wheels=${WHEELS:-.whl .whl-parts}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
dry=
if [ "${1:-}" = --dry-run ]; then
  dry=--dry-run
  shift
fi
candidates=(.venv/bin/python python3)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
gpu=
probed=3
probe_log=$(mktemp)

# probe: $PYTHON's GPU into $gpu, its status into $probed, what it says to standard error and $probe_log.
probe() {
  gpu=$(timeout -k 5 "${PROBE_SECONDS:-150}" "$PYTHON" benchmarks/gpu_probe.py 2>> "$probe_log")
  probed=$?
  [ $probed != 124 ] || echo "$PYTHON: the probe did not end in ${PROBE_SECONDS:-150} s" >> "$probe_log"
}

if [ -n "$dry" ]; then
  for PYTHON in "${candidates[@]}"; do
    "$PYTHON" -c 'import torch' 2>/dev/null && break
  done
  out=${1:-$(mktemp -d)}
else
  # Fragments of one provider's memory must not make the next one fail. Some machines refuse the calls that this needs.
  own=${PYTORCH_CUDA_ALLOC_CONF:-}
  export PYTORCH_CUDA_ALLOC_CONF=${own:-expandable_segments:True}
  for PYTHON in "${candidates[@]}"; do
    command -v "$PYTHON" >/dev/null || continue
    probe
    if [ $probed != 0 ] && [ -n "$gpu" ] && [ -z "$own" ]; then
      unset PYTORCH_CUDA_ALLOC_CONF
      echo "the first call failed with expandable segments: once more without" >> "$probe_log"
      probe
    fi
    [ -z "$gpu" ] || break
  done
  cat "$probe_log" >&2
  # What fails in the first call fails in every other: no driver, no C compiler for Triton's launchers, the wrong wheel.
  if [ $probed != 0 ]; then
    if [ -n "$gpu" ]; then
      echo "the first call on the GPU failed: nothing was measured" >&2
    else
      echo "no GPU, so nothing was measured; --dry-run exercises the measurements on a CPU" >&2
    fi
    exit 1
  fi
  out=${1:-benchmarks/results/$(tail -n 1 <<< "$gpu" | tr '[:upper:] ' '[:lower:]-')}
fi
mkdir -p "$out"
[ -n "$dry" ] || cat "$probe_log" >> "$out/probe.log"
echo "$PYTHON${gpu:+, $gpu, allocator: ${PYTORCH_CUDA_ALLOC_CONF:-as it is}} -> $out"
status=0
helpers=()
trap 'kill "${helpers[@]}" 2>/dev/null; [ -z "${PACK:-}" ] || pack' EXIT
if [ -n "${PACK:-}" ]; then
  pack() { tar -cf "$PACK.part" -C "$out" . && mv "$PACK.part" "$PACK"; }
  (while sleep 10; do pack; done) >/dev/null 2>&1 &
  helpers+=($!)
fi
if [ -z "$dry" ] && command -v nvidia-smi >/dev/null; then
  # Under a power limit the clocks explain a ratio.
  nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu \
    --format=csv,noheader,nounits -l 1 >> "$out/clocks.log" 2>/dev/null &
  helpers+=($!)
fi

seconds_left() { echo $((${MINUTES:-9} * 60 - (SECONDS - start) - 20)); }

# unpack_peers: the other libraries' wheels, into $peers.
peers=
unpack_peers() {
  local from folder first wheel found=
  for from in $wheels; do
    ! compgen -G "$from/*.whl*" >/dev/null || found=1
  done
  [ -n "$found" ] || return 0
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then
    echo "$wheels: for Python 3.12, which $PYTHON is not; the other libraries are left out"
    return 0
  fi
  # QuACK imports only where its path says that it is a library.
  folder=$(mktemp -d)/site-packages
  mkdir "$folder"
  for from in $wheels; do
    for first in "$from"/*.part00; do
      [ ! -e "$first" ] || cat "${first%00}"* > "$folder/$(basename "${first%.part00}")"
    done
  done
  # Unpacked, not installed: several of them share folders, which pip's --target would replace.
  for wheel in $(printf '%s/*.whl ' $wheels "$folder"); do
    [ ! -e "$wheel" ] || "$PYTHON" -m zipfile -e "$wheel" "$folder" 2>/dev/null || echo "$wheel: incomplete, left out"
  done
  rm -f "$folder"/*.whl
  # Its .pth file is not read from there.
  peers=$folder:$folder/nvidia_cutlass_dsl/dsl_packages
}

# measure RANK: what has at most this rank.
measure() {
  local seconds
  seconds=$(seconds_left)
  [ "$seconds" -gt 5 ] || return 0
  PYTHONPATH=$PYTHONPATH${peers:+:$peers} "$PYTHON" benchmarks/gpu_bench.py $dry --out "$out" --seconds "$seconds" --rank "$1" ${retry:+--retry} \
    ${SECTIONS:+--sections $SECTIONS} || status=1
  retry=
}

# gpu_tests NAME SECONDS JOBS FILES: at most so many seconds of these files' GPU tests, without those that passed before.
gpu_tests() {
  local name=$1 seconds=$2 jobs=$3 log=$out/tests-$1.log tested
  shift 3
  [ ! -e "$out/tests-$name.finished" ] || return 0
  [ "$seconds" -le "$(seconds_left)" ] || seconds=$(seconds_left)
  [ "$seconds" -gt 15 ] || return 0
  cat "$out/tests.csv" > "$out/tests.done" 2>/dev/null
  GPU_TESTS_CSV="$out/tests.csv" GPU_TESTS_DONE="$out/tests.done" timeout -k 10 "$seconds" \
    "$PYTHON" -m pytest -p no:cacheprovider -p benchmarks.gpu_tests -n "$jobs" --dist loadfile \
    -q --tb=short --show-capture=no --continue-on-collection-errors -m gpu "$@" > "$log" 2>&1
  tested=$?
  case $tested in
    0 | 5) touch "$out/tests-$name.finished" ;;
    124 | 137) echo "tests, $name: cut off after $seconds s; the next call goes on" ;;
    *) status=1 ;;
  esac
  grep -E '^(FAILED|ERROR) ' "$log" | cut -c1-200 | head -n 30
  tail -n 1 "$log"
  rm -f "$out/tests.done"
}

retry=${RETRY:-}
unpack_peers
if [ -z "$dry" ]; then
  measure 0
  gpu_tests scale 60 1 tests/test_at_scale.py
  measure 1
  # Others may import what is not there.
  gpu_tests all "${TEST_SECONDS:-150}" "${JOBS:-13}" $(grep -lE 'mark\.gpu|def test.*\btarget\b' tests/test_*.py)
fi
measure 9
"$PYTHON" benchmarks/gpu_report.py "$out" || status=1
"$PYTHON" benchmarks/gpu_plots.py "$out" || status=1
exit $status
