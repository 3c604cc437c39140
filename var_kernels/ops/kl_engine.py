"""The engines of ``linear_token_kl``: two heads over one vocabulary, tile by tile, by the pair kernels.

divergence_pass          2 GEMMs   statistics only: rows x vocabulary slices of both heads, merged; whole rows for "jsd"
gradient_chunk_pass      4 GEMMs   a known upstream gradient, or hidden's alone: chunks of whole rows
stored_gradient_pass     2 GEMMs   the forward for any upstream gradient where the budget holds the gradient in all
                                   logits, and ...
stored_gradients         2 GEMMs   ... its backward: products of it
recomputed_gradients     4 GEMMs   backward for any upstream gradient: both heads' logits again, slice by slice
"""

from collections.abc import Callable

import torch
from torch import Tensor

from var_kernels.kernels.rows import spans
from var_kernels.ops.engines import (
    Gradients,
    add_scaled_rows,
    compute_logits,
    gradients_by_slices,
    new_cached,
    new_gradients,
    new_tile,
    rounded,
    row_products,
    token_products,
)
from var_kernels.ops.head import Head, HeadPair, Tensors
from var_kernels.ops.plan import divergence_plan, gradient_chunk_plan, recomputed_plan, stored_gradient_plan


def _tiles(pair: HeadPair, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return new_tile(pair.head, rows, columns), new_tile(pair.ref, rows, columns)


def _pair_rows(
    pair: HeadPair,
    storages: tuple[Tensor, Tensor],
    rows: slice,
    columns: slice,
    step: int,
    state_6N: Tensor,
    upstream_N: Tensor | None = None,
    out_nv: Tensor | None = None,
    **stages: bool,
) -> Tensor | None:
    """The pair kernels on one tile of each model, raw logits in its tile's dtype from GEMMs of ``step`` columns; a
    gradient is in the operands' dtype, or in the tile's beside a bias that learns.
    """
    heads = pair.head, pair.ref
    tiles = [compute_logits(head, storage, rows, columns, step) for head, storage in zip(heads, storages, strict=True)]
    # The columns' entries cancel, so they are summed before they are rounded.
    dtype = pair.head.tile if pair.head.needs.bias else pair.head.operand
    return pair.kernels.pair_rows(
        *tiles,
        state_6N[:, rows],
        pair.options,
        *[head.bias_slice(columns.start, columns.stop) for head in heads],
        **stages,
        upstream_n=None if upstream_N is None else upstream_N[rows],
        out_dtype=dtype,
        out_nv=out_nv,
    )


def divergence_pass(pair: HeadPair, merge: Callable[[Tensor, str], None] | None = None) -> Tensor:
    """The state (6, N) of every row. Peak extra memory: the budget. merge(state_6N, stage): brings in what other ranks
    have of each stage; "jsd" computes its logits for each of its two then.
    """
    state_6N, mixture = pair.empty_state(), pair.options.needs_whole_rows
    stages = ("stats", "mixture") if mixture else ("stats",)
    whole_rows = mixture and merge is None
    plan, passes = divergence_plan(pair, whole_rows), (stages,) if whole_rows else tuple((stage,) for stage in stages)
    width = plan.stored or plan.columns
    storages = _tiles(pair, plan.rows, width)
    for together in passes:
        for rows in spans(0, pair.n, plan.rows):
            for columns in spans(0, pair.v, width):
                of_stages = dict.fromkeys(together, True)
                _pair_rows(pair, storages, rows, columns, plan.columns, state_6N, **of_stages)
        if merge is not None:
            merge(state_6N, *together)
    return state_6N


def gradient_chunk_pass(pair: HeadPair, upstream_N: Tensor) -> tuple[Tensor, Tensors]:
    """Divergences (N,) and the gradients of sum_n upstream_n divergence_n, in one pass."""
    head, plan = pair.head, gradient_chunk_plan(pair)
    step, storages = plan.columns, _tiles(pair, plan.rows, pair.v)
    state_6N, gradients = pair.empty_state(), new_gradients(head, plan.rows)
    dweight_VD, dbias_V, dright_VR = gradients.of_columns(slice(0, pair.v))
    for rows in spans(0, pair.n, plan.rows):
        grad_nv = rounded(head, _whole_rows(pair, storages, rows, step, state_6N, upstream_N), dbias_V)
        (hidden_nd, left_nr), (dhidden_nd, dleft_nr) = head.of_rows(rows), gradients.of_rows(rows)
        if dhidden_nd is not None:
            _product_in_slices(head, dhidden_nd, grad_nv, step)
        row_products(head, grad_nv, 0, None, dleft_nr, step, add=True)
        token_products(head, grad_nv, hidden_nd, dweight_VD, left_nr, dright_VR, step, add=rows.start > 0)
        del grad_nv  # a copy in 16 bit would live on beside the next tile
    return pair.divergence(state_6N), gradients.like(head.tensors)


def _whole_rows(pair: HeadPair, storages, rows, step, state_6N, upstream_N, out_nv=None) -> Tensor:
    given = storages, rows, slice(0, pair.v), step, state_6N, upstream_N, out_nv
    return _pair_rows(pair, *given, stats=True, mixture=pair.options.needs_whole_rows)


def _product_in_slices(head: Head, out_nd: Tensor, grad_nv: Tensor, step: int) -> None:
    """out = grad W by ``step`` rows of W at a time: a 16-bit GEMM on a CPU packs the whole operand it is given."""
    weight_VD = head.lm_head_weight_VD
    if step >= head.v:
        head.gemm.product_into(out_nd, grad_nv, weight_VD)
        return
    total_nd = torch.zeros(out_nd.shape, dtype=torch.promote_types(out_nd.dtype, torch.float32), device=out_nd.device)
    for columns in spans(0, head.v, step):
        head.gemm.add_product(total_nd, grad_nv[:, columns], weight_VD[columns])
    out_nd.copy_(total_nd)


def stored_gradient_pass(pair: HeadPair) -> tuple[Tensor, Tensor]:
    """Divergences (N,) and d divergence_n / d logits_nv (N, V), in the operands' dtype."""
    plan = stored_gradient_plan(pair)
    step, storages, state_6N, ones_N = plan.columns, _tiles(pair, plan.rows, pair.v), pair.empty_state(), pair.ones()
    stored_NV = new_cached(pair.head, pair.v, pair.head.operand)
    for rows in spans(0, pair.n, plan.rows):
        _whole_rows(pair, storages, rows, step, state_6N, ones_N, out_nv=stored_NV[rows, : pair.v])
    return pair.divergence(state_6N), stored_NV


def stored_gradients(pair: HeadPair, stored_NV: Tensor, upstream_N: Tensor) -> Gradients:
    """Gradients of sum_n upstream_n divergence_n from what ``stored_gradient_pass`` gave."""
    head, grad_NV = pair.head, stored_NV[:, : pair.v]
    step = stored_gradient_plan(pair).columns
    upstream_N1, gradients = upstream_N.unsqueeze(1), new_gradients(head)
    if head.needs.hidden:
        _product_in_slices(head, gradients.dhidden_ND, grad_NV, step)
        gradients.dhidden_ND.mul_(upstream_N1)
    if head.needs.left:
        row_products(head, grad_NV, 0, None, gradients.dleft_NR, step, add=True)
        gradients.dleft_NR.mul_(upstream_N1)
    scaled = [None if t is None else (t * upstream_N1).to(head.operand) for t in head.of_rows(slice(0, head.n))]
    dweight_VD, dbias_V, dright_VR = gradients.of_columns(slice(0, pair.v))
    token_products(head, grad_NV, scaled[0], dweight_VD, scaled[1], dright_VR, step, add=False)
    if dbias_V is not None:
        add_scaled_rows(head, dbias_V, grad_NV, upstream_N)
    return gradients


def recomputed_gradients(pair: HeadPair, state_6N: Tensor, upstream_N: Tensor) -> Gradients:
    """Gradients of sum_n upstream_n divergence_n from what ``divergence_pass`` gave."""
    plan = recomputed_plan(pair)
    storages = _tiles(pair, plan.rows, plan.columns)

    def tile_gradient(rows: slice, columns: slice) -> Tensor:
        return _pair_rows(pair, storages, rows, columns, plan.columns, state_6N, upstream_N)

    return gradients_by_slices(pair.head, plan, tile_gradient)
