"""The functions of ``labels_torch`` in Triton, fp32 arithmetic: a launch each where torch's operations take dozens.

Label vectors are read where they are (``gathered`` is not looked at); ``scale_`` multiplies finished gradients by a
scalar that the device reads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import LogitTransform, RowStats, packed
from .rows_triton import LAUNCH_OPTIONS, ROW_COUNTS, _block, _cap_slope, _scalars, _transformed, on_device_of

# Elements of a row that a program holds at a time, and its warps.
BLOCK_DEPTH = 1024
NUM_WARPS = 4
# Vectors of one label that a program loads at a time, and columns of them.
LABEL_ROWS = 4
LABEL_DEPTH = 512
# Rows a program, where a row is a few numbers.
BLOCK_ROWS = 512
# Of ``scale_``: elements a step, programs (which leave at once where the scale is 1), warps.
SCALE_ELEMENTS = 4096
SCALE_PROGRAMS = 2048
SCALE_WARPS = 8


@triton.jit
def _dot(
    left_ptr, left_stride, right_ptr, right_stride, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        offs_d = (start + tl.arange(0, BLOCK)).to(tl.int64)  # a transposed head's stride is V: the product is large
        mask = offs_d < D
        left = tl.load(left_ptr + offs_d * left_stride, mask=mask, other=0.0).to(tl.float32)
        right = tl.load(right_ptr + offs_d * right_stride, mask=mask, other=0.0).to(tl.float32)
        total += left * right
    return tl.sum(total, 0)


@triton.jit
def _start_rows_kernel(
    hidden_ptr,  # (N, D)
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,)
    left_ptr,  # (N, R)
    right_ptr,  # (V, R)
    labels_ptr,  # (N,) int64
    label_logit_ptr,  # (N,) fp32 and so on: the statistics, written
    pivot_ptr,
    others_ptr,
    logit_sum_ptr,
    argmax_ptr,  # int64
    top_ptr,
    hidden_stride_n,
    hidden_stride_d,
    weight_stride_v,
    weight_stride_d,
    left_stride_n,
    left_stride_r,
    right_stride_v,
    right_stride_r,
    V,
    D,
    R,
    scale,
    cap,
    inner,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    known = (label >= 0) & (label < V)
    label = tl.where(known, label, 0)
    hidden_ptr += row * hidden_stride_n
    x = _dot(hidden_ptr, hidden_stride_d, weight_ptr + label * weight_stride_v, weight_stride_d, D, BLOCK)
    if left_ptr is not None:
        left_ptr += row * left_stride_n
        x += _dot(left_ptr, left_stride_r, right_ptr + label * right_stride_v, right_stride_r, R, BLOCK_R)
    z = _transformed(x, bias_ptr, label, known, scale, cap, inner)
    z = tl.where(known, z, float("nan"))
    tl.store(label_logit_ptr + row, z)
    tl.store(pivot_ptr + row, tl.where(tl.abs(z) < float("inf"), z, float("-inf")))
    tl.store(others_ptr + row, 0.0)
    if logit_sum_ptr is not None:
        tl.store(logit_sum_ptr + row, 0.0)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + row, tl.zeros((), tl.int64))
        tl.store(top_ptr + row, float("-inf"))


@triton.jit
def _log1p(x):
    """log(1 + x) of 0 <= x <= 1 as 2 atanh(x / (2 + x)), with the digits of a small x; the series is off by 3e-9."""
    s = x / (2.0 + x)
    t = s * s
    series = 1.0 / 15.0
    for odd in tl.static_range(13, 0, -2):
        series = series * t + 1.0 / odd
    return 2.0 * s * series


@triton.jit(do_not_specialize=ROW_COUNTS)
def _finish_rows_kernel(
    labels_ptr,  # (n,) int64
    label_logit_ptr,  # (n,) fp32 and so on
    pivot_ptr,
    others_ptr,
    sumexp_ptr,  # written
    logp_ptr,  # written
    n,
    V,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < n
    label = tl.load(labels_ptr + rows, mask=mask, other=0)
    known = (label >= 0) & (label < V)
    others = tl.load(others_ptr + rows, mask=mask, other=1.0)
    above = tl.load(label_logit_ptr + rows, mask=mask, other=0.0) - tl.load(pivot_ptr + rows, mask=mask, other=0.0)
    own = tl.exp(above)
    sumexp = others + tl.where(known, own, 0.0)
    tl.store(sumexp_ptr + rows, sumexp, mask=mask)
    # Of a token more likely than all others together: never above 0, with the digits of 1 - p.
    logp = tl.where(own > others, -_log1p(others / own), above - tl.log(sumexp))
    tl.store(logp_ptr + rows, logp, mask=mask)


@triton.jit(do_not_specialize=ROW_COUNTS)
def _row_scales_kernel(
    labels_ptr,  # (n,) int64
    prob_ptr,  # (n,) fp32: coefficients of the gradient in z
    entry_ptr,
    sumexp_ptr,  # (n,) fp32: statistics
    logp_ptr,
    label_logit_ptr,
    scale_ptr,  # (n,) fp32, written
    label_ptr,
    n,
    V,
    slope,
    cap_slope,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < n
    label = tl.load(labels_ptr + rows, mask=mask, other=-1)
    known = (label >= 0) & (label < V)
    prob = tl.load(prob_ptr + rows, mask=mask, other=0.0)
    # p - 1 of a confident token is formed as such: the Taylor series of exp where p is close to 1.
    logp = tl.load(logp_ptr + rows, mask=mask, other=0.0)
    small = logp * (1.0 + logp * (0.5 + logp * (1.0 / 6 + logp * (1.0 / 24 + logp * (1.0 / 120)))))
    p_less_1 = tl.where(logp > -0.125, small, tl.exp(logp) - 1.0)
    entry = prob + tl.load(entry_ptr + rows, mask=mask, other=0.0) + prob * p_less_1
    if cap_slope is not None:
        tanh = tl.load(label_logit_ptr + rows, mask=mask, other=0.0) * cap_slope
        entry *= 1.0 - tanh * tanh
    tl.store(label_ptr + rows, tl.where(known, entry * slope, 0.0), mask=mask)
    tl.store(scale_ptr + rows, prob * slope / tl.load(sumexp_ptr + rows, mask=mask, other=1.0), mask=mask)


@triton.jit
def _combine_rows_kernel(
    out_ptr,  # (n, D), sums_ptr's own memory or other
    sums_ptr,  # (n, D)
    scale_ptr,  # (n,) fp32
    matrix_ptr,  # (V, D)
    labels_ptr,  # (n,) int64
    label_ptr,  # (n,) fp32
    constant_ptr,  # (n,) fp32
    total_ptr,  # (D,) fp32
    out_stride_n,
    out_stride_d,
    sums_stride_n,
    sums_stride_d,
    matrix_stride_v,
    matrix_stride_d,
    V,
    D,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_d = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = offs_d < D
    sums = tl.load(sums_ptr + row * sums_stride_n + offs_d * sums_stride_d, mask=mask, other=0.0).to(tl.float32)
    out = sums * tl.load(scale_ptr + row)
    if label_ptr is not None:
        label = tl.load(labels_ptr + row)
        known = (label >= 0) & (label < V)
        label = tl.where(known, label, 0)
        there = offs_d < tl.where(known, D, 0)  # the interpreter of Triton 3.9 takes no block and scalar together
        vector = tl.load(matrix_ptr + label * matrix_stride_v + offs_d * matrix_stride_d, mask=there, other=0.0)
        out += tl.load(label_ptr + row) * vector.to(tl.float32)
    if constant_ptr is not None:
        out += tl.load(constant_ptr + row) * tl.load(total_ptr + offs_d, mask=mask, other=0.0)
    tl.store(out_ptr + row * out_stride_n + offs_d * out_stride_d, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=ROW_COUNTS)
def _label_rows_kernel(
    total_ptr,  # (C, D), rows of labels are added to
    sorted_ptr,  # (n,) int64: the labels in ascending order
    order_ptr,  # (n,) int64: the row of each
    label_ptr,  # (n,) fp32, by row
    vectors_ptr,  # (n, D), by row
    total_stride_v,
    total_stride_d,
    vectors_stride_n,
    vectors_stride_d,
    n,
    C,
    D,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a distinct label and block of columns: the first of its rows; the others have none."""
    first = tl.program_id(0)
    label = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    if (label != before) & (label >= 0) & (label < C):
        offs_d = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        mask = offs_d < D
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        start = first
        found = tl.full((), ROWS, tl.int32)
        while found == ROWS:
            at = start + tl.arange(0, ROWS)
            same = (at < n) & (tl.load(sorted_ptr + at, mask=at < n, other=-1) == label)
            row = tl.load(order_ptr + at, mask=same, other=0)
            factor = tl.load(label_ptr + row, mask=same, other=0.0)
            pointers = vectors_ptr + row[:, None] * vectors_stride_n + offs_d[None, :] * vectors_stride_d
            vectors = tl.load(pointers, mask=same[:, None] & mask[None, :], other=0.0)
            sums += factor[:, None] * vectors.to(tl.float32)
            start += ROWS
            found = tl.sum(same.to(tl.int32), 0)
        totals = total_ptr + label * total_stride_v + offs_d * total_stride_d
        total = tl.load(totals, mask=mask, other=0.0).to(tl.float32) + tl.sum(sums, 0)
        tl.store(totals, total.to(total_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_kernel(
    values_ptr,  # (size,)
    factor_ptr,  # one number
    size,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        while start < size:
            at = start + tl.arange(0, BLOCK)
            mask = at < size
            values = tl.load(values_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor
            tl.store(values_ptr + at, values.to(values_ptr.dtype.element_ty), mask=mask)
            start += step


def gathered_bytes(budget: int, d: int, wide: torch.dtype, device: torch.device) -> int:
    """Bytes of gathered label vectors: none."""
    return 0


def start_rows(
    hidden_ND: Tensor,
    lm_head_weight_VD: Tensor,
    bias_V: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    labels_N: Tensor,
    stats: RowStats,
    transform: LogitTransform,
    gathered: int = 0,
) -> None:
    """The label's logit, NaN where it is beyond the vocabulary, and every statistic before the first tile."""
    (n, d), v = hidden_ND.shape, lm_head_weight_VD.shape[0]
    if n == 0:
        return
    left_NR, right_VR = (None, None) if low_rank is None else low_rank
    ranks, strides = (0, (0,) * 4) if low_rank is None else (left_NR.shape[1], (*left_NR.stride(), *right_VR.stride()))
    with on_device_of(hidden_ND):
        _start_rows_kernel[(n,)](
            *(hidden_ND, lm_head_weight_VD, packed(bias_V), left_NR, right_VR, labels_N.contiguous()),
            *(stats.label_logit_NK, stats.max_N, stats.others_N, stats.logit_sum_N, stats.argmax_N, stats.top_N),
            *(*hidden_ND.stride(), *lm_head_weight_VD.stride(), *strides, v, d, ranks),
            **_scalars(transform),
            BLOCK=_block(d, BLOCK_DEPTH),
            BLOCK_R=_block(ranks, BLOCK_DEPTH),
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )


def finish_rows(labels_n: Tensor, stats: RowStats, v: int) -> None:
    """The label's exponential joins the sums, and log p of the label is formed."""
    n = labels_n.shape[0]
    if n == 0:
        return
    with on_device_of(labels_n):
        _finish_rows_kernel[(triton.cdiv(n, BLOCK_ROWS),)](
            *(labels_n.contiguous(), stats.label_logit_NK, stats.max_N, stats.others_N, stats.sumexp_N, stats.logp_N),
            *(n, v),
            BLOCK=BLOCK_ROWS,
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )


def row_scales(
    labels_n: Tensor,
    prob_n: Tensor,
    entry_n: Tensor,
    sumexp_n: Tensor,
    logp_n: Tensor,
    label_logit_n: Tensor,
    v: int,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """Coefficients of the gradient in the raw logits: the factor of the exponentials, the label's entry; (n,) each."""
    n = labels_n.shape[0]
    scale_n, label_n = (torch.empty(n, dtype=torch.float32, device=labels_n.device) for _ in range(2))
    if n == 0:
        return scale_n, label_n
    with on_device_of(labels_n):
        _row_scales_kernel[(triton.cdiv(n, BLOCK_ROWS),)](
            *(labels_n.contiguous(), prob_n.contiguous(), entry_n.contiguous()),
            *(sumexp_n, logp_n, label_logit_n, scale_n, label_n, n, v),
            slope=transform.slope,
            cap_slope=_cap_slope(transform),
            BLOCK=BLOCK_ROWS,
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )
    return scale_n, label_n


def combine_rows(
    out_nd: Tensor,
    sums_nd: Tensor,
    scale_n: Tensor,
    label: tuple[Tensor, Tensor, Tensor] | None = None,
    constant: tuple[Tensor, Tensor] | None = None,
    gathered: int = 0,
) -> None:
    """out_n = scale_n sums_n + label_n matrix[labels_n] + constant_n total, rounded once; label: matrix_VD, labels_n,
    label_n; constant: constant_n, total_D. ``out_nd`` may be ``sums_nd``.
    """
    n, d = out_nd.shape
    if n == 0 or d == 0:
        return
    matrix_VD, labels_n, label_n = (None, None, None) if label is None else label
    constant_n, total_D = (None, None) if constant is None else constant
    block = _block(d, BLOCK_DEPTH)
    with on_device_of(out_nd):
        _combine_rows_kernel[(n, triton.cdiv(d, block))](
            *(out_nd, sums_nd, scale_n.contiguous(), matrix_VD, *map(packed, (labels_n, label_n, constant_n)), total_D),
            *(*out_nd.stride(), *sums_nd.stride(), *(matrix_VD.stride() if label else (0, 0))),
            *(matrix_VD.shape[0] if label else 0, d),
            BLOCK=block,
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )


def add_label_rows(
    total_CD: Tensor, segments: tuple[Tensor, Tensor], label_n: Tensor, vectors_nd: Tensor, gathered: int = 0
) -> None:
    """total[labels_n] += label_n vectors_n, each row of the total rounded once; segments: the labels in order, and the
    row of each. Labels beyond the total are left out.
    """
    (sorted_n, order_n), (n, d) = segments, vectors_nd.shape
    if n == 0 or d == 0:
        return
    block = _block(d, LABEL_DEPTH)
    with on_device_of(total_CD):
        _label_rows_kernel[(n, triton.cdiv(d, block))](
            *(total_CD, sorted_n.contiguous(), order_n.contiguous(), label_n.contiguous(), vectors_nd),
            *(*total_CD.stride(), *vectors_nd.stride(), n, total_CD.shape[0], d),
            ROWS=LABEL_ROWS,
            BLOCK=block,
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )


def scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, a number on the device, where it is not 1."""
    size = values.numel()
    if not values.is_contiguous():
        values.mul_(factor)
        return
    if size == 0:
        return
    with on_device_of(values):
        _scale_kernel[(min(triton.cdiv(size, SCALE_ELEMENTS), SCALE_PROGRAMS),)](
            values, factor, size, BLOCK=SCALE_ELEMENTS, num_warps=SCALE_WARPS, **LAUNCH_OPTIONS
        )
