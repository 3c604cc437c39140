"""``linear_token_kl`` against its bare GEMMs and against others on a CPU: processor time, peak memory, errors.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.cpu_divergence [--shape N,D,V] [--dtype bfloat16] [--runs 3]
    TRITON_INTERPRET=1 python -m benchmarks.cpu_divergence --errors

Medians of interleaved runs in one process, forward and backward, the reference as wide as the policy, a CSV a shape and
dtype. of_gemms: over the four bare torch.mm that no side can do without: both models' logits, dH and dW. gemms: those
that ran, counted (6 where logits are computed twice). --errors: each side's value and gradients against fp64, 63 x 72 x
507; with the interpreter also those in Triton.
"""

import argparse
import csv
import os
import statistics
import time
from fnmatch import fnmatch
from pathlib import Path

import torch

from benchmarks.cpu_losses import DTYPES, SHAPES
from benchmarks.cpu_machine import header, results_folder
from benchmarks.divergences import GEMMS, MIB, SIDES, errors, obstacle, two_heads
from tests.products import Products
from var_kernels.measure import peak_extra_bytes

BARE = f"{GEMMS} bare GEMMs"
COLUMNS = ("n", "d", "v", "dtype", "side", "gemms", "ms", "of_gemms", "peak_mib", "runs")
ERROR_COLUMNS = ("dtype", "spread", "side", "value_error", "dhidden_error", "dweight_error")


def cases(shape, dtype, only: list[str]) -> dict:
    """Name -> call."""
    hidden, weight, ref_hidden, ref_weight = two_heads(*shape, dtype)
    bare = [t.detach() for t in (hidden, weight)]
    logits, ref_logits = (torch.empty(shape[0], shape[2], dtype=dtype) for _ in range(2))

    def gemms():
        torch.mm(bare[0], bare[1].t(), out=logits)
        torch.mm(ref_hidden, ref_weight.t(), out=ref_logits)
        torch.mm(logits, bare[1])
        torch.mm(logits.t(), bare[0])

    found = {BARE: gemms}
    for name, side in SIDES.items():
        if any(fnmatch(name, pattern) for pattern in only) and obstacle(name, on_cpu=True) is None:

            def call(loss=side.loss):
                torch.autograd.grad(loss(hidden, weight, ref_hidden, ref_weight), (hidden, weight))

            found[name] = call
    return found


def gemms_and_peak(call, n: int, d: int, v: int) -> tuple[float, float]:
    """Products that a call computes, in those of its shape, and its peak in MiB."""
    with Products() as products:
        peak = peak_extra_bytes(call) / MIB
    return sum(m * columns * k for m, columns, k in products.sizes) / (n * d * v), peak


def measure(shape, dtype: str, runs: int, only: list[str]) -> list[dict]:
    calls = cases(shape, getattr(torch, dtype), only)
    seconds = {name: [] for name in calls}
    costs = {name: gemms_and_peak(call, *shape) for name, call in calls.items()}  # and warms up
    for _ in range(runs):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    about = {**dict(zip("ndv", shape, strict=True)), "dtype": dtype, "runs": runs}
    return [
        {**about, "side": name, "gemms": gemms, "ms": 1e3 * middle[name], "peak_mib": peak}
        | {"of_gemms": middle[name] / middle[BARE]}
        for name, (gemms, peak) in costs.items()
    ]


def measure_errors() -> list[dict]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests import triton_interpreter

        triton_interpreter.mend()
    return [
        {"dtype": dtype, "spread": spread, "side": name}
        | errors(name, two_heads(63, 72, 507, getattr(torch, dtype), spread=spread))
        for dtype in DTYPES
        for spread in (1.0, 6.0)
        for name in SIDES
        if obstacle(name, on_cpu=True) is None
    ]


def write(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    told = [[f"{row[c]:.4g}" if isinstance(row[c], float) else row[c] for c in columns] for row in rows]
    with path.open("w", newline="") as file:
        print(header(), file=file)
        csv.writer(file).writerows([columns, *told])
    print(*(",".join(map(str, row)) for row in told), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results_folder(), help="default: %(default)s")
    parser.add_argument("--shape", help="N,D,V; all of benchmarks.cpu_losses if not given")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["*"], help="sides by patterns of their names: 'ours, *' 'plain*'")
    parser.add_argument("--errors", action="store_true")
    args = parser.parse_args()
    if args.errors:
        write(args.out / "divergence-errors.csv", ERROR_COLUMNS, measure_errors())
        return
    for shape in [tuple(map(int, args.shape.split(",")))] if args.shape else SHAPES:
        for dtype in [args.dtype] if args.dtype else DTYPES:
            rows = measure(shape, dtype, args.runs, args.only)
            write(args.out / f"divergence-{'x'.join(map(str, shape))}-{dtype}.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
