"""The engines of calls of given sizes, as their plans say: what ``var-kernels memory`` prints."""

import torch

from var_kernels.kernels.rows import LogitTransform
from var_kernels.ops.backend import choose_backend
from var_kernels.ops.head import MIB, Head, HeadOptions, HeadPair, Needs, budget_bytes
from var_kernels.ops.plan import (
    backward_plan,
    cached_columns,
    divergence_plan,
    dweight_bytes,
    forward_plan,
    gradient_chunk_plan,
    one_pass_fits,
    one_pass_plan,
    recomputed_plan,
    stored_gradient_plan,
    way_of_gradients,
    with_default_budget,
)


def _stand_in(n: int, d: int, v: int, dtype: torch.dtype, device: torch.device, workspace_mb: float | None) -> Head:
    """A call of n rows, hidden size d, vocabulary v; nothing of that size is allocated."""

    def stand_in(*shape, dtype=dtype):
        return torch.zeros(shape[-1], dtype=dtype, device=device).expand(*shape)

    backend, _ = choose_backend(device, torch.promote_types(dtype, torch.float32))
    lm_head_weight = stand_in(v, d)
    options = HeadOptions(LogitTransform(), 0.0, torch.float32, budget_bytes(workspace_mb, lm_head_weight), backend)
    needs = Needs(hidden=True, lm_head_weight=True)
    return Head(stand_in(n, d), lm_head_weight, None, stand_in(n, 1, dtype=torch.int64), options, needs)


def fused_bytes(
    n: int, d: int, v: int, dtype: torch.dtype, device: torch.device, workspace_mb: float | None = None
) -> tuple[int, int]:
    """Predicted peaks of (``linear_weighted_nll``, ``linear_logprob``), forward and backward: the plans' bytes and the
    gradients of hidden and head.
    """
    head = _stand_in(n, d, v, dtype, device, workspace_mb)
    # The plans hold a bound of the label vectors gathered at a time; a small batch gathers four numbers an entry.
    unused = max(0, head.gathered - 16 * n * d)
    gradients, cached = (n + v) * d * dtype.itemsize, cached_columns(head)
    general = forward_plan(head, cached).predicted
    if cached == v:
        element, sums = (dtype.itemsize, 0) if head.stores_exp else (head.tile.itemsize, gradients)
        forward = 0 if head.ends_in_exp else general  # its tile, where the GEMM writes one
        general = max(forward, n * v * element + gradients + sums + head.gathered - unused)
    else:
        general = max(general, backward_plan(head, cached).predicted + gradients)
    if dtype == torch.float16 or not one_pass_fits(head):
        return general, general
    plan = one_pass_plan(head)
    # The sums of dW over chunks are rounded once the tiles are gone.
    during = n * d * dtype.itemsize if plan.accumulator else gradients
    return max(plan.predicted - unused + during, plan.accumulator + gradients), general


def explain_engines(
    n: int, d: int, v: int, dtype: torch.dtype, device: torch.device, workspace_mb: float | None = None
) -> dict[str, str]:
    """Kind of call -> engine and reason, for n rows, hidden size d, vocabulary v; nothing of that size is allocated."""
    head = _stand_in(n, d, v, dtype, device, workspace_mb)
    budget, accumulator = head.options.budget / MIB, dweight_bytes(head) / MIB
    wide = f" after an fp32 dW of {accumulator:,.0f} MiB" if accumulator else ""
    if dtype == torch.float16:
        weighted = "two passes, 4 GEMMs: gradients made early underflow in fp16"
    elif one_pass_fits(head):
        plan = one_pass_plan(head)
        chunks = f"{budget:,.0f} MiB hold chunks of {plan.rows:,} of {n:,} rows{wide}"
        weighted = f"one pass, 3 GEMMs: {chunks}; {plan.predicted / MIB:,.0f} MiB predicted"
    else:
        weighted = f"two passes, 4 GEMMs: {budget:,.0f} MiB hold no useful chunk of whole rows{wide}"
    cached = cached_columns(head)
    predicted = forward_plan(head, cached).predicted
    if cached == v:
        general = f"two passes, 3 GEMMs: {budget:,.0f} MiB hold all logits for the backward"
    else:
        plan = backward_plan(head, cached)
        predicted, slices = max(predicted, plan.predicted), -(-(v - cached) // plan.columns)
        some = f"{budget:,.0f} MiB hold {cached / v:.0%} of the logits, " if cached else ""
        general = (
            f"two passes, {4 - cached / v:.3g} GEMMs: {some}the backward recomputes {slices} slices of the vocabulary"
        )
    tile = forward_plan(head)
    tiles = f"tiles of {tile.rows:,} x {tile.columns:,} logits"
    return {
        "VAR, SFT": weighted,
        "DPO": f"{general}; {predicted / MIB:,.0f} MiB predicted",
        "distill": _distillation(HeadPair(head, head, "forward", 0.5), workspace_mb is None),
        "scoring": f"forward only, 1 GEMM: {tiles}; {tile.predicted / MIB:,.0f} MiB predicted",
    }


def _distillation(pair: HeadPair, default: bool) -> str:
    """Describe the sum of ``linear_token_kl``, the teacher's head as wide as the student's."""
    pair = with_default_budget(pair, known=True) if default else pair
    way, budget = way_of_gradients(pair, "auto", known=True), f"{pair.budget / MIB:,.0f} MiB"
    if way == "known":
        plan = gradient_chunk_plan(pair)
        wide = f" after an fp32 dW of {plan.accumulator / MIB:,.0f} MiB" if plan.accumulator else ""
        said = f"one pass, 4 GEMMs: {budget} hold chunks of {plan.rows:,} of {pair.n:,} rows{wide}"
    elif way == "stored":
        plan = stored_gradient_plan(pair)
        said = f"two passes, 4 GEMMs: {budget} hold the gradient in all logits and {plan.rows:,} of {pair.n:,} rows"
    else:
        plan = max(divergence_plan(pair, whole_rows=False), recomputed_plan(pair), key=lambda plan: plan.predicted)
        said = f"two passes, 6 GEMMs: the backward recomputes tiles of {plan.rows:,} x {plan.columns:,} logits"
    return f"{said}; {plan.predicted / MIB:,.0f} MiB predicted"
