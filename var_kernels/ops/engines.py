"""The engines: which tiles are computed in which order. No autograd here; every tensor is flat and on one device.

forward_pass      1 GEMM   statistics: rows x vocabulary slices, merged; what the budget holds is cached
exp_pass          3 GEMMs  a known per-token gradient, or 2 for hidden's alone: chunks of rows whose exponentials are
                           stored once and serve every product (``row_exp``)
logit_pass        3 GEMMs  the same where exponentials do not serve (entropy, several targets, fp16): whole rows of
                           logits, overwritten by their gradient
vocabulary_pass   3 GEMMs  backward for any upstream gradient: products of what was cached; logits of the others are
                           recomputed slice by slice, dW is written once
"""

from collections.abc import Callable

import torch
from torch import Tensor

from var_kernels.kernels.rows import RowCoefficients, RowStats
from var_kernels.ops import labels
from var_kernels.ops.gemm import add_low_rank, add_product, logits_into, product_into
from var_kernels.ops.head import Gradients, Head, TileStorage, accumulation_dtype, spans, zero_row_ends
from var_kernels.ops.plan import backward_plan, forward_plan, one_pass_plan, operand_copies


def fill_logits(head: Head, logits_nv: Tensor, hidden_nd: Tensor, rows: slice, columns: slice) -> None:
    """The raw logits of some rows (``hidden_nd``, see ``Head.upcast_rows``) and columns."""
    logits_into(logits_nv, hidden_nd, head.lm_head_weight_VD[columns], head.options.backend)
    if head.left_NR is not None:
        add_low_rank(logits_nv, head.left_NR[rows], head.right_VR[columns])


def start_factor_gradients(head: Head, gradients: Gradients) -> None:
    """Zeros for the gradients of the low-rank factors that are needed."""
    dtype = accumulation_dtype(head.operand)
    if head.needs.left:
        gradients.dleft_NR = torch.zeros(head.left_NR.shape, dtype=dtype, device=head.hidden_ND.device)
    if head.needs.right:
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


def new_cached(head: Head, columns: int) -> Tensor:
    """For ``columns`` of every row: exponentials where they serve, else logits."""
    return head.new_cached(columns, head.operand if head.stores_exp else head.tile)


def forward_pass(head: Head, cached_NC: Tensor | None = None, *, exp: bool = False) -> RowStats:
    """Statistics of every row; peak extra memory: the budget. Without one, logits stay in registers. ``cached_NC``
    receives the raw logits of its leading columns, or with ``exp`` their exponentials, for ``vocabulary_pass``.
    """
    if head.options.budget == 0:
        stats = head.new_stats()
        _fused_forward(head, stats)
        return stats
    stats = labels.start(head) if exp else head.new_stats()
    cached = 0 if cached_NC is None else cached_NC.shape[1]
    tiled = exp or cached < head.v
    plan = forward_plan(head, cached)
    fused = exp and head.ends_in_exp
    width = head.v if fused else plan.columns
    columns = [*spans(0, cached, width if exp else head.v), *spans(cached, head.v, width)]
    storage = head.new_tile(plan.rows, plan.columns) if tiled and not fused else None
    for start, stop in spans(0, head.n, plan.rows):
        rows, hidden_nd = slice(start, stop), head.upcast_rows(start, stop)
        chunk = stats.rows(start, stop)
        for v_start, v_stop in columns:
            is_cached = v_stop <= cached
            if exp:
                out_nv = cached_NC[rows, v_start:v_stop] if is_cached else None
                earlier_nc = cached_NC[rows, : min(v_start, cached)] if v_start and cached else None
                _exp_tile(head, hidden_nd, rows, slice(v_start, v_stop), storage, chunk, out_nv, earlier_nc)
                continue
            logits_nv = cached_NC[rows] if is_cached else storage.view(stop - start, v_stop - v_start)
            fill_logits(head, logits_nv, hidden_nd, rows, slice(v_start, v_stop))
            head.row_stats(logits_nv, rows, chunk, v_start)
    if exp:
        labels.finish(head, slice(0, head.n), stats)
    return stats


def _exp_tile(
    head: Head,
    hidden_nd: Tensor,
    rows: slice,
    columns: slice,
    storage: TileStorage | None,
    stats: RowStats,
    out_nv: Tensor | None,
    earlier_nc: Tensor | None,
) -> None:
    """``row_exp`` of some rows and columns, through a tile of logits in ``storage``, or as their GEMM ends."""
    if storage is None:
        head.product_exp(columns, rows, stats, out_nv, earlier_nc)
        return
    logits_nv = storage.view(rows.stop - rows.start, columns.stop - columns.start)
    fill_logits(head, logits_nv, hidden_nd, rows, columns)
    head.row_exp(logits_nv, rows, stats, columns.start, out_nv, earlier_nc)


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


CoefficientsOf = Callable[[slice, RowStats], RowCoefficients]


def one_pass(head: Head, coefficients_of: CoefficientsOf) -> tuple[RowStats, Gradients]:
    """Statistics and gradients in one pass; ``coefficients_of(rows, their finished statistics)`` gives the rows'
    gradient.
    """
    run = exp_pass if head.stores_exp else logit_pass
    return run(head, coefficients_of)


def _empty_gradients(head: Head, dhidden: torch.dtype, dweight: torch.dtype) -> Gradients:
    """dhidden and dW to be written, sums of the others from 0."""
    gradients, device = Gradients(), head.hidden_ND.device
    if head.needs.hidden:
        gradients.dhidden_ND = torch.empty(head.hidden_ND.shape, dtype=dhidden, device=device)
    if head.needs.lm_head_weight:
        create = torch.empty if head.n else torch.zeros
        gradients.dweight_VD = create(head.lm_head_weight_VD.shape, dtype=dweight, device=device)
    if head.needs.bias:
        gradients.dbias_V = torch.zeros(head.v, dtype=accumulation_dtype(head.operand), device=device)
    start_factor_gradients(head, gradients)
    return gradients


def exp_pass(head: Head, coefficients_of: CoefficientsOf | None) -> tuple[RowStats, Gradients]:
    """``one_pass`` over chunks of rows whose exponentials E are stored: the gradient in the logits is scale_n E_nv, but
    for the label's own entry, which joins in fp32. None: what ``frozen_gradient`` begins with, in place of dhidden.
    """
    stats, plan, wide = labels.start(head), one_pass_plan(head), accumulation_dtype(head.operand)
    gradients = _empty_gradients(head, head.operand, wide if plan.rows < head.n else head.operand)
    smooth = head.options.label_smoothing > 0 and coefficients_of is not None
    weight_sum_D = head.lm_head_weight_VD.sum(0, dtype=wide) if smooth else None
    stored = head.new_exp(plan.rows, plan.stored)
    fused = head.ends_in_exp
    storage, width = (None, head.v) if fused else (head.new_tile(plan.rows, plan.columns), plan.columns)
    sums_nd = None
    if head.needs.hidden and wide != head.operand:
        sums_nd = torch.empty(plan.rows, head.d, dtype=wide, device=head.hidden_ND.device)
    for start, stop in spans(0, head.n, plan.rows):
        rows, hidden_nd = slice(start, stop), head.upcast_rows(start, stop)
        chunk = stats.rows(start, stop)
        sum_nd = None
        if head.needs.hidden:
            sum_nd = gradients.dhidden_ND[rows] if sums_nd is None else sums_nd[: stop - start]
        for first, last in spans(0, head.v, plan.stored):
            exp_nv = stored.view(stop - start, last - first)
            before_n = chunk.max_N.clone() if first else None
            for v_start, v_stop in spans(first, last, width):
                out_nv = exp_nv[:, v_start - first : v_stop - first]
                earlier_nc = exp_nv[:, : v_start - first] if v_start > first else None
                _exp_tile(head, hidden_nd, rows, slice(v_start, v_stop), storage, chunk, out_nv, earlier_nc)
            _zero_ends(exp_nv)
            if first:
                _follow_pivots(before_n, chunk.max_N, sum_nd, None if not head.needs.left else gradients.dleft_NR[rows])
            if not head.needs.whole_rows:
                _add_row_sums(head, gradients, exp_nv, rows, first, sum_nd, add=first > 0)
        labels.finish(head, rows, chunk)
        constant = None
        if coefficients_of is None:
            scale_n, label_n = head.options.transform.slope / chunk.sumexp_N, None
        else:
            coefficients = coefficients_of(rows, chunk)
            scale_n, label_n = labels.row_scales(head, rows, coefficients, chunk.saved_4N)
            if smooth:
                constant = coefficients.constant_N * head.options.transform.slope, weight_sum_D
        if head.needs.whole_rows:
            scaled_nd = gradients.dhidden_ND[rows] if head.needs.hidden else torch.empty_like(head.hidden_ND[rows])
            _add_token_sums(head, gradients, exp_nv, rows, (scale_n, label_n), scaled_nd, plan.columns, add=start > 0)
            _add_row_sums(head, gradients, exp_nv, rows, 0, sum_nd, add=False)
        _end_row_sums(head, gradients, rows, (scale_n, label_n), sum_nd, head.v, constant)
    return stats, gradients


def frozen_gradient(head: Head, others_ND: Tensor, saved_4N: Tensor, coefficients: RowCoefficients) -> Tensor:
    """dhidden for any coefficients, without a product: prob sum_{v != y} p_v W_v (``others_ND``, of ``exp_pass``), with
    the label's vector in fp32, and the smoothing's sum of all.
    """
    _, label_N = labels.row_scales(head, slice(0, head.n), coefficients, saved_4N)
    dhidden_ND, constant_N = torch.empty_like(others_ND), coefficients.constant_N
    label, constant = (head.lm_head_weight_VD, head.labels_NK.squeeze(1), label_N), None
    if constant_N is not None:
        weight_sum_D = head.lm_head_weight_VD.sum(0, dtype=accumulation_dtype(head.operand))
        constant = constant_N * head.options.transform.slope, weight_sum_D
    labels.combine_rows(head, dhidden_ND, others_ND, coefficients.prob_N, label, constant)
    return dhidden_ND


def _zero_ends(exp_nv: Tensor) -> None:
    if exp_nv.device.type == "cpu" and exp_nv.dtype == torch.bfloat16:
        zero_row_ends(exp_nv)


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


def _add_row_sums(
    head: Head, gradients: Gradients, exp_nc: Tensor, rows: slice, v_start: int, sum_nd: Tensor | None, *, add: bool
) -> None:
    """What each row sums over the vocabulary: E W in ``sum_nd``, E right in dleft; scaled by ``_end_row_sums``."""
    columns, backend = slice(v_start, v_start + exp_nc.shape[1]), head.options.backend
    if sum_nd is not None:
        (add_product if add else product_into)(sum_nd, exp_nc, head.lm_head_weight_VD[columns], backend)
    if gradients.dleft_NR is not None:
        add_product(gradients.dleft_NR[rows], exp_nc, head.right_VR[columns].to(head.operand), backend)


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
            labels.combine_rows(head, out_nx, sum_nx, scale_n, label, more)


def _add_token_sums(
    head: Head,
    gradients: Gradients,
    exp_nc: Tensor,
    rows: slice,
    scales: tuple[Tensor, Tensor],
    scaled_nd: Tensor,
    step: int,
    *,
    add: bool,
) -> None:
    """What each vocabulary entry sums over the rows, of the leading columns that exp_nc holds: dW, dbias and dright.
    scaled_nd: memory for scale_n hidden_n.
    """
    (scale_n, label_n), backend, c = scales, head.options.backend, exp_nc.shape[1]
    ordered = labels.segments(head.labels_NK[rows].squeeze(1))
    if gradients.dweight_VD is not None:
        hidden_nd = head.hidden_ND[rows]
        labels.combine_rows(head, scaled_nd, hidden_nd, scale_n)
        for start, stop in spans(0, c, step if operand_copies(head, gradient=True) else c):
            multiply = add_product if add else product_into
            multiply(gradients.dweight_VD[start:stop], exp_nc[:, start:stop].t(), scaled_nd, backend)
        labels.add_label_rows(head, gradients.dweight_VD[:c], ordered, label_n, hidden_nd)
    if gradients.dbias_V is not None:
        # In two parts, so that the scale keeps its digits in 16 bit.
        scale_n2 = torch.stack((scale_n, scale_n - scale_n.to(head.operand)), 1).to(head.operand)
        dbias_c2 = scale_n.new_zeros(c, 2)
        add_product(dbias_c2, exp_nc.t(), scale_n2, backend)
        gradients.dbias_V[:c] += dbias_c2.sum(1)
        labels.add_label_rows(head, gradients.dbias_V[:c, None], ordered, label_n, torch.ones_like(label_n)[:, None])
    if gradients.dright_VR is not None:
        left_nr = head.left_NR[rows]
        scaled_nr = (left_nr * scale_n.unsqueeze(1)).to(head.operand)
        add_product(gradients.dright_VR[:c], exp_nc.t(), scaled_nr, backend)
        labels.add_label_rows(head, gradients.dright_VR[:c], ordered, label_n, left_nr)


def logit_pass(head: Head, coefficients_of: CoefficientsOf) -> tuple[RowStats, Gradients]:
    """``one_pass`` over chunks of whole rows of logits."""
    stats, plan, backend = head.new_stats(), one_pass_plan(head), head.options.backend
    wide = accumulation_dtype(head.operand)
    gradients = _empty_gradients(head, head.operand, wide if plan.rows < head.n else head.operand)
    storage = head.new_tile(plan.rows, head.v)

    for start, stop in spans(0, head.n, plan.rows):
        rows = slice(start, stop)
        logits_nv = storage.view(stop - start, head.v)
        hidden_nd = head.upcast_rows(start, stop)
        for v_start, v_stop in spans(0, head.v, plan.columns):
            fill_logits(head, logits_nv[:, v_start:v_stop], hidden_nd, rows, slice(v_start, v_stop))
        chunk_stats = stats.rows(start, stop)
        head.row_stats(logits_nv, rows, chunk_stats, 0)
        coefficients = coefficients_of(rows, chunk_stats)
        dlogits_nv = head.row_grad(logits_nv, rows, chunk_stats.norms_2N, coefficients, 0, gradients.dbias_V)
        if head.needs.hidden:
            product_into(gradients.dhidden_ND[rows], dlogits_nv, head.lm_head_weight_VD, backend)
        if head.needs.lm_head_weight:
            for v_start, v_stop in spans(0, head.v, plan.columns):
                multiply = add_product if start else product_into
                dlogits_vn = dlogits_nv[:, v_start:v_stop].t()
                multiply(gradients.dweight_VD[v_start:v_stop], dlogits_vn, head.hidden_ND[rows], backend)
        add_factor_gradients(head, gradients, dlogits_nv, rows, 0, plan.columns)
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
    """Gradients for any per-row coefficients. saved: ``RowStats.norms_2N``, or with exponentials ``saved_4N``. Products
    of what ``forward_pass`` cached: exponentials, or logits, which are overwritten (or copied slice by slice); the
    other logits are recomputed once, slice by slice.
    """
    wide, backend, exp = accumulation_dtype(head.operand), head.options.backend, saved.shape[0] == 4
    cached = 0 if cached_NC is None else cached_NC.shape[1]
    overwrites = not exp and in_place
    gradients = _empty_gradients(head, wide, head.operand)
    norms_2N = torch.stack((saved[0], saved[1].log())) if exp else saved
    if exp and cached:
        scales = labels.row_scales(head, slice(0, head.n), coefficients, saved)
        reused = gradients.dhidden_ND if head.needs.hidden and wide == head.operand else None
        scaled_ND = torch.empty_like(head.hidden_ND) if reused is None and head.needs.lm_head_weight else reused
        _add_token_sums(head, gradients, cached_NC, slice(0, head.n), scales, scaled_ND, cached, add=False)
        del scaled_ND
        _add_row_sums(head, gradients, cached_NC, slice(0, head.n), 0, gradients.dhidden_ND, add=False)
        _end_row_sums(head, gradients, slice(0, head.n), scales, gradients.dhidden_ND, cached)
    elif head.needs.hidden:
        gradients.dhidden_ND.zero_()
    # (first column, end, rows at a time)
    slices = [(0, cached, head.n)] if cached and overwrites else []
    if cached < head.v or not (exp or in_place):
        plan = backward_plan(head, cached)
        storage = head.new_tile(plan.rows, plan.columns)
        copied = spans(0, cached, plan.columns) if not (exp or in_place) else []
        slices += [(*span, plan.rows) for span in (*copied, *spans(cached, head.v, plan.columns))]

    for v_start, v_stop, step in slices:
        row_spans = list(spans(0, head.n, step))
        weight_vd = head.lm_head_weight_VD[v_start:v_stop]
        dbias_v = gradients.dbias_V[v_start:v_stop] if head.needs.bias else None
        dweight_vd = None
        if head.needs.lm_head_weight:
            dweight_vd = gradients.dweight_VD[v_start:v_stop]
            if len(row_spans) != 1:
                create = torch.empty if head.n else torch.zeros
                dweight_vd = create(weight_vd.shape, dtype=wide, device=head.hidden_ND.device)
        for start, stop in row_spans:
            rows = slice(start, stop)
            columns = slice(v_start, v_stop)
            if v_stop > cached:
                logits_nv = storage.view(stop - start, v_stop - v_start)
                fill_logits(head, logits_nv, head.upcast_rows(start, stop), rows, columns)
            elif overwrites:
                logits_nv = cached_NC
            else:
                logits_nv = storage.view(stop - start, v_stop - v_start).copy_(cached_NC[rows, columns])
            chunk = coefficients.rows(start, stop)
            dlogits_nv = head.row_grad(logits_nv, rows, norms_2N[:, rows], chunk, v_start, dbias_v)
            if head.needs.hidden:
                add_product(gradients.dhidden_ND[rows], dlogits_nv, weight_vd, backend)
            if head.needs.lm_head_weight:
                multiply = add_product if start else product_into
                multiply(dweight_vd, dlogits_nv.t(), head.hidden_ND[rows], backend)
            add_factor_gradients(head, gradients, dlogits_nv, rows, v_start, v_stop - v_start)
            del dlogits_nv
        if head.needs.lm_head_weight and len(row_spans) != 1:
            gradients.dweight_VD[v_start:v_stop] = dweight_vd
    return gradients
