"""Peak memory of ``linear_token_kl``: the budget and the documented terms."""

import pytest
import torch

from tests.kl_cases import BF16
from tests.products import Products
from var_kernels.kernels import rows_torch
from var_kernels.measure import peak_extra_bytes
from var_kernels.ops import linear_token_kl, plan

BIG_N, BIG_D, BIG_V, WORKSPACE_MB = 256, 32, 12_000, 4
ROW_VECTORS = 40 * 8 * BIG_N


def big(dtype):
    torch.manual_seed(0)
    tensors = [
        torch.randn(BIG_N, BIG_D),
        torch.randn(BIG_V, BIG_D),
        torch.randn(BIG_N, BIG_D),
        torch.randn(BIG_V, BIG_D),
    ]
    hidden, weight, ref_hidden, ref_weight = (t.to(dtype) for t in tensors)
    return hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight


def step(name, args):
    if name == "forward":
        with torch.no_grad():
            return linear_token_kl(*args, workspace_mb=WORKSPACE_MB)
    if name == "two passes":
        total = linear_token_kl(*args, workspace_mb=WORKSPACE_MB).sum()
    else:
        budget = WORKSPACE_MB + (BIG_V * BIG_D * 4 / 2**20 if args[1].dtype == BF16 else 0)
        total = linear_token_kl(*args, workspace_mb=budget, reduction="sum", engine="one_pass")
    return torch.autograd.grad(total, args[:2])


def bound(name, dtype):
    gradients, wide = (BIG_N + BIG_V) * BIG_D * dtype.itemsize, dtype == BF16
    extra = {
        "forward": 0,
        "two passes": gradients + wide * BIG_N * BIG_D * 4,
        "one pass": gradients + wide * BIG_V * BIG_D * 4,
    }
    return (WORKSPACE_MB << 20) + extra[name] + ROW_VECTORS


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", ["forward", "two passes", "one pass"])
def test_peak_is_bounded(name, dtype, monkeypatch):
    monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", 1 << 14)  # the temporaries of its usual blocks take 3 MiB
    args = big(dtype)
    peak = peak_extra_bytes(lambda: step(name, args))
    assert peak <= bound(name, dtype), f"{peak / 2**20:.1f} MiB above {bound(name, dtype) / 2**20:.1f}"
    assert bound(name, dtype) < 2 * BIG_N * BIG_V * 4 / 3, "the bound would not notice the logits"


def test_sums_of_dw_are_in_the_budget():
    """The policy's logits alone would fit, those of both models do not: dW is summed up over chunks."""
    args, workspace_mb = big(BF16), 18
    assert BIG_N * BIG_V * 4 < workspace_mb << 20 < BIG_N * BIG_V * 8

    def run():
        total = linear_token_kl(*args, workspace_mb=workspace_mb, reduction="sum", engine="one_pass")
        return torch.autograd.grad(total, args[:2])

    assert peak_extra_bytes(run) <= (workspace_mb << 20) + (BIG_N + BIG_V) * BIG_D * 2 + ROW_VECTORS


@pytest.mark.parametrize(("reduction", "dtype"), [("sum", BF16), ("none", BF16), ("none", torch.float32)])
def test_by_default_logits_are_computed_once(reduction, dtype):
    """64 MiB hold neither all logits nor an fp32 dW: the gradient in all logits has room in addition to them."""
    n, d, v = (300, 512, 32000) if dtype == BF16 else (500, 512, 40000)
    hidden, weight, ref_weight = (torch.randn(size, d, dtype=dtype) * 0.1 for size in (n, v, v))
    learned = hidden.requires_grad_(), weight.requires_grad_()

    def run():
        total = linear_token_kl(hidden, weight, hidden.detach(), ref_weight, reduction=reduction).sum()
        return torch.autograd.grad(total, learned)

    with Products() as products:
        peak = peak_extra_bytes(run)
    assert sum(rows * columns * k for rows, columns, k in products.sizes) == 4 * n * d * v
    budget = (64 << 20) + n * v * dtype.itemsize
    assert budget / 2 < peak <= budget + (n + v) * d * dtype.itemsize + n * d * 4 + 40 * 8 * n


def test_the_bound_notices_materialised_logits(monkeypatch):
    original = plan.plan_forward
    monkeypatch.setattr(plan, "plan_forward", lambda n, v, budget, cost: original(n, v, 1 << 40, cost))
    assert peak_extra_bytes(lambda: step("forward", big(torch.float32))) > bound("forward", torch.float32)
