"""The engines: which tiles are computed in which order. No autograd here; every tensor is flat and on one device.

forward_pass      1 GEMM   statistics only: rows x vocabulary slices, merged
one_pass          3 GEMMs  token_chunk_pass, whole rows: statistics, then the gradient in the same tile (known per-token
                           gradient); 2 for a frozen head (frozen.py)
vocabulary_pass   3 GEMMs  backward for any upstream gradient: logits recomputed slice by slice, dW written once
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from var_kernels.kernels.rows import RowCoefficients, RowStats
from var_kernels.ops import frozen
from var_kernels.ops.gemm import add_low_rank, add_product, logits_into, product_into
from var_kernels.ops.head import Gradients, Head, Needs, accumulation_dtype
from var_kernels.ops.workspace import (
    MAX_CPU_BACKWARD_ROWS,
    MAX_FORWARD_ROWS,
    TilePlan,
    holds_token_chunks,
    plan_forward,
    plan_token_chunks,
    plan_vocabulary_slices,
    shortest_chunk,
    spans,
)

# Logits are kept from a 1/8 of the vocabulary on: fewer save less than 1/32 of the time.
_FEWEST_KEPT = 8
# On a CPU fresh pages cost as much as the GEMM of a narrow head.
_MIN_KEPT_DEPTH = 256


def forward_plan(head: Head) -> TilePlan:
    cost = head.tile_cost(gradient=False)
    return plan_forward(head.n, head.v, head.tile_budget(min(head.n, MAX_FORWARD_ROWS), cost), cost)


def chunk_plan(head: Head, needs: Needs) -> TilePlan:
    accumulator = dweight_bytes(head, needs)
    budget = head.options.budget - accumulator
    return plan_token_chunks(head.n, head.v, budget, head.chunk_cost(budget), accumulator)


def slice_plan(head: Head) -> TilePlan:
    cost, rows = head.tile_cost(gradient=True), head.n
    if head.options.backend == "native" and head.operand == torch.bfloat16 and rows > MAX_CPU_BACKWARD_ROWS:
        # With the fp32 sums of a slice of dW.
        cost, rows = replace(cost, column=cost.column + 4 * head.d), MAX_CPU_BACKWARD_ROWS
    return plan_vocabulary_slices(rows, head.v, head.tile_budget(rows, cost), cost)


def fill_logits(head: Head, logits_nv: Tensor, hidden_nd: Tensor, rows: slice, columns: slice) -> None:
    """The raw logits of some rows (``hidden_nd``, see ``Head.upcast_rows``) and columns."""
    logits_into(logits_nv, hidden_nd, head.lm_head_weight_VD[columns], head.options.backend)
    if head.left_NR is not None:
        add_low_rank(logits_nv, head.left_NR[rows], head.right_VR[columns])


def start_factor_gradients(head: Head, needs: Needs, gradients: Gradients) -> None:
    """Zeros for the gradients of the low-rank factors that are needed."""
    dtype = accumulation_dtype(head.operand)
    if needs.left:
        gradients.dleft_NR = torch.zeros(head.left_NR.shape, dtype=dtype, device=head.hidden_ND.device)
    if needs.right:
        gradients.dright_VR = torch.zeros(head.right_VR.shape, dtype=dtype, device=head.hidden_ND.device)


def add_factor_gradients(
    head: Head, gradients: Gradients, dlogits_nv: Tensor, rows: slice, v_start: int, step: int
) -> None:
    """What a tile that begins at column ``v_start`` adds to them, in steps whose copies the budget holds."""
    if gradients.dleft_NR is None and gradients.dright_VR is None:
        return
    backend = head.options.backend
    for start, stop in spans(0, dlogits_nv.shape[1], step):
        slice_nv, columns = dlogits_nv[:, start:stop], slice(v_start + start, v_start + stop)
        if gradients.dleft_NR is not None:
            add_product(gradients.dleft_NR[rows], slice_nv, head.right_VR[columns].to(head.operand), backend)
        if gradients.dright_VR is not None:
            add_product(gradients.dright_VR[columns], slice_nv.t(), head.left_NR[rows].to(head.operand), backend)


def kept_columns(head: Head, *, in_place: bool = True) -> int:
    """Leading vocabulary columns whose logits the budget holds from the forward to the backward, beside a tile for the
    others: that part of the GEMM is not repeated. 0 where it would save too little. in_place: the backward may
    overwrite them, so that all of them need no tile.
    """
    if _holds(head.n == 0):
        return 0
    cost, budget = head.tile_cost(gradient=True), head.options.budget
    if in_place and cost.columns_within(budget, head.n) >= head.v:
        return head.v
    if head.hidden_ND.device.type == "cpu" and head.d < _MIN_KEPT_DEPTH:
        return 0
    native = head.options.backend == "native"
    tile = head.tile_budget(min(head.n, MAX_CPU_BACKWARD_ROWS), cost) if native else budget // 4
    columns = min(head.v, cost.columns_within(budget - tile, head.n) // 64 * 64)
    return columns if _holds(columns * _FEWEST_KEPT >= head.v) else 0


def _holds(condition: bool) -> bool:
    """A comparison of sizes; False where torch.compile cannot know (the number of rows that a mask selected)."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def _beside(head: Head, kept: int) -> Head:
    """The same call with what ``kept`` columns leave of the budget."""
    if kept == 0:
        return head
    taken = head.n * kept * head.tile.itemsize
    return replace(head, options=replace(head.options, budget=head.options.budget - taken))


def forward_pass(head: Head, kept_NC: Tensor | None = None) -> RowStats:
    """Statistics of every row; peak extra memory: the budget. Without one, logits stay in registers. ``kept_NC`` takes
    the raw logits of its leading columns, for ``vocabulary_pass``.
    """
    stats = head.new_stats()
    if head.options.budget == 0:
        _fused_forward(head, stats)
        return stats
    kept = 0 if kept_NC is None else kept_NC.shape[1]
    plan = forward_plan(_beside(head, kept) if kept < head.v else head)
    columns = [*spans(0, kept, head.v), *spans(kept, head.v, plan.columns)]
    storage = head.new_tile(plan.rows, plan.columns) if kept < head.v else None
    for start, stop in spans(0, head.n, plan.rows):
        hidden_nd = head.upcast_rows(start, stop)
        for v_start, v_stop in columns:
            logits_nv = kept_NC[start:stop] if v_stop <= kept else storage.view(stop - start, v_stop - v_start)
            fill_logits(head, logits_nv, hidden_nd, slice(start, stop), slice(v_start, v_stop))
            head.row_stats(logits_nv, slice(start, stop), stats.rows(start, stop), v_start)
    return stats


def _fused_forward(head: Head, stats: RowStats) -> None:
    """GEMM and statistics in one kernel, which one backend has."""
    if head.options.backend != "triton":
        raise ValueError(
            f"workspace_mb must be positive on backend {head.options.backend!r}, got 0; only 'triton' (a GPU, operands "
            "of 16 or 32 bit) keeps logits in registers; pass None for the default"
        )
    from var_kernels.kernels.forward_triton import fused_forward

    operands = (head.hidden_ND, head.lm_head_weight_VD, head.bias_V, head.labels_NK)
    fused_forward(*operands, stats, head.options.transform)


def one_pass_fits(head: Head, needs: Needs) -> bool:
    """Whether the budget holds the fp32 dW (beyond the gradient that is returned anyway) and chunks of a useful
    length; a frozen head needs neither.
    """
    if frozen.serves(head, needs):
        return True
    budget = head.options.budget - dweight_bytes(head, needs)
    shortest = shortest_chunk(head.hidden_ND.device)
    return holds_token_chunks(head.n, head.v, budget, head.chunk_cost(budget), shortest)


def _in_one_chunk(head: Head) -> bool:
    """Whether the budget holds all rows at once: dW is then one product and needs no accumulator."""
    return head.chunk_cost(head.options.budget).rows_within(head.options.budget, head.v) >= head.n > 0


def dweight_bytes(head: Head, needs: Needs) -> int:
    """Bytes of the accumulator of dW, where it is not itself the gradient that is returned."""
    accumulation = accumulation_dtype(head.operand)
    if not needs.lm_head_weight or accumulation == head.operand or _in_one_chunk(head):
        return 0
    return head.v * head.d * accumulation.itemsize


def one_pass(
    head: Head, needs: Needs, coefficients_of: Callable[[slice, RowStats], RowCoefficients]
) -> tuple[RowStats, Gradients]:
    """Statistics and gradients in one pass; ``coefficients_of(rows, their finished statistics)`` gives the rows'
    gradient.
    """
    if frozen.serves(head, needs):
        return frozen.frozen_head_pass(head, coefficients_of)
    return token_chunk_pass(head, needs, coefficients_of)


def token_chunk_pass(
    head: Head, needs: Needs, coefficients_of: Callable[[slice, RowStats], RowCoefficients]
) -> tuple[RowStats, Gradients]:
    """``one_pass`` over chunks of whole rows."""
    stats = head.new_stats()
    gradients, backend = Gradients(), head.options.backend
    plan = chunk_plan(head, needs)
    slice_width = head.weight_slice(head.options.budget - dweight_bytes(head, needs))
    storage = head.new_tile(plan.rows, head.v)
    accumulation = accumulation_dtype(head.operand)
    if needs.hidden:
        gradients.dhidden_ND = torch.empty_like(head.hidden_ND, memory_format=torch.contiguous_format)
    if needs.lm_head_weight:
        dtype = accumulation if plan.rows < head.n else head.operand
        create = torch.empty if head.n else torch.zeros
        gradients.dweight_VD = create(head.lm_head_weight_VD.shape, dtype=dtype, device=head.hidden_ND.device)
    if needs.bias:
        gradients.dbias_V = torch.zeros(head.v, dtype=accumulation, device=head.hidden_ND.device)
    start_factor_gradients(head, needs, gradients)

    for start, stop in spans(0, head.n, plan.rows):
        rows = slice(start, stop)
        logits_nv = storage.view(stop - start, head.v)
        hidden_nd = head.upcast_rows(start, stop)
        for v_start, v_stop in spans(0, head.v, slice_width):
            fill_logits(head, logits_nv[:, v_start:v_stop], hidden_nd, rows, slice(v_start, v_stop))
        chunk_stats = stats.rows(start, stop)
        head.row_stats(logits_nv, rows, chunk_stats, 0)
        coefficients = coefficients_of(rows, chunk_stats)
        dlogits_nv = head.row_grad(logits_nv, rows, chunk_stats.lse_N, coefficients, 0, gradients.dbias_V)
        if needs.hidden:
            product_into(gradients.dhidden_ND[rows], dlogits_nv, head.lm_head_weight_VD, backend)
        if needs.lm_head_weight:
            for v_start, v_stop in spans(0, head.v, slice_width):
                multiply = add_product if start else product_into
                dlogits_vn = dlogits_nv[:, v_start:v_stop].t()
                multiply(gradients.dweight_VD[v_start:v_stop], dlogits_vn, head.hidden_ND[rows], backend)
        add_factor_gradients(head, gradients, dlogits_nv, rows, 0, slice_width)
        del dlogits_nv  # a copy in 16 bit would live on beside the next chunk's logits
    return stats, gradients


def vocabulary_pass(
    head: Head,
    needs: Needs,
    lse_N: Tensor,
    coefficients: RowCoefficients,
    kept_NC: Tensor | None = None,
    *,
    in_place: bool = True,
) -> Gradients:
    """Gradients for any per-row coefficients; logits are recomputed once, slice by slice, but for those that
    ``forward_pass`` kept, which are overwritten, or copied slice by slice.
    """
    accumulation, backend = accumulation_dtype(head.operand), head.options.backend
    kept = 0 if kept_NC is None else kept_NC.shape[1]
    # (first column, end, rows at a time)
    slices = [(0, kept, head.n)] if kept and in_place else []
    if kept < head.v or not in_place:
        plan = slice_plan(_beside(head, kept))
        storage = head.new_tile(plan.rows, plan.columns)
        copied = [] if in_place else spans(0, kept, plan.columns)
        slices += [(*span, plan.rows) for span in (*copied, *spans(kept, head.v, plan.columns))]
    gradients = Gradients()
    if needs.hidden:
        gradients.dhidden_ND = torch.zeros(head.hidden_ND.shape, dtype=accumulation, device=head.hidden_ND.device)
    if needs.lm_head_weight:
        gradients.dweight_VD = torch.empty_like(head.lm_head_weight_VD, memory_format=torch.contiguous_format)
    if needs.bias:
        gradients.dbias_V = torch.zeros(head.v, dtype=accumulation, device=head.hidden_ND.device)
    start_factor_gradients(head, needs, gradients)

    for v_start, v_stop, step in slices:
        row_spans = list(spans(0, head.n, step))
        weight_vd = head.lm_head_weight_VD[v_start:v_stop]
        dbias_v = gradients.dbias_V[v_start:v_stop] if needs.bias else None
        dweight_vd = None
        if needs.lm_head_weight:
            dweight_vd = gradients.dweight_VD[v_start:v_stop]
            if len(row_spans) != 1:
                create = torch.empty if head.n else torch.zeros
                dweight_vd = create(weight_vd.shape, dtype=accumulation, device=head.hidden_ND.device)
        for start, stop in row_spans:
            rows = slice(start, stop)
            columns = slice(v_start, v_stop)
            if v_stop > kept:
                logits_nv = storage.view(stop - start, v_stop - v_start)
                fill_logits(head, logits_nv, head.upcast_rows(start, stop), rows, columns)
            elif in_place:
                logits_nv = kept_NC
            else:
                logits_nv = storage.view(stop - start, v_stop - v_start).copy_(kept_NC[rows, columns])
            chunk = coefficients.rows(start, stop)
            dlogits_nv = head.row_grad(logits_nv, rows, lse_N[rows], chunk, v_start, dbias_v)
            if needs.hidden:
                add_product(gradients.dhidden_ND[rows], dlogits_nv, weight_vd, backend)
            if needs.lm_head_weight:
                multiply = add_product if start else product_into
                multiply(dweight_vd, dlogits_nv.t(), head.hidden_ND[rows], backend)
            add_factor_gradients(head, gradients, dlogits_nv, rows, v_start, v_stop - v_start)
            del dlogits_nv
        if needs.lm_head_weight and len(row_spans) != 1:
            gradients.dweight_VD[v_start:v_stop] = dweight_vd
    return gradients
