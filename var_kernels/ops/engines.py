"""The engines: which tiles are computed in which order. No autograd here; every tensor is flat and on one device.

forward_pass      1 GEMM   statistics: rows x vocabulary slices, merged; what the budget holds is cached
exp_pass          3 GEMMs  a known per-token gradient, or 2 for hidden's alone: chunks of rows whose exponentials are
                           stored once and make every product (``row_exp``)
logit_pass        3 GEMMs  the same for entropy, several targets and fp16: whole rows of logits, overwritten by their
                           gradient
vocabulary_pass   3 GEMMs  backward for any upstream gradient: products of what was cached; logits of the others are
                           recomputed slice by slice, dW is written once
"""

from collections.abc import Callable

import torch
from torch import Tensor

from var_kernels.kernels.rows import RowCoefficients, RowStats
from var_kernels.ops.backend import fused_forward
from var_kernels.ops.head import Gradients, Head, TileStorage, spans, zero_row_ends
from var_kernels.ops.plan import Plan, backward_plan, forward_plan, one_pass_plan, operand_copies


def fill_logits(head: Head, logits_nv: Tensor, rows: slice, columns: slice, step: int | None = None) -> Tensor:
    """The raw logits of some rows and columns into a tile, from GEMMs of ``step`` columns."""
    hidden_nd, low_rank = head.upcast_rows(rows.start, rows.stop), head.left_NR is not None
    for start, stop in spans(columns.start, columns.stop, step or head.v):
        part_nv = logits_nv[:, start - columns.start : stop - columns.start]
        if low_rank:  # first, so that the large product adds to it as it ends
            low_rank_into(part_nv, head.left_NR[rows], head.right_VR[start:stop])
        head.gemm.logits_into(part_nv, hidden_nd, head.lm_head_weight_VD[start:stop], low_rank)
    return logits_nv


def low_rank_into(out_nv: Tensor, left_nr: Tensor, right_vr: Tensor) -> None:
    """out = left right^T in out's dtype, whatever the factors' is: few columns, so copies are cheap."""
    dtype = out_nv.dtype
    torch.mm(left_nr.to(dtype), right_vr.to(dtype).t(), out=out_nv)


def new_gradients(head: Head, dhidden: torch.dtype, dweight: torch.dtype) -> Gradients:
    """Memory for dhidden and dW, which are written before they are added to; sums of the others from 0."""
    needs, wide, device = head.needs, head.wide, head.hidden_ND.device

    def of(like: Tensor | None, needed: bool, create=torch.zeros, dtype: torch.dtype = wide) -> Tensor | None:
        return create(like.shape, dtype=dtype, device=device) if needed else None

    return Gradients(
        of(head.hidden_ND, needs.hidden, torch.empty, dhidden),
        of(head.lm_head_weight_VD, needs.lm_head_weight, torch.empty if head.n else torch.zeros, dweight),
        of(head.bias_V, needs.bias),
        of(head.left_NR, needs.left),
        of(head.right_VR, needs.right),
    )


def row_products(
    head: Head, tile_nc: Tensor, v_start: int, dhidden_nd, dleft_nr, step: int | None = None, *, add: bool
) -> None:
    """Sums of each row over the columns of a tile: tile W in dhidden_nd, or added to it, tile right added to dleft_nr,
    in steps of columns.
    """
    c, gemm = tile_nc.shape[1], head.gemm
    if dhidden_nd is not None:
        multiply = gemm.add_product if add else gemm.product_into
        multiply(dhidden_nd, tile_nc, head.lm_head_weight_VD[v_start : v_start + c])
    if dleft_nr is not None:
        for start, stop in spans(0, c, step or c):
            right_cr = head.right_VR[v_start + start : v_start + stop].to(head.operand)
            gemm.add_product(dleft_nr, tile_nc[:, start:stop], right_cr)


def token_products(
    head: Head, tile_nc: Tensor, hidden_nd, dweight_cd, left_nr, dright_cr, step: int | None = None, *, add: bool
) -> None:
    """Sums of each column of a tile over its rows: tile^T hidden in dweight_cd, or added to it, tile^T left added to
    dright_cr, in steps of columns.
    """
    c, gemm = tile_nc.shape[1], head.gemm
    multiply = gemm.add_product if add else gemm.product_into
    left_nr = None if dright_cr is None else left_nr.to(head.operand)
    for start, stop in spans(0, c, step or c):
        tile_cn = tile_nc[:, start:stop].t()
        if dweight_cd is not None:
            multiply(dweight_cd[start:stop], tile_cn, hidden_nd)
        if dright_cr is not None:
            gemm.add_product(dright_cr[start:stop], tile_cn, left_nr)


def add_slices(head: Head, gradients: Gradients, slices, tile_gradient: Callable[[slice, slice], Tensor]) -> None:
    """Adds what tiles give, slice of the vocabulary by slice: a slice of dW is written once. slices: (first column,
    end, rows at a time). tile_gradient(rows, columns): the gradient in the raw logits.
    """
    for v_start, v_stop, rows_at_once in slices:
        columns = slice(v_start, v_stop)
        dweight_vd, dbias_v, dright_vr = gradients.of_columns(columns)
        split = rows_at_once < head.n and dweight_vd is not None
        sums_vd = torch.empty_like(dweight_vd, dtype=head.wide) if split else dweight_vd
        for start, stop in spans(0, head.n, rows_at_once):
            rows = slice(start, stop)
            dlogits_nv = head.rounded(tile_gradient(rows, columns), dbias_v)
            hidden_nd, left_nr, dhidden_nd, dleft_nr = *head.of_rows(rows), *gradients.of_rows(rows)
            row_products(head, dlogits_nv, v_start, dhidden_nd, dleft_nr, add=True)
            token_products(head, dlogits_nv, hidden_nd, sums_vd, left_nr, dright_vr, add=start > 0)
            del dlogits_nv  # a copy in 16 bit would live on beside the next tile
        if split:
            dweight_vd.copy_(sums_vd)
        del sums_vd  # would live on beside the next slice's


def gradients_by_slices(head: Head, plan: Plan, tile_gradient: Callable[[slice, slice], Tensor]) -> Gradients:
    """Gradients from those in the raw logits of every tile, see ``add_slices``."""
    gradients = new_gradients(head, head.wide, head.operand)
    if head.needs.hidden:
        gradients.dhidden_ND.zero_()
    add_slices(head, gradients, [(*span, plan.rows) for span in spans(0, head.v, plan.columns)], tile_gradient)
    return gradients


def forward_pass(head: Head, cached_NC: Tensor | None = None, *, exp: bool = False) -> RowStats:
    """Statistics of every row; peak extra memory: the budget. Without one, logits stay in registers. ``cached_NC``
    receives the raw logits of its leading columns, or with ``exp`` their exponentials, for ``vocabulary_pass``.
    """
    if head.options.budget == 0:
        stats = head.new_stats()
        _fused_forward(head, stats)
        return stats
    stats = _start_rows(head) if exp else head.new_stats()
    cached = 0 if cached_NC is None else cached_NC.shape[1]
    plan, fused = forward_plan(head, cached), exp and head.ends_in_exp
    width = head.v if fused else plan.columns
    columns = [*spans(0, cached, width if exp else head.v), *spans(cached, head.v, width)]
    storage = head.new_tile(plan.rows, plan.columns) if not fused and (exp or cached < head.v) else None
    for start, stop in spans(0, head.n, plan.rows):
        rows, chunk = slice(start, stop), stats.rows(start, stop)
        if exp:
            _store_exp(head, storage, rows, columns, chunk, None if cached_NC is None else cached_NC[rows])
            continue
        for v_start, v_stop in columns:
            logits_nv = cached_NC[rows] if v_stop <= cached else storage.view(stop - start, v_stop - v_start)
            head.row_stats(fill_logits(head, logits_nv, rows, slice(v_start, v_stop)), rows, chunk, v_start)
    if exp:
        head.label_kernels.finish_rows(head.labels_NK.squeeze(1), stats, head.v)
    return stats


def _start_rows(head: Head) -> RowStats:
    """Statistics before the first ``row_exp``, whose pivots are the labels' logits."""
    options = head.options
    stats = RowStats.uninitialised(head.n, head.hidden_ND, mean=options.label_smoothing > 0, argmax=options.argmax)
    low_rank = None if head.left_NR is None else (head.left_NR, head.right_VR)
    operands = head.hidden_ND, head.lm_head_weight_VD, head.bias_V, low_rank, head.labels_NK.squeeze(1)
    head.label_kernels.start_rows(*operands, stats, options.transform, head.gathered)
    return stats


def _store_exp(
    head: Head,
    storage: TileStorage | None,
    rows: slice,
    columns,
    stats: RowStats,
    exp_nc: Tensor | None,
    first: int = 0,
) -> None:
    """``row_exp`` of some rows over spans of columns: statistics, and the exponentials of as many as exp_nc holds from
    column ``first`` on; through tiles of logits in ``storage``, or (None) as their GEMM ends.
    """
    c = 0 if exp_nc is None else exp_nc.shape[1]
    for v_start, v_stop in columns:
        out_nv = exp_nc[:, v_start - first : v_stop - first] if v_stop - first <= c else None
        earlier_nc = exp_nc[:, : v_start - first] if c and v_start > first else None
        if storage is None:
            head.product_exp(slice(v_start, v_stop), rows, stats, out_nv, earlier_nc)
        else:
            logits_nv = storage.view(rows.stop - rows.start, v_stop - v_start)
            fill_logits(head, logits_nv, rows, slice(v_start, v_stop))
            head.row_exp(logits_nv, rows, stats, v_start, out_nv, earlier_nc)


def _fused_forward(head: Head, stats: RowStats) -> None:
    """GEMM and statistics in one kernel."""
    kernel = fused_forward(head.options.backend)
    if kernel is None:
        raise ValueError(
            f"workspace_mb must be positive on backend {head.options.backend!r}, got 0; only 'triton' (a GPU, operands "
            "of 16 or 32 bit) keeps logits in registers; pass None for the default"
        )
    kernel(head.hidden_ND, head.lm_head_weight_VD, head.bias_V, head.labels_NK, stats, head.options.transform)


CoefficientsOf = Callable[[slice, RowStats], RowCoefficients]


def one_pass(head: Head, coefficients_of: CoefficientsOf) -> tuple[RowStats, Gradients]:
    """Statistics and gradients in one pass; ``coefficients_of(rows, their finished statistics)`` gives the rows'
    gradient.
    """
    return (exp_pass if head.stores_exp else logit_pass)(head, coefficients_of)


def exp_pass(head: Head, coefficients_of: CoefficientsOf | None) -> tuple[RowStats, Gradients]:
    """``one_pass`` over chunks of rows whose exponentials E are stored: the gradient in the logits is scale_n E_nv, but
    for the label's own entry, which joins in fp32. None: what ``frozen_gradient`` begins with, in place of dhidden.
    """
    stats, plan, wide = _start_rows(head), one_pass_plan(head), head.wide
    gradients = new_gradients(head, head.operand, wide if plan.rows < head.n else head.operand)
    slope, whole_rows = head.options.transform.slope, head.needs.whole_rows
    smooth = head.options.label_smoothing > 0 and coefficients_of is not None
    weight_sum_D = head.lm_head_weight_VD.sum(0, dtype=wide) if smooth else None
    stored = head.new_exp(plan.rows, plan.stored)
    storage, width = None, head.v
    if not head.ends_in_exp:
        storage, width = head.new_tile(plan.rows, plan.columns), plan.columns
    sums_nd = None
    if head.needs.hidden and wide != head.operand:
        sums_nd = torch.empty(plan.rows, head.d, dtype=wide, device=head.hidden_ND.device)
    for start, stop in spans(0, head.n, plan.rows):
        rows, chunk = slice(start, stop), stats.rows(start, stop)
        dhidden_nd, dleft_nr = gradients.of_rows(rows)
        sum_nd = dhidden_nd if sums_nd is None else sums_nd[: stop - start]
        for first, last in spans(0, head.v, plan.stored):
            exp_nv = stored.view(stop - start, last - first)
            before_n = chunk.max_N.clone() if first else None
            _store_exp(head, storage, rows, spans(first, last, width), chunk, exp_nv, first)
            zero_row_ends(exp_nv)
            if first:
                _follow_pivots(before_n, chunk.max_N, sum_nd, dleft_nr)
            if not whole_rows:
                row_products(head, exp_nv, first, sum_nd, dleft_nr, add=first > 0)
        head.label_kernels.finish_rows(head.labels_NK[rows].squeeze(1), chunk, head.v)
        constant = None
        if coefficients_of is None:
            scales = slope / chunk.sumexp_N, None
        else:
            coefficients = coefficients_of(rows, chunk)
            scales = _row_scales(head, rows, coefficients, chunk.of_label)
            if smooth:
                constant = coefficients.constant_N * slope, weight_sum_D
        if whole_rows:
            scaled_nd = torch.empty_like(head.hidden_ND[rows]) if dhidden_nd is None else dhidden_nd
            _add_token_sums(head, gradients, exp_nv, rows, scales, scaled_nd, plan.columns, add=start > 0)
            row_products(head, exp_nv, 0, sum_nd, dleft_nr, add=False)
        _end_row_sums(head, gradients, rows, scales, sum_nd, head.v, constant)
    return stats, gradients


def _row_scales(head: Head, rows: slice, coefficients: RowCoefficients, of_label) -> tuple[Tensor, Tensor]:
    """The factor of the exponentials in the gradient in the raw logits, and the label's entry of it, (n,) each.
    of_label: ``RowStats.of_label`` of these rows.
    """
    labels_n, entry_n = head.labels_NK[rows].squeeze(1), coefficients.label_NK.squeeze(1)
    given = coefficients.prob_N, entry_n, *of_label[1:], head.v, head.options.transform
    return head.label_kernels.row_scales(labels_n, *given)


def frozen_gradient(head: Head, others_ND: Tensor, of_label, coefficients: RowCoefficients) -> Tensor:
    """dhidden for any coefficients, without a product: prob sum_{v != y} p_v W_v (``others_ND``, of ``exp_pass``), with
    the label's vector in fp32, and the smoothing's sum of all.
    """
    _, label_N = _row_scales(head, slice(0, head.n), coefficients, of_label)
    dhidden_ND, constant_N = torch.empty_like(others_ND), coefficients.constant_N
    label, constant = (head.lm_head_weight_VD, head.labels_NK.squeeze(1), label_N), None
    if constant_N is not None:
        weight_sum_D = head.lm_head_weight_VD.sum(0, dtype=head.wide)
        constant = constant_N * head.options.transform.slope, weight_sum_D
    head.label_kernels.combine_rows(dhidden_ND, others_ND, coefficients.prob_N, label, constant, head.gathered)
    return dhidden_ND


def _follow_pivots(before_n: Tensor, pivot_n: Tensor, *sums: Tensor | None) -> None:
    """Sums over exponentials of earlier columns, after their rows' pivots were raised."""
    raised_n = pivot_n != before_n
    # A CPU tensor is read for nothing.
    if pivot_n.device.type == "cpu" and not raised_n.any():
        return
    decay_n1 = (before_n - pivot_n).exp().where(raised_n, 1.0).unsqueeze(1)
    for sum_nx in sums:
        if sum_nx is not None:
            sum_nx.mul_(decay_n1)


def _end_row_sums(
    head: Head,
    gradients: Gradients,
    rows: slice,
    scales: tuple[Tensor, Tensor | None],
    sum_nd: Tensor | None,
    c: int,
    constant: tuple[Tensor, Tensor] | None = None,
) -> None:
    """They become gradients: scaled, with the vector of a label among the c leading columns (if any)."""
    (scale_n, label_n), labels_n = scales, head.labels_NK[rows].squeeze(1)
    dhidden_nd = None if gradients.dhidden_ND is None else gradients.dhidden_ND[rows]
    dleft_nr = None if gradients.dleft_NR is None else gradients.dleft_NR[rows]
    if sum_nd is not None and sum_nd.dtype == dhidden_nd.dtype:
        sum_nd = dhidden_nd
    for out_nx, sum_nx, matrix_VX, more in (
        (dhidden_nd, sum_nd, head.lm_head_weight_VD, constant),
        (dleft_nr, dleft_nr, head.right_VR, None),
    ):
        if out_nx is not None:
            label = None if label_n is None else (matrix_VX[:c], labels_n, label_n)
            head.label_kernels.combine_rows(out_nx, sum_nx, scale_n, label, more, head.gathered)


def _add_token_sums(
    head: Head,
    gradients: Gradients,
    exp_nc: Tensor,
    rows: slice,
    scales: tuple[Tensor, Tensor],
    scaled_nd: Tensor | None,
    step: int,
    *,
    add: bool,
) -> None:
    """What each vocabulary entry sums over the rows, of the leading columns that exp_nc holds: dW, dbias and dright.
    scaled_nd: memory for scale_n hidden_n.
    """
    (scale_n, label_n), c, kernels = scales, exp_nc.shape[1], head.label_kernels
    segments = head.labels_NK[rows].squeeze(1).sort(stable=True)  # the labels in order, and the row of each
    (hidden_nd, left_nr), (dweight_cd, dbias_c, dright_cr) = head.of_rows(rows), gradients.of_columns(slice(0, c))
    if dweight_cd is not None:
        kernels.combine_rows(scaled_nd, hidden_nd, scale_n, gathered=head.gathered)
    scaled_nr = None if dright_cr is None else left_nr * scale_n.unsqueeze(1)
    step = step if operand_copies(head, gradient=True) else c
    token_products(head, exp_nc, scaled_nd, dweight_cd, scaled_nr, dright_cr, step, add=add)
    if dbias_c is not None:
        # In two parts, so that the scale keeps its digits in 16 bit.
        scale_n2 = torch.stack((scale_n, scale_n - scale_n.to(head.operand)), 1).to(head.operand)
        sums_c2 = scale_n.new_zeros(c, 2)
        head.gemm.add_product(sums_c2, exp_nc.t(), scale_n2)
        dbias_c += sums_c2.sum(1)
        ones_n1 = torch.ones_like(label_n).unsqueeze(1)
        kernels.add_label_rows(dbias_c.unsqueeze(1), segments, label_n, ones_n1, head.gathered)
    for total_cx, vectors_nx in ((dweight_cd, hidden_nd), (dright_cr, left_nr)):
        if total_cx is not None:
            kernels.add_label_rows(total_cx, segments, label_n, vectors_nx, head.gathered)


def logit_pass(head: Head, coefficients_of: CoefficientsOf) -> tuple[RowStats, Gradients]:
    """``one_pass`` over chunks of whole rows of logits."""
    stats, plan, wide = head.new_stats(), one_pass_plan(head), head.wide
    gradients = new_gradients(head, head.operand, wide if plan.rows < head.n else head.operand)
    storage = head.new_tile(plan.rows, head.v)
    dweight_VD, dbias_V, dright_VR = gradients.of_columns(slice(0, head.v))
    for start, stop in spans(0, head.n, plan.rows):
        rows, chunk = slice(start, stop), stats.rows(start, stop)
        logits_nv = fill_logits(head, storage.view(stop - start, head.v), rows, slice(0, head.v), plan.columns)
        head.row_stats(logits_nv, rows, chunk, 0)
        coefficients = coefficients_of(rows, chunk)
        dlogits_nv = head.rounded(head.row_grad(logits_nv, rows, chunk.norms_2N, coefficients, 0), dbias_V)
        (hidden_nd, left_nr), (dhidden_nd, dleft_nr) = head.of_rows(rows), gradients.of_rows(rows)
        row_products(head, dlogits_nv, 0, dhidden_nd, dleft_nr, plan.columns, add=False)
        token_products(head, dlogits_nv, hidden_nd, dweight_VD, left_nr, dright_VR, plan.columns, add=start > 0)
        del dlogits_nv  # a copy in 16 bit would live on beside the next chunk's logits
    return stats, gradients


def vocabulary_pass(
    head: Head,
    saved: Tensor,
    coefficients: RowCoefficients,
    cached_NC: Tensor | None = None,
    *,
    in_place: bool = True,
) -> Gradients:
    """Gradients for any per-row coefficients. saved: ``RowStats.norms_2N``, or with exponentials ``of_label``, stacked.
    Products of what ``forward_pass`` cached: exponentials, or logits, which are overwritten (or copied slice by slice);
    the other logits are recomputed once, slice by slice.
    """
    wide, exp, all_rows = head.wide, saved.shape[0] == 4, slice(0, head.n)
    cached = 0 if cached_NC is None else cached_NC.shape[1]
    gradients = new_gradients(head, wide, head.operand)
    dhidden_ND, norms_2N = gradients.dhidden_ND, saved
    if exp and cached < head.v:
        norms_2N = torch.stack((saved[0], saved[1].log()))
    if exp and cached:
        scales = _row_scales(head, all_rows, coefficients, saved)
        reused = dhidden_ND if wide == head.operand else None
        scaled_ND = torch.empty_like(head.hidden_ND) if reused is None and head.needs.lm_head_weight else reused
        _add_token_sums(head, gradients, cached_NC, all_rows, scales, scaled_ND, cached, add=False)
        del scaled_ND
        row_products(head, cached_NC, 0, dhidden_ND, gradients.dleft_NR, add=False)
        _end_row_sums(head, gradients, all_rows, scales, dhidden_ND, cached)
    elif head.needs.hidden:
        dhidden_ND.zero_()
    # (first column, end, rows at a time)
    slices = [(0, cached, head.n)] if cached and in_place and not exp else []
    if cached < head.v or not (exp or in_place):
        plan = backward_plan(head, cached)
        storage = head.new_tile(plan.rows, plan.columns)
        copied = spans(0, cached, plan.columns) if not (exp or in_place) else []
        slices += [(*span, plan.rows) for span in (*copied, *spans(cached, head.v, plan.columns))]

    def tile_gradient(rows: slice, columns: slice) -> Tensor:
        if columns.stop <= cached and in_place:
            logits_nv = cached_NC
        else:
            logits_nv = storage.view(rows.stop - rows.start, columns.stop - columns.start)
            if columns.stop <= cached:
                logits_nv.copy_(cached_NC[rows, columns])
            else:
                fill_logits(head, logits_nv, rows, columns)
        chunk = coefficients.rows(rows.start, rows.stop)
        return head.row_grad(logits_nv, rows, norms_2N[:, rows], chunk, columns.start)

    add_slices(head, gradients, slices, tile_gradient)
    return gradients
