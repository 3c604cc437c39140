"""The C++ kernels against plain torch on this CPU: processor time of interleaved runs, medians, one process.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.cpu_kernels [--out FILE]

Operands: random, logits of standard deviation 3. of_the_gemms: the C++ kernels' time over that of torch.mm of the
operands alone, in their own dtype.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch

from benchmarks.cpu_machine import header, results_folder
from var_kernels import linear_logprob, linear_weighted_nll
from var_kernels.kernels import rows_native, rows_torch
from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats
from var_kernels.ops.backend import choose_backend, use_backend

RUNS = 9
BACKENDS = ("torch", "native")
COLUMNS = ("what", "shape", "dtype", "precision", "torch_ms", "native_ms", "faster", "of_the_gemms")


def medians(calls: dict, before=lambda: None) -> dict[str, float]:
    """Milliseconds of processor time of each call, the first run of each left out."""
    times = {name: [] for name in calls}
    for _ in range(RUNS + 1):
        for name, call in calls.items():
            given = before()
            start = time.process_time()
            call() if given is None else call(given)
            times[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}


def row(what: str, shape: str, dtype: str, precision: str, milliseconds: dict[str, float], gemms: float | None = None):
    plain, native = milliseconds["torch"], milliseconds["native"]
    of_the_gemms = "" if gemms is None else f"{native / gemms:.2f}"
    result = (what, shape, dtype, precision, f"{plain:.1f}", f"{native:.1f}", f"{plain / native:.2f}", of_the_gemms)
    print(*result, sep="  ", flush=True)
    return result


def row_kernels(n: int = 256, v: int = 50257):
    """The kernels over rows of logits."""
    logits_nv = torch.randn(n, v) * 3
    labels_nk = torch.randint(v, (n, 1))
    transform = LogitTransform()
    modules = {"torch": rows_torch, "native": rows_native}

    def stats(kernels, **asked):
        result = RowStats.empty(n, 1, logits_nv, **{"entropy": False, "mean": False, "argmax": False, **asked})
        kernels.row_stats(logits_nv, labels_nk, result, 0, None, transform)
        return result

    shape = f"{n} x {v}"
    yield row("row_stats", shape, "float32", "", medians({b: lambda m=m: stats(m) for b, m in modules.items()}))
    calls = {b: lambda m=m: stats(m, entropy=True) for b, m in modules.items()}
    yield row("row_stats with entropy", shape, "float32", "", medians(calls))
    coefficients = RowCoefficients(torch.full((n,), -0.1), torch.full((n, 1), 0.1))
    norms_2n = stats(rows_native).norms_2N
    for out in (torch.float32, torch.bfloat16):
        calls = {
            b: lambda x, m=m: m.row_grad(x, labels_nk, norms_2n, coefficients, 0, None, transform, out)  # noqa: B023
            for b, m in modules.items()
        }
        name = "row_grad" if out == torch.float32 else "row_grad, to bf16 in place"
        yield row(name, shape, "float32", "", medians(calls, before=logits_nv.clone))


def head(dtype: torch.dtype, precision: str, n: int = 512, d: int = 256, v: int = 32000):
    """Whole calls of a narrow head, where the kernels are not small beside the GEMMs."""
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    weight = (torch.randn(v, d) * (3 * d**-0.5)).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,))
    dlogits, leaves = torch.randn(n, v).to(dtype), (hidden, weight)
    bare_hidden, bare_weight = hidden.detach(), weight.detach()
    bare = medians(
        {
            "logits": lambda: torch.mm(bare_hidden, bare_weight.t(), out=dlogits),
            "dhidden": lambda: torch.mm(dlogits, bare_weight),
            "dweight": lambda: torch.mm(dlogits.t(), bare_hidden),
        }
    )
    backward = bare["dhidden"] + bare["dweight"]

    def forward():
        with torch.no_grad():
            linear_logprob(*leaves, labels, precision=precision)

    def one_pass():
        loss = linear_weighted_nll(*leaves, labels, None, engine="one_pass", precision=precision)
        torch.autograd.grad(loss, leaves)

    def two_passes():
        # Less than the logits: they are recomputed.
        logp = linear_logprob(*leaves, labels, precision=precision, workspace_mb=16)
        torch.autograd.grad(logp.sum(), leaves)

    def on(backend, call):
        def run():
            with use_backend(backend):
                call()

        return run

    for call, gemms in (
        (forward, bare["logits"]),
        (one_pass, bare["logits"] + backward),
        (two_passes, 2 * bare["logits"] + backward),
    ):
        result = medians({backend: on(backend, call) for backend in BACKENDS})
        name, kind = call.__name__.replace("_", " "), str(dtype).removeprefix("torch.")
        yield row(name, f"{n} x {d} x {v}", kind, f"{precision} logits", result, gemms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results_folder() / "parts.csv", help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)
    backend, detail = choose_backend(torch.device("cpu"), torch.float32)
    if backend != "native":
        parser.exit(1, f"the C++ kernels are not here: {detail}\n")
    rows = [*row_kernels(), *head(torch.float32, "fp32"), *head(torch.bfloat16, "fp32"), *head(torch.bfloat16, "fast")]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        print(header(), file=file)
        csv.writer(file).writerows([COLUMNS, *rows])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
