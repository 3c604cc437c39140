"""The labels' own entries, in addition to a tile of exponentials that leaves them out: their logits, known before any
tile is computed, and their vectors' part of each gradient, formed in fp32. One target a row.

``start_rows`` before the first ``row_exp``, ``finish_rows`` after the last, ``row_scales`` when the gradient is known;
then ``combine_rows`` ends the sums of each row and ``add_label_rows`` those of each vocabulary entry. ``scale_`` is the
backward's. Here they are made of torch's operations, which gather label vectors in steps of ``gathered`` bytes; on
Triton (``labels_triton``, the same functions) each is a launch.
"""

import torch
from torch import Tensor

from .rows import LogitTransform, RowStats, spans

# Of gathered label vectors: what stays cached on a CPU; on an accelerator enough for few launches.
_GATHERED_BYTES = 4 << 20
_ACCELERATOR_GATHERED_BYTES = 64 << 20
# Elements from which on torch divides an operation among threads. Each then ends in a barrier, where they spin while
# another process keeps one of them from running: more than few threads gain on label vectors.
_DIVIDED = 1 << 15
_FEW_THREADS = 4


def gathered_bytes(budget: int, d: int, wide: torch.dtype, device: torch.device) -> int:
    """Bytes of the label vectors that are gathered at a time: at least a row's."""
    most = _GATHERED_BYTES if device.type == "cpu" else _ACCELERATOR_GATHERED_BYTES
    return max(min(most, budget // 8), 4 * d * wide.itemsize)


def _steps(rows_nd: Tensor, wide: torch.dtype, gathered: int) -> list[slice]:
    n, d = rows_nd.shape
    step = gathered // max(1, 4 * d * wide.itemsize)
    if rows_nd.device.type == "cpu" and torch.get_num_threads() <= _FEW_THREADS:
        step = min(step, (_DIVIDED - 1) // max(1, d))
    return spans(0, n, max(1, step))


def start_rows(
    hidden_ND: Tensor,
    lm_head_weight_VD: Tensor,
    bias_V: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    labels_N: Tensor,
    stats: RowStats,
    transform: LogitTransform,
    gathered: int = _GATHERED_BYTES,
) -> None:
    """Write every statistic before the first tile. The label's logit is a product in fp32 of the operands' exact
    values, NaN where the label is beyond the vocabulary, and the pivot where it is finite.
    """
    wide, v = stats.max_N.dtype, lm_head_weight_VD.shape[0]
    ids_N, x_N = labels_N.clamp(0, v - 1), torch.empty_like(stats.max_N)
    for rows in _steps(hidden_ND, wide, gathered):
        ids_n = ids_N[rows]
        x_n = (hidden_ND[rows].to(wide) * lm_head_weight_VD.index_select(0, ids_n)).sum(1)
        if low_rank is not None:
            x_n += (low_rank[0][rows].to(wide) * low_rank[1].index_select(0, ids_n)).sum(1)
        x_N[rows] = x_n
    if bias_V is not None:
        x_N += bias_V[ids_N]
    stats.set_pivots(transform.apply(x_N).where((labels_N >= 0) & (labels_N < v), torch.nan))


def finish_rows(labels_n: Tensor, stats: RowStats, v: int) -> None:
    """The label's exponential joins the sums, in rows whose label is in the vocabulary; its log p is formed."""
    above_n = stats.label_logit_NK.squeeze(1) - stats.max_N
    own_n = above_n.exp()
    stats.sumexp_N.copy_(stats.others_N + own_n.where((labels_n >= 0) & (labels_n < v), 0.0))
    # Of a token more likely than all others together: never above 0, with the digits of 1 - p.
    likely_n = (stats.others_N / own_n).log1p().neg()
    stats.logp_N.copy_(likely_n.where(own_n > stats.others_N, above_n - stats.sumexp_N.log()))


def row_scales(
    labels_n: Tensor,
    prob_n: Tensor,
    entry_n: Tensor,
    sumexp_n: Tensor,
    logp_n: Tensor,
    label_logit_n: Tensor,
    c: int,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """Two parts of the gradient in the raw logits, (n,) each: its factor of the exponentials, and the label's entry, 0
    of a label that is none of the c leading ones.
    """
    slope = transform.slope if transform.softcap is None else transform.cap_slope(label_logit_n).mul_(transform.slope)
    # p - 1 of a confident token is formed as such.
    label_n = (prob_n + entry_n + prob_n * logp_n.expm1()) * slope
    return prob_n * transform.slope / sumexp_n, label_n.where((labels_n >= 0) & (labels_n < c), 0.0)


def combine_rows(
    out_nd: Tensor,
    sums_nd: Tensor,
    scale_n: Tensor,
    label: tuple[Tensor, Tensor, Tensor] | None = None,
    constant: tuple[Tensor, Tensor] | None = None,
    gathered: int = _GATHERED_BYTES,
) -> None:
    """out_n = scale_n sums_n + label_n matrix[labels_n] + constant_n total, rounded once; label: matrix_VD, whose
    rows are the first of the vocabulary, labels_n, label_n (0 of a label that is none of them); constant: constant_n,
    total_D. ``out_nd`` may be ``sums_nd``.
    """
    in_place = out_nd is sums_nd
    for rows in _steps(sums_nd, scale_n.dtype, gathered):
        scale_n1 = scale_n[rows].unsqueeze(1)
        # A CPU copies operands of two dtypes.
        total_nd = sums_nd[rows].mul_(scale_n1) if in_place else sums_nd[rows] * scale_n1
        if label is not None:
            matrix_VD, labels_n, label_n = label[0], label[1][rows], label[2][rows]
            vectors_nd = matrix_VD.index_select(0, labels_n.clamp(0, matrix_VD.shape[0] - 1)).to(total_nd.dtype)
            total_nd.addcmul_(vectors_nd, label_n.unsqueeze(1))
        if constant is not None:
            total_nd.addcmul_(constant[0][rows].unsqueeze(1), constant[1])
        if not in_place:
            out_nd[rows] = total_nd


def add_label_rows(
    total_CD: Tensor,
    segments: tuple[Tensor, Tensor],
    label_n: Tensor,
    vectors_nd: Tensor,
    gathered: int = _GATHERED_BYTES,
) -> None:
    """total[labels_n] += label_n vectors_n (label_n: 0 of labels from C on), each row of the total rounded once; the
    same bits in every run, and no value is read by the host. segments: the labels in ascending order, and the row of
    each.
    """
    (n, d), (sorted_n, order_n), c, wide = vectors_nd.shape, segments, total_CD.shape[0], label_n.dtype
    if n == 0:
        return
    weight_n = label_n[order_n]
    sorted_n = sorted_n.clamp(0, c - 1)
    begins_n = torch.ones_like(sorted_n, dtype=torch.bool)
    begins_n[1:] = sorted_n[1:] != sorted_n[:-1]
    segment_n = begins_n.cumsum(0) - 1
    # Where each segment begins; there are n at most, and those beyond the last are empty.
    positions_n = torch.arange(n, device=sorted_n.device)
    offsets_n = torch.full_like(sorted_n, n).scatter_reduce_(0, segment_n, positions_n, "amin")
    # A block of columns: its vectors, its sums and what is written back, each with a row for each of the n.
    width = max(1, gathered // (6 * n * wide.itemsize))
    for columns in spans(0, d, width):
        block_nd = vectors_nd[:, columns].to(wide).contiguous()
        sums_nd = torch.nn.functional.embedding_bag(
            order_n, block_nd, offsets_n, mode="sum", per_sample_weights=weight_n
        )
        # Rows of one label write the same values.
        rows_nd = total_CD[:, columns].index_select(0, sorted_n).to(wide) + sums_nd.index_select(0, segment_n)
        total_CD[:, columns].index_copy_(0, sorted_n, rows_nd.to(total_CD.dtype))


def scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, a number on its device."""
    values.mul_(factor)
