"""Seconds that tell whether a GPU can be measured here: one small call of each kind of kernel, checked against fp64.

    python benchmarks/gpu_probe.py

The name of the GPU goes to standard output, the rest to standard error. Exit status 3: this Python has no torch that
sees a GPU; 1: the first call fails, and so would every other; else 0, with a line for each kind that fails or is wrong.
"""

import math
import sys
import time
from pathlib import Path

NO_GPU, BROKEN = 3, 1
# Of bf16 gradients, relative; of fp32 log-probs and losses, absolute or relative.
LIMITS = {"bf16": 1e-2, "fp32": 1e-5}
N, D = 300, 64
DEVICE = "cuda"


def obstacle() -> str | None:
    """Why this Python cannot reach a GPU, in a line."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch ({error})"
    named = f"{sys.executable}: torch {torch.__version__}"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"{named} is a build for CPUs; install one for CUDA or ROCm"
    if not torch.cuda.is_available():
        return f"{named} is a build for GPUs, and no GPU answers; nvidia-smi shows whether the driver is there"
    try:
        import var_kernels  # noqa: F401
    except ImportError as error:
        return f"{named}: var_kernels does not import ({error})"
    return None


def _problem(v: int):
    import torch

    generator = torch.Generator().manual_seed(v)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, torch.bfloat16)

    hidden, weight = randn(N, D).requires_grad_(), (randn(v, D) * 0.25).requires_grad_()
    labels = torch.randint(0, v, (N,), generator=generator).to(DEVICE)
    labels[::3] = -100
    return hidden, weight, labels, torch.rand(N, generator=generator).to(DEVICE)


def _difference(got, truth) -> float:
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()


def _gradients(loss_of, v: int) -> dict[str, float]:
    """Errors of a loss sum_n w_n (-logp_n) and of its gradients."""
    from var_kernels.reference import linear_logprob_ref

    hidden, weight, labels, token_weight = _problem(v)
    loss = loss_of(hidden, weight, labels, token_weight)
    loss.backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = -(linear_logprob_ref(*exact, labels) * token_weight).sum()
    truth.backward()
    return {
        "fp32 loss": _difference(loss.detach(), truth.detach()),
        "bf16 dhidden": _difference(hidden.grad, exact[0].grad),
        "bf16 dweight": _difference(weight.grad, exact[1].grad),
    }


def two_passes() -> dict[str, float]:
    """V odd: scalar loads, a ragged last slice."""
    from var_kernels import linear_logprob

    def loss(hidden, weight, labels, token_weight):
        return -(linear_logprob(hidden, weight, labels, workspace_mb=0.5) * token_weight).sum()

    return _gradients(loss, 1003)


def one_pass() -> dict[str, float]:
    """Several chunks: dW is written by the first and added to by the others."""
    from var_kernels import linear_weighted_nll

    v = 1024

    def loss(*tensors):
        labelled = N * 2 // 3
        # All rows' exponentials and sums take 3/4 of a budget, a tile the rest: a little less.
        budget = labelled * (2 * v + 4 * D) * 4 / 3 * 0.97
        return linear_weighted_nll(*tensors, engine="one_pass", workspace_mb=budget / 2**20)

    return _gradients(loss, v)


def fused_forward() -> dict[str, float]:
    import torch

    from var_kernels import linear_logprob
    from var_kernels.reference import linear_logprob_ref

    hidden, weight, labels, _ = _problem(1024)
    with torch.no_grad():
        logp = linear_logprob(hidden, weight, labels, workspace_mb=0)
        truth = linear_logprob_ref(hidden.double(), weight.double(), labels)
    return {"fp32 logp": _difference(logp, truth)}


def weights() -> dict[str, float]:
    import torch

    from var_kernels import var_weights
    from var_kernels.reference import var_weights_ref

    rewards, ref_logp = torch.rand(32, device=DEVICE), -torch.rand(32, device=DEVICE)
    found = var_weights(rewards, ref_logp, lam=0.5, normalizer="batch", reference="sum")
    truth = var_weights_ref(rewards.cpu(), ref_logp.cpu(), lam=0.5, normalizer="batch", reference="sum")[0]
    return {"fp32 weight": _difference(found.weight.cpu(), truth)}


# The first two carry every measurement.
PARTS = {
    "two passes": two_passes,
    "one pass, several chunks": one_pass,
    "fused forward, workspace_mb=0": fused_forward,
    "var_weights": weights,
}
ESSENTIAL = 2


def run(parts=None, say=lambda line: print(line, file=sys.stderr, flush=True)) -> int:
    """Exit status; one line a part."""
    for place, (name, part) in enumerate((parts or PARTS).items()):
        start = time.monotonic()
        try:
            errors = part()
        except Exception as error:  # whatever it is, the line says it
            say(f"  {name}: FAILED, {type(error).__name__}: {error}".replace("\n", " ")[:300])
            if place < ESSENTIAL:
                return BROKEN
            continue
        wrong = {what: error for what, error in errors.items() if not error <= LIMITS[what.split()[0]]}
        worst = max(errors.values(), key=lambda x: math.inf if math.isnan(x) else x)
        verdict = f"WRONG, {wrong}" if wrong else f"right, largest error {worst:.1g}"
        say(f"  {name}: {verdict}, {time.monotonic() - start:.1f} s")
    return 0


def main() -> int:
    why = obstacle()
    if why:
        print(why, file=sys.stderr)
        return NO_GPU
    import torch

    print(torch.cuda.get_device_name(), flush=True)
    return run()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
