"""The C++ kernels against plain torch on this CPU: processor time of interleaved runs, medians, one process.

    OMP_NUM_THREADS=1 python benchmarks/cpu_kernels.py

Operands: random, logits of standard deviation 3. "bare GEMMs" are torch.mm of the operands alone, in their own dtype.
"""

import platform
import statistics
import time

import torch

from var_kernels import linear_logprob, linear_weighted_nll
from var_kernels.kernels import rows_native, rows_torch
from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats
from var_kernels.ops.backend import choose_backend, use_backend

RUNS = 9
BACKENDS = ("torch", "native")


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


def report(what: str, milliseconds: dict[str, float], beside: str = "") -> None:
    plain, native = milliseconds["torch"], milliseconds["native"]
    print(f"{what:<44} torch {plain:7.1f} ms   native {native:7.1f} ms   {plain / native:5.2f}x{beside}", flush=True)


def row_kernels(n: int = 256, v: int = 50257) -> None:
    logits_nv = torch.randn(n, v) * 3
    labels_nk = torch.randint(v, (n, 1))
    transform = LogitTransform()
    modules = {"torch": rows_torch, "native": rows_native}

    def stats(kernels, **asked):
        result = RowStats.empty(n, 1, logits_nv, **{"entropy": False, "mean": False, "argmax": False, **asked})
        kernels.row_stats(logits_nv, labels_nk, result, 0, None, transform)
        return result

    shape = f"{n} x {v} fp32"
    report(f"row_stats {shape}", medians({b: lambda m=m: stats(m) for b, m in modules.items()}))
    report(f"row_stats {shape}, entropy", medians({b: lambda m=m: stats(m, entropy=True) for b, m in modules.items()}))
    coefficients = RowCoefficients(torch.full((n,), -0.1), torch.full((n, 1), 0.1))
    lse_n = stats(rows_native).lse_N
    for out in (torch.float32, torch.bfloat16):
        calls = {
            b: lambda x, m=m: m.row_grad(x, labels_nk, lse_n, coefficients, 0, None, transform, out)  # noqa: B023
            for b, m in modules.items()
        }
        report(f"row_grad {shape} to {out}", medians(calls, before=logits_nv.clone))


def head(dtype: torch.dtype, n: int = 512, d: int = 256, v: int = 32000, precision: str = "fp32") -> None:
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
        torch.autograd.grad(linear_logprob(*leaves, labels, precision=precision).sum(), leaves)

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
        beside = f"   bare GEMMs {gemms:6.1f} ms ({result['native'] / gemms:.2f}x)"
        name = f"{call.__name__} {n} x {d} x {v} {str(dtype).removeprefix('torch.')}, {precision} logits"
        report(name, result, beside)


if __name__ == "__main__":
    torch.manual_seed(0)
    backend, detail = choose_backend(torch.device("cpu"), torch.float32)
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {backend} ({detail})")
    row_kernels()
    head(torch.float32)
    head(torch.bfloat16)
    head(torch.bfloat16, precision="fast")
