"""The row kernels in plain torch: any device, any floating dtype. They work in row blocks that stay in cache, so
their temporaries are small.
"""

import torch
from torch import Tensor

from .rows import LARGEST_SUM, LogitTransform, RowCoefficients, RowStats, spans

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A gradient in another dtype than the tile's is a copy.
COPIES_GRADIENT = True
# Tiles that stay in the last-level cache are faster than larger ones.
CACHED_TILES = False
# The host reads which rows' pivots ``row_exp`` raises.
READS_PIVOTS = True
BLOCK_ELEMENTS = 1 << 17
# exp() of it is 0 and 0 times it is 0, which -inf does not give.
_LOWEST = -1e30


def temporary_bytes(n: int, columns: int, tile: torch.dtype) -> int:
    """Upper bound of what one call allocates beside an (n, columns) tile: four temporaries of a block each."""
    return 4 * min(max(BLOCK_ELEMENTS, columns), n * columns) * torch.promote_types(tile, torch.float32).itemsize


def _blocks(n: int, columns: int) -> list[slice]:
    return spans(0, n, max(1, BLOCK_ELEMENTS // max(1, columns)))


def _transformed(x_nv: Tensor, bias_v: Tensor | None, transform: LogitTransform, *, inplace: bool) -> Tensor:
    """z = c(x + b) in the arithmetic's dtype. In place it overwrites x, else x is left as it is."""
    dtype = torch.promote_types(x_nv.dtype, torch.float32)
    if bias_v is None and transform.is_identity:
        return x_nv.to(dtype)
    return transform.apply_(x_nv.to(dtype, copy=not inplace), bias_v)


def _label_columns(labels_nk: Tensor, v_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each label in this slice (clamped) and whether the label lies in it: both (n, k)."""
    local_nk = labels_nk - v_start
    inside_nk = (local_nk >= 0) & (local_nk < columns)
    return local_nk.clamp_(0, columns - 1), inside_nk


def row_stats(
    logits_nv: Tensor,
    labels_nk: Tensor,
    stats: RowStats,
    v_start: int,
    bias_v: Tensor | None,
    transform: LogitTransform,
) -> None:
    """Merge one vocabulary slice into the running statistics; the tile is left as it is."""
    for rows in _blocks(*logits_nv.shape):
        z_nv = _transformed(logits_nv[rows], bias_v, transform, inplace=False)
        _merge_block(z_nv, labels_nk[rows], stats.rows(rows), v_start)


def _merge_block(z_nv: Tensor, labels_nk: Tensor, stats: RowStats, v_start: int) -> None:
    slice_max_n, slice_argmax_n = z_nv.max(1)
    if stats.argmax_N is not None:
        stats.argmax_N.copy_(torch.where(slice_max_n > stats.max_N, slice_argmax_n + v_start, stats.argmax_N))
    new_max_n = torch.maximum(stats.max_N, slice_max_n)
    # A row that is -inf everywhere so far: subtract 0, its exponentials are 0 all the same.
    pivot_n = new_max_n.masked_fill(new_max_n == -torch.inf, 0.0)
    drop_n = (stats.max_N - pivot_n).clamp_(min=_LOWEST)
    decay_n = drop_n.exp()

    local_nk, inside_nk = _label_columns(labels_nk, v_start, z_nv.shape[1])
    stats.label_logit_NK.copy_(torch.where(inside_nk, z_nv.gather(1, local_nk), stats.label_logit_NK))
    if stats.logit_sum_N is not None:
        stats.logit_sum_N += z_nv.sum(1)

    below_nv = z_nv - pivot_n.unsqueeze(1)
    if stats.shifted_sum_N is None:
        stats.sumexp_N.mul_(decay_n).add_(below_nv.exp_().sum(1))
    else:
        below_nv.clamp_(min=_LOWEST)
        exp_nv = below_nv.exp()
        stats.shifted_sum_N.add_(drop_n * stats.sumexp_N).mul_(decay_n).add_(below_nv.mul_(exp_nv).sum(1))
        stats.sumexp_N.mul_(decay_n).add_(exp_nv.sum(1))
    stats.max_N.copy_(new_max_n)


def row_exp(
    logits_nv: Tensor,
    labels_nk: Tensor,
    stats: RowStats,
    v_start: int,
    bias_v: Tensor | None,
    transform: LogitTransform,
    out_nv: Tensor | None,
    earlier_nc: Tensor | None,
) -> None:
    """exp(z - pivot) of one vocabulary slice, times dz/dx's factor of a softcap, into ``out_nv`` (if any), 0 at the
    label; their sums, without that factor, into the statistics. The tile is left as it is.

    A pivot that lies too low is raised to the slice's maximum, and ``earlier_nc``, the row's exponentials of earlier
    slices, are scaled with it.
    """
    for rows in _blocks(*logits_nv.shape):
        z_nv = _transformed(logits_nv[rows], bias_v, transform, inplace=False)
        memory = [None if t is None else t[rows] for t in (out_nv, earlier_nc)]
        _exp_block(z_nv, labels_nk[rows], stats.rows(rows), v_start, transform, *memory)


def _exp_block(z_nv, labels_nk, stats, v_start, transform, out_nv, earlier_nc) -> None:
    if stats.logit_sum_N is not None:
        stats.logit_sum_N += z_nv.sum(1)
    if stats.argmax_N is not None:
        slice_max_n, slice_argmax_n = z_nv.max(1)
        stats.argmax_N.copy_(torch.where(slice_max_n > stats.top_N, slice_argmax_n + v_start, stats.argmax_N))
        torch.maximum(stats.top_N, slice_max_n, out=stats.top_N)
    local_nk, inside_nk = _label_columns(labels_nk, v_start, z_nv.shape[1])

    def exponentials() -> tuple[Tensor, Tensor]:
        pivot_n1 = stats.max_N.masked_fill(stats.max_N == -torch.inf, 0.0).unsqueeze(1)
        exp_nv = (z_nv - pivot_n1).exp_()
        exp_nv.scatter_(1, local_nk, exp_nv.gather(1, local_nk).masked_fill_(inside_nk, 0.0))
        return exp_nv, exp_nv.sum(1)

    exp_nv, sum_n = exponentials()
    # A CPU tensor is read for nothing.
    low_n = (sum_n > LARGEST_SUM) | (stats.max_N == -torch.inf)
    if low_n.any():
        raised_n = z_nv.amax(1).where(low_n, stats.max_N)
        decay_n = (stats.max_N - raised_n).exp().masked_fill_(raised_n == stats.max_N, 1.0)
        stats.max_N.copy_(raised_n)
        stats.others_N.mul_(decay_n)
        if earlier_nc is not None:
            earlier_nc[low_n] = (earlier_nc[low_n] * decay_n[low_n].unsqueeze(1)).to(earlier_nc.dtype)
        exp_nv, sum_n = exponentials()
    stats.others_N += sum_n
    if out_nv is None:
        return
    if transform.softcap is not None:
        exp_nv.mul_(transform.cap_slope(z_nv))
    out_nv.copy_(exp_nv)


def row_grad(
    logits_nv: Tensor,
    labels_nk: Tensor,
    norms_2n: Tensor,
    coefficients: RowCoefficients,
    v_start: int,
    bias_v: Tensor | None,
    transform: LogitTransform,
    out_dtype: torch.dtype,
) -> Tensor:
    """The gradient in the raw logits, (n, columns) in ``out_dtype``, rounded once; the tile is overwritten."""
    for rows in _blocks(*logits_nv.shape):
        block_nv = logits_nv[rows]
        z_nv = _transformed(block_nv, bias_v, transform, inplace=True)
        grad_nv = _grad_block(z_nv, labels_nk[rows], norms_2n[:, rows], coefficients.rows(rows), v_start, transform)
        if grad_nv.data_ptr() != block_nv.data_ptr():
            block_nv.copy_(grad_nv)
    return logits_nv.to(out_dtype)


def _grad_block(
    z_nv: Tensor,
    labels_nk: Tensor,
    norms_2n: Tensor,
    coefficients: RowCoefficients,
    v_start: int,
    transform: LogitTransform,
) -> Tensor:
    cap_slope_nv = None if transform.softcap is None else transform.cap_slope(z_nv)
    slope = transform.slope
    prob_n1 = (coefficients.prob_N * slope).unsqueeze(1)
    logp_nv = z_nv.sub_(norms_2n[0].unsqueeze(1)).sub_(norms_2n[1].unsqueeze(1))
    if coefficients.logp_slope_N is None:
        grad_nv = logp_nv.exp_().mul_(prob_n1)
    else:
        logp_nv.clamp_(min=_LOWEST)
        factor_nv = torch.addcmul(prob_n1, logp_nv, (coefficients.logp_slope_N * slope).unsqueeze(1))
        grad_nv = logp_nv.exp_().mul_(factor_nv)
    if coefficients.constant_N is not None:
        grad_nv += (coefficients.constant_N * slope).unsqueeze(1)
    local_nk, inside_nk = _label_columns(labels_nk, v_start, z_nv.shape[1])
    grad_nv.scatter_add_(1, local_nk, (coefficients.label_NK * slope).where(inside_nk, 0.0))
    return grad_nv if cap_slope_nv is None else grad_nv.mul_(cap_slope_nv)
