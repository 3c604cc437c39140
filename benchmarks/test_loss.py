"""Time and memory of forward and backward of the loss, plain against fused, on a GPU or a CPU.

make bench [ARGS="--shape 1024,1024,32000"]
"""

import functools
import time

import pytest
import torch
import torch.nn.functional as F

from var_kernels import linear_logprob, linear_weighted_nll
from var_kernels.measure import peak_extra_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Tokens, hidden size, vocabulary.
SHAPES = (
    [(8192, 2048, 128_256), (8192, 896, 151_936)] if DEVICE == "cuda" else [(1024, 512, 32_000), (2048, 256, 50_257)]
)
# Holds the fp32 dW of one pass in bf16.
WORKSPACE_MB = 256 if DEVICE == "cpu" else 3072
ROUNDS = 5 if DEVICE == "cpu" else 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def problem(shape, dtype, frozen=False):
    n, d, v = shape
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, device=DEVICE) * 0.05).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(0, v, (n,), device=DEVICE)
    return hidden, weight, labels, torch.rand(n, device=DEVICE)


def plain(hidden, weight, labels, token_weight):
    """What transformers does: all logits, upcast to fp32, cross-entropy, then the weights."""
    nll = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
    (nll * token_weight).sum().backward()


def as_called(hidden, weight, labels, token_weight):
    linear_weighted_nll(hidden, weight, labels, token_weight).backward()


def one_pass(hidden, weight, labels, token_weight):
    linear_weighted_nll(hidden, weight, labels, token_weight, engine="one_pass", workspace_mb=WORKSPACE_MB).backward()


def two_passes(hidden, weight, labels, token_weight):
    (-token_weight * linear_logprob(hidden, weight, labels)).sum().backward()


def forward_only(hidden, weight, labels, _):
    with torch.no_grad():
        linear_logprob(hidden, weight, labels)


def plain_forward(hidden, weight, labels, _):
    with torch.no_grad():
        F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")


KINDS = {
    "loss and gradients": {
        "plain": plain,
        "fused, as called": as_called,
        f"fused, one pass, {WORKSPACE_MB} MiB": one_pass,
        "fused, any loss of log-probs": two_passes,
    },
    "log-probs alone": {"plain": plain_forward, "fused": forward_only},
    "frozen head": {"plain": plain, "fused": two_passes},
}


@functools.cache
def measured(kind: str, shape: tuple, dtype: str) -> dict[str, tuple[list[float], float]]:
    """Provider -> seconds of each round, MiB. They take turns, so that a busy minute falls on all of them."""
    inputs = problem(shape, DTYPES[dtype], frozen=kind == "frozen head")

    def run(step) -> float:
        for leaf in inputs[:2]:
            leaf.grad = None
        start = time.perf_counter()
        step(*inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    peaks, seconds = {}, {name: [] for name in KINDS[kind]}
    for name, step in KINDS[kind].items():
        run(step)
        for leaf in inputs[:2]:
            leaf.grad = None
        peaks[name] = peak_extra_bytes(lambda step=step: run(step), DEVICE) / 2**20
    for _ in range(ROUNDS):
        for name, step in KINDS[kind].items():
            seconds[name].append(run(step))
    return {name: (seconds[name], peaks[name]) for name in peaks}


class Replay:
    """The clock of pytest-benchmark, which runs one provider after the other: it reads the times of ``measured``."""

    readings: list[float] = []  # noqa: RUF012

    def __call__(self) -> float:
        return self.readings.pop(0) if self.readings else time.perf_counter()


REPLAY = Replay()
CASES = [(kind, name) for kind, providers in KINDS.items() for name in providers]


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("kind", "provider"), CASES, ids=": ".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss(benchmark, kind, provider, shape, dtype):
    seconds, peak = measured(kind, shape, dtype)[provider]
    benchmark.group = f"{kind}, N x D x V = {' x '.join(map(str, shape))}, {dtype}"
    benchmark.name = f"{provider:<30}{peak:>10,.0f} MiB"
    benchmark.extra_info["peak_mib"] = round(peak, 1)
    REPLAY.readings += [reading for second in seconds for reading in (0.0, second)]
    benchmark.pedantic(lambda: None, rounds=len(seconds))
    assert REPLAY.readings == []
