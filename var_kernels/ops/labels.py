"""The labels' own entries, beside a tile of exponentials that leaves them out: their logits, known before any tile is
computed, and their vectors' part of each gradient, formed in fp32. One target a row.

On Triton each function is a launch; elsewhere it is made of torch's operations, in steps that the budget holds.
"""

import torch
from torch import Tensor

from var_kernels.kernels.rows import RowCoefficients, RowStats
from var_kernels.ops.head import Head, spans
from var_kernels.ops.plan import gathered_bytes


def _step(head: Head, width: int) -> int:
    """Rows of ``width`` whose vectors are gathered at a time."""
    return max(1, gathered_bytes(head) // max(1, 4 * width * head.wide.itemsize))


def _known(labels_n: Tensor, v: int) -> Tensor:
    """Labels in the vocabulary; an accelerator's are not looked at before (see ``checks``)."""
    return (labels_n >= 0) & (labels_n < v)


def start(head: Head) -> RowStats:
    """Statistics before the first ``row_exp``, whose pivots are the labels' logits: products in fp32 of the operands'
    exact values; NaN for a label beyond the vocabulary.
    """
    kernels, labels_N = head.label_kernels, head.labels_NK.squeeze(1)
    smooth = head.options.label_smoothing > 0
    if kernels is None:
        stats = head.new_stats()
        stats.set_pivots(_label_logits(head, labels_N).where(_known(labels_N, head.v), torch.nan))
        return stats
    stats = RowStats.uninitialised(head.n, head.hidden_ND, mean=smooth, argmax=head.options.argmax)
    low_rank = None if head.left_NR is None else (head.left_NR, head.right_VR)
    operands = (head.hidden_ND, head.lm_head_weight_VD, head.bias_V, low_rank)
    kernels.start_rows(*operands, labels_N, stats, head.options.transform)
    return stats


def _label_logits(head: Head, labels_N: Tensor) -> Tensor:
    dtype, ids_N = head.wide, labels_N.clamp(0, head.v - 1)
    x_N = torch.empty(head.n, dtype=dtype, device=labels_N.device)
    for begin, stop in spans(0, head.n, _step(head, head.d)):
        rows, ids_n = slice(begin, stop), ids_N[begin:stop]
        x_n = (head.hidden_ND[rows].to(dtype) * head.lm_head_weight_VD[ids_n]).sum(1)
        if head.left_NR is not None:
            x_n += (head.left_NR[rows].to(dtype) * head.right_VR[ids_n]).sum(1)
        x_N[rows] = x_n
    if head.bias_V is not None:
        x_N += head.bias_V[ids_N]
    return head.options.transform.apply(x_N)


def finish(head: Head, rows: slice, stats: RowStats) -> None:
    """Statistics of some rows after the last ``row_exp``: the label's exponential joins the sums."""
    kernels, labels_n = head.label_kernels, head.labels_NK[rows].squeeze(1)
    if kernels is None:
        stats.add_label(_known(labels_n, head.v))
    else:
        kernels.finish_rows(labels_n, stats, head.v)


def row_scales(head: Head, rows: slice, coefficients: RowCoefficients, of_label) -> tuple[Tensor, Tensor]:
    """The factor of the exponentials in the gradient in the raw logits, and the label's entry of it, (n,) each.
    of_label: ``RowStats.of_label`` of these rows, or ``saved_4N``.
    """
    kernels, labels_n = head.label_kernels, head.labels_NK[rows].squeeze(1)
    _, sumexp_n, logp_n, label_logit_n = of_label
    transform, prob_n, entry_n = head.options.transform, coefficients.prob_N, coefficients.label_NK.squeeze(1)
    if kernels is not None:
        return kernels.row_scales(labels_n, prob_n, entry_n, sumexp_n, logp_n, label_logit_n, head.v, transform)
    # p - 1 of a confident token is formed as such.
    label_n = prob_n + entry_n + prob_n * logp_n.expm1()
    label_n = label_n * transform.derivative(label_logit_n)
    return prob_n * transform.slope / sumexp_n, label_n.where(_known(labels_n, head.v), 0.0)


def combine_rows(
    head: Head,
    out_nd: Tensor,
    sums_nd: Tensor,
    scale_n: Tensor,
    label: tuple[Tensor, Tensor, Tensor] | None = None,
    constant: tuple[Tensor, Tensor] | None = None,
) -> None:
    """out_n = scale_n sums_n + label_n matrix[labels_n] + constant_n total, rounded once; label: matrix_VD, whose
    rows are the first of the vocabulary, labels_n, label_n; constant: constant_n, total_D. ``out_nd`` may be
    ``sums_nd``.
    """
    kernels = head.label_kernels
    if kernels is not None:
        kernels.combine_rows(out_nd, sums_nd, scale_n, label, constant)
        return
    in_place = out_nd is sums_nd
    for begin, stop in spans(0, scale_n.shape[0], _step(head, sums_nd.shape[1])):
        rows = slice(begin, stop)
        scale_n1 = scale_n[rows].unsqueeze(1)
        # A CPU copies operands of two dtypes.
        total_nd = sums_nd[rows].mul_(scale_n1) if in_place else sums_nd[rows] * scale_n1
        if label is not None:
            matrix_VD, labels_n, label_n = label[0], label[1][rows], label[2][rows]
            v = matrix_VD.shape[0]
            vectors_nd = matrix_VD[labels_n.clamp(0, v - 1)].to(total_nd.dtype)
            total_nd.addcmul_(vectors_nd, label_n.where(_known(labels_n, v), 0.0).unsqueeze(1))
        if constant is not None:
            total_nd.addcmul_(constant[0][rows].unsqueeze(1), constant[1])
        if not in_place:
            out_nd[rows] = total_nd


def segments(labels_n: Tensor) -> tuple[Tensor, Tensor]:
    """The labels in ascending order, and the row of each."""
    return labels_n.sort(stable=True)


def add_label_rows(
    head: Head, total_CD: Tensor, ordered: tuple[Tensor, Tensor], label_n: Tensor, vectors_nd: Tensor
) -> None:
    """total[labels_n] += label_n vectors_n for labels below C, each row of the total rounded once; the same bits in
    every run, and no value is read by the host. ordered: ``segments`` of the labels.
    """
    kernels, (n, d), (sorted_n, order_n) = head.label_kernels, vectors_nd.shape, ordered
    if kernels is not None:
        kernels.add_label_rows(total_CD, ordered, label_n, vectors_nd)
        return
    if n == 0:
        return
    c, dtype = total_CD.shape[0], head.wide
    weight_n = label_n.to(dtype)[order_n].where(_known(sorted_n, c), 0.0)
    sorted_n = sorted_n.clamp(0, c - 1)
    begins_n = torch.ones_like(sorted_n, dtype=torch.bool)
    begins_n[1:] = sorted_n[1:] != sorted_n[:-1]
    segment_n = begins_n.cumsum(0) - 1
    # Where each segment begins; there are n at most, and those beyond the last are empty.
    positions_n = torch.arange(n, device=sorted_n.device)
    offsets_n = torch.full_like(sorted_n, n).scatter_reduce_(0, segment_n, positions_n, "amin")
    # A block of columns: its vectors, its sums and what is written back, each with a row for each of the n.
    width = max(1, gathered_bytes(head) // (6 * n * dtype.itemsize))
    for begin, stop in spans(0, d, width):
        block_nd = vectors_nd[:, begin:stop].to(dtype).contiguous()
        sums_nd = torch.nn.functional.embedding_bag(
            order_n, block_nd, offsets_n, mode="sum", per_sample_weights=weight_n
        )
        # Rows of one label write the same values.
        rows_nd = total_CD[:, begin:stop][sorted_n].to(dtype) + sums_nd[segment_n]
        total_CD[:, begin:stop].index_copy_(0, sorted_n, rows_nd.to(total_CD.dtype))
