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
from dataclasses import dataclass

import torch
from torch import Tensor

from var_kernels.kernels.rows import RowCoefficients, RowStats, aligned, spans
from var_kernels.ops.backend import fused_forward
from var_kernels.ops.head import Head, Tensors
from var_kernels.ops.plan import Plan, backward_plan, forward_plan, one_pass_plan

# ---- tiles and gradients ---------------------------------------------------------------------------------------------


def zero_row_ends(values_nv: Tensor) -> None:
    """Zeros in the columns behind a row's last, up to a multiple of 32.

    On CPUs with AMX the bf16 GEMM of torch 2.13 reads them and multiplies by 0, which leaves NaN where they hold NaN.
    """
    if values_nv.device.type != "cpu" or values_nv.dtype != torch.bfloat16:
        return
    n, columns = values_nv.shape
    stride, offset = values_nv.stride(0), values_nv.storage_offset()
    # A copy of one row keeps the tile's stride, and ends with its columns.
    last_row = values_nv.untyped_storage().nbytes() // values_nv.itemsize - offset - (n - 1) * stride
    end = min(aligned(columns), stride, last_row)
    if columns < end:
        values_nv.as_strided((n, end - columns), values_nv.stride(), offset + columns).zero_()


def new_tile(head: Head, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory of a tile of logits, or in another dtype; smaller tiles are its leading rows and columns."""
    return torch.empty(rows, aligned(columns), dtype=dtype or head.tile, device=head.device)[:, :columns]


def new_cached(head: Head, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for ``columns`` of all rows, which end in zeros; dtype: None: of exponentials where they are stored, else
    of logits.
    """
    cached_NC = torch.empty(head.n, aligned(columns), dtype=dtype or head.cached, device=head.device)
    cached_NC[:, columns:] = 0.0
    return cached_NC


@dataclass
class Gradients:
    """dhidden_ND and dweight_VD accumulate in the tile's precision (fp32 at least), the others in fp32; None where not
    needed.
    """

    dhidden_ND: Tensor | None = None
    dweight_VD: Tensor | None = None
    dbias_V: Tensor | None = None
    dleft_NR: Tensor | None = None
    dright_VR: Tensor | None = None

    def like(self, tensors: Tensors) -> Tensors:
        """Gradients of ``Head.tensors``, each in the dtype of its tensor."""
        found = self.dhidden_ND, self.dweight_VD, self.dbias_V, self.dleft_NR, self.dright_VR
        return tuple([None if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)])

    def of_rows(self, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """Rows of dhidden and dleft."""
        return tuple([None if t is None else t[rows] for t in (self.dhidden_ND, self.dleft_NR)])

    def of_columns(self, columns: slice) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Vocabulary entries of dW, dbias and dright."""
        return tuple([None if t is None else t[columns] for t in (self.dweight_VD, self.dbias_V, self.dright_VR)])


# ---- products and gradients of a tile --------------------------------------------------------------------------------

# (rows, columns) -> the gradient in their raw logits.
TileGradient = Callable[[slice, slice], Tensor]


def compute_logits(head: Head, storage: Tensor, rows: slice, columns: slice, step: int | None = None) -> Tensor:
    """The raw logits of some rows and columns in a tile's memory, from GEMMs of ``step`` columns."""
    logits_nv = storage[: rows.stop - rows.start, : columns.stop - columns.start]
    hidden_nd, low_rank = head.hidden_ND[rows], head.left_NR is not None
    if head.traits.upcasts:
        hidden_nd = hidden_nd.to(head.tile)
    for part in spans(columns.start, columns.stop, step) if step else [columns]:
        part_nv = logits_nv[:, part.start - columns.start : part.stop - columns.start]
        if low_rank:  # first, so that the large product adds to it as it ends
            low_rank_into(part_nv, head.left_NR[rows], head.right_VR[part])
        head.gemm.logits_into(part_nv, hidden_nd, head.lm_head_weight_VD[part], low_rank)
    return logits_nv


def low_rank_into(out_nv: Tensor, left_nr: Tensor, right_vr: Tensor) -> None:
    """out = left right^T in out's dtype, whatever the factors' is: few columns, so copies are cheap."""
    dtype = out_nv.dtype
    torch.mm(left_nr.to(dtype), right_vr.to(dtype).t(), out=out_nv)


def new_gradients(head: Head, chunk: int | None = None) -> Gradients:
    """Memory for dhidden and dW, which are written before they are added to; sums of the others from 0. chunk: rows at
    a time, each of which is final; None: slices of the vocabulary are, and dhidden is a sum.
    """
    operand, wide = head.operand, head.wide
    dhidden, dweight = (wide, operand) if chunk is None else (operand, wide if chunk < head.n else operand)
    dtypes = dhidden, dweight, wide, wide, wide
    create: tuple[Callable[..., Tensor], ...] = torch.empty, torch.empty if head.n else torch.zeros, *(torch.zeros,) * 3
    device, parts = head.device, zip(head.tensors, head.needs, dtypes, create, strict=True)
    return Gradients(*[new(t.shape, dtype=dtype, device=device) if needed else None for t, needed, dtype, new in parts])


def row_grad(
    head: Head, logits_nv: Tensor, rows: slice, norms_2n: Tensor, coefficients: RowCoefficients, v_start: int
) -> Tensor:
    """The gradient in the raw logits, in place; in the operands' dtype, or the tile's where a bias learns: the
    columns' entries cancel, so they are summed before they are rounded.
    """
    bias_v = head.bias_slice(v_start, v_start + logits_nv.shape[1])
    dtype = head.tile if head.needs.bias else head.operand
    given = head.labels_NK[rows], norms_2n, coefficients, v_start, bias_v, head.options.transform
    return head.kernels.row_grad(logits_nv, *given, dtype)


def rounded(head: Head, dlogits_nv: Tensor, dbias_v: Tensor | None) -> Tensor:
    """A gradient in the raw logits in the operands' dtype, its column sums added to dbias_v."""
    if dbias_v is not None:
        dbias_v += dlogits_nv.sum(0, dtype=torch.promote_types(dbias_v.dtype, dlogits_nv.dtype))
    dlogits_nv = dlogits_nv.to(head.operand)
    zero_row_ends(dlogits_nv)
    return dlogits_nv


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
        for part in spans(0, c, step) if step else [slice(0, c)]:
            right_cr = head.right_VR[v_start + part.start : v_start + part.stop].to(head.operand)
            gemm.add_product(dleft_nr, tile_nc[:, part], right_cr)


def token_products(
    head: Head, tile_nc: Tensor, hidden_nd, dweight_cd, left_nr, dright_cr, step: int | None = None, *, add: bool
) -> None:
    """Sums of each column of a tile over its rows: tile^T hidden in dweight_cd, or added to it, tile^T left added to
    dright_cr, in steps of columns.
    """
    c, gemm = tile_nc.shape[1], head.gemm
    multiply = gemm.add_product if add else gemm.product_into
    left_nr = None if dright_cr is None else left_nr.to(head.operand)
    for part in spans(0, c, step) if step else [slice(0, c)]:
        tile_cn = tile_nc[:, part].t()
        if dweight_cd is not None:
            multiply(dweight_cd[part], tile_cn, hidden_nd)
        if dright_cr is not None:
            gemm.add_product(dright_cr[part], tile_cn, left_nr)


def add_scaled_rows(head: Head, dbias_c: Tensor, tile_nc: Tensor, scale_n: Tensor) -> None:
    """dbias += tile^T scale, in two parts, so that the scale keeps its digits in 16 bit."""
    scale_n2 = torch.stack((scale_n, scale_n - scale_n.to(head.operand)), 1).to(head.operand)
    sums_c2 = dbias_c.new_zeros(dbias_c.shape[0], 2)
    head.gemm.add_product(sums_c2, tile_nc.t(), scale_n2)
    dbias_c += sums_c2.sum(1)


def add_slices(head: Head, gradients: Gradients, slices, tile_gradient: TileGradient, step=None, *, add=True) -> None:
    """Adds what tiles give, slice of the vocabulary by slice: a slice of dW is written once. slices: (columns, rows at
    a time). add: to dhidden, which is written otherwise.
    """
    for columns, rows_at_once in slices:
        dweight_vd, dbias_v, dright_vr = gradients.of_columns(columns)
        split = rows_at_once < head.n and dweight_vd is not None and dweight_vd.dtype != head.wide
        sums_vd = torch.empty_like(dweight_vd, dtype=head.wide) if split else dweight_vd
        for rows in spans(0, head.n, rows_at_once):
            dlogits_nv = rounded(head, tile_gradient(rows, columns), dbias_v)
            hidden_nd, left_nr, dhidden_nd, dleft_nr = *head.of_rows(rows), *gradients.of_rows(rows)
            row_products(head, dlogits_nv, columns.start, dhidden_nd, dleft_nr, step, add=add)
            token_products(head, dlogits_nv, hidden_nd, sums_vd, left_nr, dright_vr, step, add=rows.start > 0)
            del dlogits_nv  # a copy in 16 bit would live on beside the next tile
        if split:
            dweight_vd.copy_(sums_vd)
        del sums_vd  # would live on beside the next slice's


def gradients_by_slices(head: Head, plan: Plan, tile_gradient: TileGradient) -> Gradients:
    """Gradients from those in the raw logits of every tile, see ``add_slices``."""
    gradients = new_gradients(head)
    if head.needs.hidden:
        gradients.dhidden_ND.zero_()
    add_slices(head, gradients, [(columns, plan.rows) for columns in spans(0, head.v, plan.columns)], tile_gradient)
    return gradients


# ---- passes ----------------------------------------------------------------------------------------------------------


def forward_pass(head: Head, cached_NC: Tensor | None = None, *, exp: bool = False) -> RowStats:
    """Statistics of every row; peak extra memory: the budget. Without one, logits stay in registers. ``cached_NC``
    receives the raw logits of its leading columns, or with ``exp`` their exponentials, for ``vocabulary_pass``.
    """
    stats = _new_stats(head, exp)
    if head.options.budget == 0:
        kernel = fused_forward(head.options.backend)
        if kernel is None:
            raise ValueError(
                f"workspace_mb must be positive on backend {head.options.backend!r}, got 0; only 'triton' (a GPU, "
                "operands of 16 or 32 bit) keeps logits in registers; pass None for the default"
            )
        kernel(head.hidden_ND, head.lm_head_weight_VD, head.bias_V, head.labels_NK, stats, head.options.transform)
        return stats
    cached = 0 if cached_NC is None else cached_NC.shape[1]
    plan, fused = forward_plan(head, cached), exp and head.ends_in_exp
    width = head.v if fused else plan.columns
    columns = [*spans(0, cached, width if exp else head.v), *spans(cached, head.v, width)]
    storage = new_tile(head, plan.rows, plan.columns) if not fused and (exp or cached < head.v) else None
    for rows in spans(0, head.n, plan.rows):
        chunk = stats.rows(rows)
        if exp:
            _store_exp(head, storage, rows, columns, chunk, None if cached_NC is None else cached_NC[rows])
            continue
        for part in columns:
            tile = cached_NC[rows] if part.stop <= cached else storage
            _row_stats(head, compute_logits(head, tile, rows, part), rows, chunk, part.start)
    if exp:
        head.label_kernels.finish_rows(head.labels_NK.squeeze(1), stats, head.v)
    return stats


def _new_stats(head: Head, exp: bool) -> RowStats:
    """Statistics before the first tile; those of ``row_exp`` begin with the labels' logits."""
    options, n, like = head.options, head.n, head.hidden_ND
    asked = {"mean": options.label_smoothing > 0, "argmax": options.argmax}
    if not exp:
        return RowStats.empty(n, head.labels_NK.shape[1], like, entropy=options.entropy, **asked)
    stats = RowStats.uninitialised(n, like, **asked)
    low_rank = None if head.left_NR is None else (head.left_NR, head.right_VR)
    operands = head.hidden_ND, head.lm_head_weight_VD, head.bias_V, low_rank, head.labels_NK.squeeze(1)
    head.label_kernels.start_rows(*operands, stats, options.transform, head.gathered)
    return stats


def _row_stats(head: Head, logits_nv: Tensor, rows: slice, stats: RowStats, v_start: int) -> None:
    bias_v = head.bias_slice(v_start, v_start + logits_nv.shape[1])
    head.kernels.row_stats(logits_nv, head.labels_NK[rows], stats, v_start, bias_v, head.options.transform)


def _store_exp(
    head: Head, storage: Tensor | None, rows: slice, columns, stats: RowStats, exp_nc: Tensor | None, first: int = 0
) -> None:
    """``row_exp`` of some rows over spans of columns: statistics, and the exponentials of as many as exp_nc holds from
    column ``first`` on; through tiles of logits in ``storage``, or (None) as their GEMM ends.
    """
    c, labels_nk = 0 if exp_nc is None else exp_nc.shape[1], head.labels_NK[rows]
    for part in columns:
        v_start, v_stop = part.start, part.stop
        out_nv = exp_nc[:, v_start - first : v_stop - first] if v_stop - first <= c else None
        earlier_nc = exp_nc[:, : v_start - first] if c and v_start > first else None
        bias_v = head.bias_slice(v_start, v_stop)
        given = labels_nk, stats, v_start, bias_v, head.options.transform, out_nv, earlier_nc
        if storage is None:
            head.gemm.product_exp(head.hidden_ND[rows], head.lm_head_weight_VD[part], *given)
        else:
            head.kernels.row_exp(compute_logits(head, storage, rows, part), *given)


CoefficientsOf = Callable[[slice, RowStats], RowCoefficients]


def one_pass(head: Head, coefficients_of: CoefficientsOf) -> tuple[RowStats, Tensors]:
    """Statistics and gradients in one pass; ``coefficients_of(rows, their finished statistics)`` gives the rows'
    gradient. Without a gradient that is needed: statistics alone.
    """
    if not any(head.needs):
        return forward_pass(head, exp=head.stores_exp), (None,) * len(head.tensors)
    stats, gradients = (exp_pass if head.stores_exp else logit_pass)(head, coefficients_of)
    return stats, gradients.like(head.tensors)


def exp_pass(head: Head, coefficients_of: CoefficientsOf | None) -> tuple[RowStats, Gradients]:
    """``one_pass`` over chunks of rows whose exponentials E are stored: the gradient in the logits is scale_n E_nv, but
    for the label's own entry, which joins in fp32. None: what ``frozen_gradient`` begins with, in place of dhidden.
    """
    stats, plan, wide = _new_stats(head, True), one_pass_plan(head), head.wide
    gradients = new_gradients(head, plan.rows)
    slope, whole_rows = head.options.transform.slope, head.needs.whole_rows
    smooth = head.options.label_smoothing > 0 and coefficients_of is not None
    weight_sum_D = head.lm_head_weight_VD.sum(0, dtype=wide) if smooth else None
    stored = new_tile(head, plan.rows, plan.stored, head.operand)
    step = plan.columns if head.gradient_copies else None
    storage, width = None, head.v
    if not head.ends_in_exp:
        storage, width = new_tile(head, plan.rows, plan.columns), plan.columns
    sums_nd = None
    if head.needs.hidden and wide != head.operand:
        sums_nd = torch.empty(plan.rows, head.d, dtype=wide, device=head.device)
    for rows in spans(0, head.n, plan.rows):
        chunk, height = stats.rows(rows), rows.stop - rows.start
        dhidden_nd, dleft_nr = gradients.of_rows(rows)
        sum_nd = dhidden_nd if sums_nd is None else sums_nd[:height]
        for part in spans(0, head.v, plan.stored):
            first, last = part.start, part.stop
            exp_nv = stored[:height, : last - first]
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
            scales = _row_scales(head, rows, coefficients, chunk.of_label, head.v)
            if smooth:
                constant = coefficients.constant_N * slope, weight_sum_D
        if whole_rows:
            _add_token_sums(head, gradients, exp_nv, rows, scales, step, add=rows.start > 0)
            row_products(head, exp_nv, 0, sum_nd, dleft_nr, add=False)
        _end_row_sums(head, dhidden_nd, dleft_nr, rows, scales, sum_nd, head.v, constant)
    return stats, gradients


def _row_scales(head: Head, rows: slice, coefficients: RowCoefficients, of_label, c: int) -> tuple[Tensor, Tensor]:
    """The factor of the exponentials in the gradient in the raw logits, and the entry of a label among the c leading
    ones, (n,) each. of_label: ``RowStats.of_label`` of these rows.
    """
    labels_n, entry_n = head.labels_NK[rows].squeeze(1), coefficients.label_NK.squeeze(1)
    given = coefficients.prob_N, entry_n, *of_label[1:], c, head.options.transform
    return head.label_kernels.row_scales(labels_n, *given)


def frozen_gradient(head: Head, others_ND: Tensor, of_label, coefficients: RowCoefficients) -> Tensor:
    """dhidden for any coefficients, without a product: prob sum_{v != y} p_v W_v (``others_ND``, of ``exp_pass``), with
    the label's vector in fp32, and the smoothing's sum of all.
    """
    _, label_N = _row_scales(head, slice(0, head.n), coefficients, of_label, head.v)
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


def _end_row_sums(head: Head, dhidden_nd, dleft_nr, rows: slice, scales, sum_nd, c: int, constant=None) -> None:
    """Sums of rows become gradients: scaled, with the vector of a label among the c leading columns (if any)."""
    (scale_n, label_n), labels_n = scales, head.labels_NK[rows].squeeze(1)
    for out_nx, sum_nx, matrix_VX, more in (
        (dhidden_nd, sum_nd, head.lm_head_weight_VD, constant),
        (dleft_nr, dleft_nr, head.right_VR, None),
    ):
        if out_nx is not None:
            label = None if label_n is None else (matrix_VX[:c], labels_n, label_n)
            head.label_kernels.combine_rows(out_nx, sum_nx, scale_n, label, more, head.gathered)


def _add_token_sums(
    head: Head, gradients: Gradients, exp_nc: Tensor, rows: slice, scales, step: int | None, *, add: bool
) -> None:
    """Gradients that sum over the rows, of the leading columns that exp_nc holds: dW, dbias and dright."""
    (scale_n, label_n), c, kernels = scales, exp_nc.shape[1], head.label_kernels
    segments = head.labels_NK[rows].squeeze(1).sort(stable=True)  # the labels in order, and the row of each
    (hidden_nd, left_nr), (dweight_cd, dbias_c, dright_cr) = head.of_rows(rows), gradients.of_columns(slice(0, c))
    scaled_nd, dhidden_ND = None, gradients.dhidden_ND
    if dweight_cd is not None:
        # dhidden's memory, which is not written yet, holds it where it has the dtype.
        reused = dhidden_ND is not None and dhidden_ND.dtype == head.operand
        scaled_nd = dhidden_ND[rows] if reused else torch.empty_like(hidden_nd)
        kernels.combine_rows(scaled_nd, hidden_nd, scale_n, gathered=head.gathered)
    scaled_nr = None if dright_cr is None else left_nr * scale_n.unsqueeze(1)
    token_products(head, exp_nc, scaled_nd, dweight_cd, scaled_nr, dright_cr, step, add=add)
    if dbias_c is not None:
        add_scaled_rows(head, dbias_c, exp_nc, scale_n)
        ones_n1 = torch.ones_like(label_n).unsqueeze(1)
        kernels.add_label_rows(dbias_c.unsqueeze(1), segments, label_n, ones_n1, head.gathered)
    for total_cx, vectors_nx in ((dweight_cd, hidden_nd), (dright_cr, left_nr)):
        if total_cx is not None:
            kernels.add_label_rows(total_cx, segments, label_n, vectors_nx, head.gathered)


def logit_pass(head: Head, coefficients_of: CoefficientsOf) -> tuple[RowStats, Gradients]:
    """``one_pass`` over chunks of whole rows of logits."""
    stats, plan = _new_stats(head, False), one_pass_plan(head)
    gradients = new_gradients(head, plan.rows)
    storage = new_tile(head, plan.rows, head.v)

    def tile_gradient(rows: slice, columns: slice) -> Tensor:
        chunk, logits_nv = stats.rows(rows), compute_logits(head, storage, rows, columns, plan.columns)
        _row_stats(head, logits_nv, rows, chunk, 0)
        return row_grad(head, logits_nv, rows, chunk.norms_2N, coefficients_of(rows, chunk), 0)

    add_slices(head, gradients, [(slice(0, head.v), plan.rows)], tile_gradient, plan.columns, add=False)
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
    exp, all_rows = saved.shape[0] == 4, slice(0, head.n)
    cached = 0 if cached_NC is None else cached_NC.shape[1]
    gradients = new_gradients(head)
    dhidden_ND, norms_2N = gradients.dhidden_ND, saved
    if exp and cached < head.v:
        norms_2N = torch.stack((saved[0], saved[1].log()))
    if exp and cached:
        scales = _row_scales(head, all_rows, coefficients, saved, cached)
        _add_token_sums(head, gradients, cached_NC, all_rows, scales, None, add=False)
        row_products(head, cached_NC, 0, dhidden_ND, gradients.dleft_NR, add=False)
        _end_row_sums(head, dhidden_ND, gradients.dleft_NR, all_rows, scales, dhidden_ND, cached)
    elif head.needs.hidden:
        dhidden_ND.zero_()
    slices = [(slice(0, cached), head.n)] if cached and in_place and not exp else []
    if cached < head.v or not (exp or in_place):
        plan = backward_plan(head, cached)
        storage = new_tile(head, plan.rows, plan.columns)
        copied = spans(0, cached, plan.columns) if not (exp or in_place) else []
        slices += [(columns, plan.rows) for columns in (*copied, *spans(cached, head.v, plan.columns))]

    def tile_gradient(rows: slice, columns: slice) -> Tensor:
        if columns.start >= cached:
            logits_nv = compute_logits(head, storage, rows, columns)
        elif in_place:
            logits_nv = cached_NC
        else:
            logits_nv = storage[: rows.stop - rows.start, : columns.stop - columns.start]
            logits_nv.copy_(cached_NC[rows, columns])
        return row_grad(head, logits_nv, rows, norms_2N[:, rows], coefficients.rows(rows), columns.start)

    if slices:
        add_slices(head, gradients, slices, tile_gradient)
    return gradients
