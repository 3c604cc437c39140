"""Time of forward and backward of the loss, plain against fused, on a GPU or a CPU: ``make bench``.

``--benchmark-json FILE`` also holds the peak memory of each, in MiB above the inputs.
"""

import pytest
import torch
import torch.nn.functional as F

from var_kernels import linear_logprob, linear_weighted_nll
from var_kernels.measure import peak_extra_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"cpu": [(1024, 512, 32_000), (2048, 256, 50_257)], "cuda": [(8192, 2048, 128_256), (8192, 896, 151_936)]}
# Holds the fp32 dW of one pass in bf16.
WORKSPACE_MB = 256 if DEVICE == "cpu" else 3072
SHAPES = {" x ".join(map(str, shape)): shape for shape in SIZES[DEVICE]}


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


TRAINING = {"plain": plain, "fused, one pass": one_pass, "fused, two passes": two_passes}
SCORING = {"plain": plain_forward, "fused": forward_only}


def measure(benchmark, step, inputs):
    def run():
        for leaf in inputs[:2]:
            leaf.grad = None
        step(*inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    run()
    for leaf in inputs[:2]:
        leaf.grad = None
    benchmark.extra_info["peak_mib"] = round(peak_extra_bytes(run, DEVICE) / 2**20, 1)
    benchmark.pedantic(run, rounds=5 if DEVICE == "cpu" else 20, warmup_rounds=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("provider", TRAINING.values(), ids=TRAINING.keys())
def test_forward_and_backward(benchmark, provider, shape, dtype):
    benchmark.group = f"forward and backward, N x D x V = {' x '.join(map(str, shape))}, {dtype}"
    measure(benchmark, provider, problem(shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("provider", SCORING.values(), ids=SCORING.keys())
def test_forward(benchmark, provider, shape, dtype):
    benchmark.group = f"log-probs alone, N x D x V = {' x '.join(map(str, shape))}, {dtype}"
    measure(benchmark, provider, problem(shape, dtype))


@pytest.mark.parametrize("provider", [plain, two_passes], ids=["plain", "fused"])
def test_frozen_head(benchmark, provider):
    shape = SIZES[DEVICE][0]
    benchmark.group = f"frozen head, forward and backward, N x D x V = {' x '.join(map(str, shape))}, fp32"
    measure(benchmark, provider, problem(shape, torch.float32, frozen=True))
