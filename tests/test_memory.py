"""Peak extra memory: the budget and the documented terms, at N * V of at least 20 budgets. Materialised logits fail."""

import pytest
import torch

from var_kernels.measure import peak_extra_bytes
from var_kernels.ops import engines, linear_logprob, linear_weighted_nll, plan

N, D, V = 2048, 64, 24_000
WORKSPACE_MB = 9
BUDGET = WORKSPACE_MB << 20
# Per-row vectors (statistics, labels, coefficients), a few dozen of 8 bytes a row at most.
ROW_VECTORS = 40 * 8 * N


def problem(dtype, frozen=()):
    torch.manual_seed(0)
    hidden = torch.randn(N, D).to(dtype).requires_grad_("hidden" not in frozen)
    weight = (torch.randn(V, D) * 0.1).to(dtype).requires_grad_("weight" not in frozen)
    labels = torch.randint(0, V, (N,))
    assert N * V * 4 >= 20 * BUDGET
    return hidden, weight, labels


def term(name, dtype):
    """fp32 accumulators and the gradients that are returned, in bytes."""
    wide = 4 if dtype == torch.bfloat16 else 0
    size = dtype.itemsize
    return {
        "forward": 0,
        "two passes": N * D * (wide + size) + V * D * size,
        "one pass": (N * D + V * D) * size,
        "frozen head": 2 * N * D * size,
    }[name]


def run(name, hidden, weight, labels):
    if name == "forward":
        with torch.no_grad():
            return linear_logprob(hidden, weight, labels, return_entropy=True, workspace_mb=WORKSPACE_MB)
    if name == "one pass":
        budget = WORKSPACE_MB + (V * D * 4 / 2**20 if weight.dtype == torch.bfloat16 else 0)
        loss = linear_weighted_nll(hidden, weight, labels, None, workspace_mb=budget, engine="one_pass")
    else:
        loss = linear_logprob(hidden, weight, labels, workspace_mb=WORKSPACE_MB).sum()
    return torch.autograd.grad(loss, [t for t in (hidden, weight) if t.requires_grad])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["forward", "two passes", "one pass", "frozen head"])
def test_peak_is_bounded(name, dtype):
    hidden, weight, labels = problem(dtype, frozen=("weight",) if name == "frozen head" else ())
    peak = peak_extra_bytes(lambda: run(name, hidden, weight, labels))
    accumulator = V * D * 4 if name == "one pass" and dtype == torch.bfloat16 else 0
    bound = BUDGET + term(name, dtype) + accumulator + ROW_VECTORS
    assert peak <= bound, f"{peak / 2**20:.1f} MiB above {bound / 2**20:.1f}"
    assert bound < N * V * 4 / 4, "the bound would not notice the logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["forward", "two passes", "one pass", "frozen head"])
def test_the_plan_predicts_the_peak(name, dtype, monkeypatch):
    plans = []
    for of in ("forward_plan", "one_pass_plan", "backward_plan"):
        original = getattr(engines, of)
        monkeypatch.setattr(engines, of, lambda *a, original=original: (plans.append(original(*a)), plans[-1])[1])
    hidden, weight, labels = problem(dtype, frozen=("weight",) if name == "frozen head" else ())
    peak = peak_extra_bytes(lambda: run(name, hidden, weight, labels))
    predicted = max(plan.predicted for plan in plans)
    assert peak <= predicted + term(name, dtype) + ROW_VECTORS
    assert peak >= 0.7 * predicted


def test_the_bound_notices_materialised_logits(monkeypatch):
    """The same measurement over an engine that ignores its budget."""
    original = plan.plan_forward
    monkeypatch.setattr(plan, "plan_forward", lambda n, v, budget, cost: original(n, v, 1 << 40, cost))
    hidden, weight, labels = problem(torch.float32)
    peak = peak_extra_bytes(lambda: run("forward", hidden, weight, labels))
    assert peak > BUDGET + term("forward", torch.float32) + ROW_VECTORS


def test_ignored_rows_take_no_tile():
    """One row in 64 counts: the tile holds only those."""
    hidden, weight, labels = problem(torch.float32)
    labels[torch.arange(N) % 64 != 0] = -100
    peak = peak_extra_bytes(lambda: run("forward", hidden, weight, labels))
    assert peak < N // 64 * V * 4 * 2 + ROW_VECTORS


def test_peak_counts_what_is_alive_at_once():
    def step():
        first = torch.empty(2**20, dtype=torch.uint8)
        second = torch.empty(2**20, dtype=torch.uint8)
        del first
        third = torch.empty(2**21, dtype=torch.uint8)
        del second, third

    assert peak_extra_bytes(step) == 3 * 2**20
