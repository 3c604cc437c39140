#!/usr/bin/env bash
# Everything that needs a GPU, in one call without network: the GPU tests, the roofs and primitive timings, the comparison.
#   benchmarks/gpu_run.sh [OUT]        results go to OUT (default $OUT, else benchmarks/results/<gpu name>)
#   benchmarks/gpu_run.sh --dry-run    the same sections on tiny shapes on a CPU
# A section whose CSV is there already is skipped; one that fails is reported and the rest still runs.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ "${1:-}" = --dry-run ]; then
  exec "$PYTHON" benchmarks/gpu_bench.py --dry-run --out "${2:-$(mktemp -d)}"
fi
out=${1:-${OUT:-}}
if [ -z "$out" ]; then
  out=benchmarks/results/$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || exit 1
fi
mkdir -p "$out"
status=0
if [ ! -s "$out/tests.txt" ]; then
  timeout 240 "$PYTHON" -m pytest -p no:cacheprovider -q -m gpu tests > "$out/tests.part" 2>&1 || status=1
  tail -n 200 "$out/tests.part" > "$out/tests.txt" && rm "$out/tests.part"
  tail -n 15 "$out/tests.txt"
fi
"$PYTHON" benchmarks/gpu_bench.py --out "$out" || status=1
exit $status
