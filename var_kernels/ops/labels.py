"""The labels' own entries, beside a tile of exponentials that leaves them out: their logits, known before any tile is
computed, and their vectors' part of each gradient, formed in fp32. One target a row.
"""

import torch
from torch import Tensor

from var_kernels.ops.head import Head, accumulation_dtype, spans
from var_kernels.ops.plan import gathered_bytes


def _row_bytes(width: int, head: Head) -> int:
    return max(1, 4 * width * accumulation_dtype(head.operand).itemsize)


def step(head: Head, width: int) -> int:
    """Rows of ``width`` whose vectors are gathered at a time."""
    return max(1, gathered_bytes(head) // _row_bytes(width, head))


def known(labels_n: Tensor, v: int) -> Tensor:
    """Which labels are in the vocabulary; an accelerator's are not looked at before (see ``checks``)."""
    return (labels_n >= 0) & (labels_n < v)


def label_logits(head: Head) -> Tensor:
    """z_N at the labels, NaN at those beyond the vocabulary: products in fp32 of the operands' exact values."""
    dtype, labels_N = accumulation_dtype(head.operand), head.labels_NK.squeeze(1)
    ids_N = labels_N.clamp(0, head.v - 1)
    x_N = torch.empty(head.n, dtype=dtype, device=labels_N.device)
    for start, stop in spans(0, head.n, step(head, head.d)):
        rows, ids_n = slice(start, stop), ids_N[start:stop]
        x_n = (head.hidden_ND[rows].to(dtype) * head.lm_head_weight_VD[ids_n]).sum(1)
        if head.left_NR is not None:
            x_n += (head.left_NR[rows].to(dtype) * head.right_VR[ids_n]).sum(1)
        x_N[rows] = x_n
    if head.bias_V is not None:
        x_N += head.bias_V[ids_N]
    return head.options.transform.apply(x_N).where(known(labels_N, head.v), torch.nan)


def add_label_vectors(total_nd: Tensor, matrix_VD: Tensor, labels_n: Tensor, label_n: Tensor, head: Head) -> None:
    """total_n += label_n matrix[labels_n]."""
    ids_n = labels_n.clamp(0, matrix_VD.shape[0] - 1)
    for start, stop in spans(0, ids_n.shape[0], step(head, matrix_VD.shape[1])):
        rows = slice(start, stop)
        total_nd[rows].addcmul_(matrix_VD[ids_n[rows]].to(total_nd.dtype), label_n[rows].unsqueeze(1))


def scale_rows(out_nd: Tensor, hidden_nd: Tensor, scale_n: Tensor, head: Head) -> None:
    """out_n = scale_n hidden_n, rounded once; in steps, since a CPU copies operands of two dtypes."""
    for start, stop in spans(0, scale_n.shape[0], step(head, hidden_nd.shape[1])):
        out_nd[start:stop] = hidden_nd[start:stop] * scale_n[start:stop].unsqueeze(1)


def add_label_rows(total_VD: Tensor, labels_n: Tensor, label_n: Tensor, vectors_nd: Tensor, head: Head) -> None:
    """total[labels_n] += label_n vectors_n, each row of the total rounded once; the same bits in every run, and no
    value is read by the host.
    """
    n, d = vectors_nd.shape
    if n == 0:
        return
    dtype = accumulation_dtype(head.operand)
    sorted_n, order_n = labels_n.clamp(0, total_VD.shape[0] - 1).sort(stable=True)
    begins_n = torch.ones_like(sorted_n, dtype=torch.bool)
    begins_n[1:] = sorted_n[1:] != sorted_n[:-1]
    segment_n = begins_n.cumsum(0) - 1
    # Where each segment begins; there are n at most, and those beyond the last are empty.
    positions_n = torch.arange(n, device=sorted_n.device)
    offsets_n = torch.full_like(sorted_n, n).scatter_reduce_(0, segment_n, positions_n, "amin")
    weight_n = label_n.to(dtype)[order_n]
    # A block of columns: its vectors, its sums and what is written back, each with a row for each of the n.
    width = max(1, gathered_bytes(head) // (6 * n * dtype.itemsize))
    for start, stop in spans(0, d, width):
        block_nd = vectors_nd[:, start:stop].to(dtype).contiguous()
        sums_nd = torch.nn.functional.embedding_bag(
            order_n, block_nd, offsets_n, mode="sum", per_sample_weights=weight_n
        )
        # Rows of one label write the same values.
        rows_nd = total_VD[:, start:stop][sorted_n].to(dtype) + sums_nd[segment_n]
        total_VD[:, start:stop].index_copy_(0, sorted_n, rows_nd.to(total_VD.dtype))
