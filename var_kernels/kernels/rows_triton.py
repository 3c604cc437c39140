"""The row kernels in Triton, fp32 arithmetic: one program per row walks the tile's columns in blocks.

CUDA, ROCm and XPU; on a CPU only under Triton's interpreter, for tests.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import LARGEST_SUM, ROW_ELEMENTS, LogitTransform, RowCoefficients, RowStats, aligned, packed

# Dtypes of a tile. fp64 is not among them: Triton's scalar arguments are fp32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A narrower gradient lies in the tile's own storage.
COPIES_GRADIENT = False
# Tiles that stay in the last-level cache are faster than larger ones.
CACHED_TILES = False
READS_PIVOTS = False
# Columns a program holds at a time, and its warps: 16 elements a thread.
BLOCK_COLUMNS = 4096
NUM_WARPS = 8
# Of row_exp, whose rare second walk takes registers too; half of it with a bias or a softcap.
EXP_BLOCK_COLUMNS = 2048
# Options of every launch. From Triton 3.10 on a * b + c is no longer one instruction by default: more work, other bits.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}
# Arguments that follow the number of rows: left to itself Triton compiles anew for 1 and for multiples of 16, in the
# middle of a training, or of the capture of a CUDA graph.
ROW_COUNTS = ["n", "N", "S", "B", "T", "state_stride"]


@triton.jit
def _tanh(x):
    """libdevice's tanh is missing on some targets; exp(-2|x|) does not overflow."""
    decay = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _transformed(x, bias_ptr, columns, mask, scale, cap, inner):
    """z = scale * x, or cap * tanh(inner * x), of the raw logits plus the bias."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(x.dtype)
    if cap is not None:
        return cap * _tanh(inner * x)
    return scale * x


@triton.jit
def _end(C, PADDED: tl.constexpr):
    """End of a row's loads and stores: where its memory goes on, at a multiple that the compiler knows, so that
    they move 16 bytes at a time."""
    if PADDED:
        return tl.cdiv(C, 32) * 32
    return C


@triton.jit
def _row_stats_kernel(
    logits_ptr,  # (n, C), any floating dtype
    bias_ptr,  # (C,)
    labels_ptr,  # (n, K) int64
    max_ptr,  # (n,) and so on: the running statistics
    sumexp_ptr,
    label_logit_ptr,  # (n, K)
    shifted_ptr,
    logit_sum_ptr,
    argmax_ptr,
    row_stride,
    C,
    K,
    v_start,
    scale,
    cap,
    inner,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    # Below every finite logit that a network makes, and finite, so that differences are never NaN.
    lowest = -1e38
    lane_max = tl.full((BLOCK,), lowest, tl.float32)
    lane_sum = tl.zeros((BLOCK,), tl.float32)
    lane_shifted = tl.zeros((BLOCK,), tl.float32)
    lane_total = tl.zeros((BLOCK,), tl.float32)
    lane_argmax = tl.zeros((BLOCK,), tl.int32)
    end = _end(C, PADDED)
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < C
        x = tl.load(logits_ptr + columns, mask=columns < end, other=0.0).to(tl.float32)
        z = _transformed(x, bias_ptr, columns, mask, scale, cap, inner)
        if logit_sum_ptr is not None:
            lane_total += tl.where(mask, z, 0.0)
        z = tl.where(mask, z, float("-inf"))
        above = z > lane_max
        # One exponential an element, of minus the distance to the lane's maximum, whichever side is the larger.
        distance = tl.abs(z - lane_max)  # NaN where z is: a maximum with 0 would make it 0
        decay = tl.exp(-distance)
        if shifted_ptr is not None:
            finite = tl.minimum(distance, 1e30)
            lane_shifted = tl.where(above, decay * (lane_shifted - finite * lane_sum), lane_shifted - decay * finite)
        lane_sum = tl.where(above, lane_sum * decay + 1.0, lane_sum + decay)
        if argmax_ptr is not None:
            lane_argmax = tl.where(above, columns, lane_argmax)
        lane_max = tl.where(above, z, lane_max)

    slice_max = tl.max(lane_max, 0)
    if argmax_ptr is not None:
        slice_argmax = tl.min(tl.where(lane_max == slice_max, lane_argmax, C), 0)
    old_max = tl.load(max_ptr + row)
    new_max = tl.maximum(old_max, slice_max)
    lane_drop = lane_max - new_max
    lane_decay = tl.exp(lane_drop)
    old_drop = tl.maximum(old_max, lowest) - new_max
    old_decay = tl.exp(old_drop)
    old_sum = tl.load(sumexp_ptr + row)
    if shifted_ptr is not None:
        old_shifted = tl.load(shifted_ptr + row)
        shifted = tl.sum(lane_decay * (lane_shifted + tl.maximum(lane_drop, -1e30) * lane_sum), 0)
        tl.store(shifted_ptr + row, shifted + old_decay * (old_shifted + tl.maximum(old_drop, -1e30) * old_sum))
    tl.store(sumexp_ptr + row, tl.sum(lane_sum * lane_decay, 0) + old_decay * old_sum)
    # Nothing but -inf so far: no maximum either.
    tl.store(max_ptr + row, tl.where(new_max == lowest, float("-inf"), new_max))
    if logit_sum_ptr is not None:
        tl.store(logit_sum_ptr + row, tl.load(logit_sum_ptr + row) + tl.sum(lane_total, 0))
    if argmax_ptr is not None:
        old_argmax = tl.load(argmax_ptr + row)
        tl.store(argmax_ptr + row, tl.where(slice_max > old_max, slice_argmax.to(tl.int64) + v_start, old_argmax))

    for k in range(0, K):
        column = tl.load(labels_ptr + row * K + k) - v_start
        inside = (column >= 0) & (column < C)
        x = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
        z = _transformed(x, bias_ptr, column, inside, scale, cap, inner)
        tl.store(label_logit_ptr + row * K + k, z, mask=inside)


@triton.jit
def _row_grad_kernel(
    logits_ptr,  # (n, C), overwritten: in its own dtype, or in OUT at twice the row stride
    bias_ptr,
    labels_ptr,  # (n, K) int64
    max_ptr,  # (n,)
    log_sum_ptr,  # (n,)
    prob_ptr,  # (n,)
    logp_slope_ptr,
    constant_ptr,
    label_ptr,  # (n, K)
    row_stride,
    out_stride,
    C,
    K,
    v_start,
    scale,
    cap,
    inner,
    cap_slope,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    OUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out_ptr = logits_ptr.to(tl.pointer_type(OUT), bitcast=True) + row * out_stride
    logits_ptr += row * row_stride
    top = tl.load(max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    prob = tl.load(prob_ptr + row)
    if logp_slope_ptr is not None:
        logp_slope = tl.load(logp_slope_ptr + row)
    if constant_ptr is not None:
        constant = tl.load(constant_ptr + row)
    end = _end(C, PADDED)
    # In order: a narrower output overwrites only columns that were read before.
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < C
        x = tl.load(logits_ptr + columns, mask=columns < end, other=0.0).to(tl.float32)
        z = _transformed(x, bias_ptr, columns, mask, scale, cap, inner)
        logp = (z - top) - log_sum
        p = tl.exp(logp)
        if logp_slope_ptr is not None:
            grad = p * (prob + logp_slope * tl.maximum(logp, -1e30))
        else:
            grad = p * prob
        if constant_ptr is not None:
            grad += constant
        for k in range(0, K):
            column = tl.load(labels_ptr + row * K + k) - v_start
            grad += tl.where(columns == column, tl.load(label_ptr + row * K + k), 0.0)
        if cap is not None:
            tanh = z * cap_slope
            grad *= 1.0 - tanh * tanh
        # Every thread has read its columns before any writes into the storage that they share.
        tl.debug_barrier()
        # Beyond the tile whatever lay there.
        tl.store(out_ptr + columns, (grad * scale).to(OUT), mask=columns < end)
        tl.debug_barrier()


@triton.jit
def _exp_tile(logits_ptr, bias_ptr, start, label, C, end, shift, scale, cap, inner, BLOCK: tl.constexpr):
    """(columns, mask, z, z without the label, exp(z - shift) without it) of one block; -inf beyond the tile."""
    columns = start + tl.arange(0, BLOCK)
    mask = columns < C
    x = tl.load(logits_ptr + columns, mask=columns < end, other=0.0).to(tl.float32)
    z = _transformed(x, bias_ptr, columns, mask, scale, cap, inner)
    z = tl.where(mask, z, float("-inf"))
    others = tl.where(columns == label, float("-inf"), z)
    return columns, mask, z, others, tl.exp(others - shift)


@triton.jit
def _store_exp(out_ptr, columns, end, z, e, cap_slope):
    """0 beyond the tile."""
    if cap_slope is not None:
        tanh = tl.where(e == 0.0, 0.0, z * cap_slope)
        e *= 1.0 - tanh * tanh
    tl.store(out_ptr + columns, e.to(out_ptr.dtype.element_ty), mask=columns < end)


@triton.jit
def _row_exp_kernel(
    logits_ptr,  # (n, C), any floating dtype
    bias_ptr,  # (C,)
    labels_ptr,  # (n, 1) int64
    pivot_ptr,  # (n,) and so on: the running statistics
    others_ptr,
    logit_sum_ptr,
    argmax_ptr,
    top_ptr,
    out_ptr,  # (n, C), the exponentials
    earlier_ptr,  # (n, earlier_columns), those of the row's earlier slices
    row_stride,
    out_stride,
    earlier_stride,
    C,
    earlier_columns,
    v_start,
    scale,
    cap,
    inner,
    cap_slope,
    largest_sum,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    if out_ptr is not None:
        out_ptr += row * out_stride
    pivot = tl.load(pivot_ptr + row)
    unset = pivot == float("-inf")
    shift = tl.where(unset, 0.0, pivot)
    label = tl.load(labels_ptr + row) - v_start
    label = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)
    end = _end(C, PADDED)
    lane_sum = tl.zeros((BLOCK,), tl.float32)
    lane_total = tl.zeros((BLOCK,), tl.float32)
    lane_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    lane_argmax = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, C, BLOCK):
        columns, mask, z, _, e = _exp_tile(logits_ptr, bias_ptr, start, label, C, end, shift, scale, cap, inner, BLOCK)
        if logit_sum_ptr is not None:
            lane_total += tl.where(mask, z, 0.0)
        if argmax_ptr is not None:
            lane_argmax = tl.where(z > lane_max, columns, lane_argmax)
            lane_max = tl.where(z > lane_max, z, lane_max)
        lane_sum += e
        if out_ptr is not None:
            _store_exp(out_ptr, columns, end, z, e, cap_slope)
    total = tl.sum(lane_sum, 0)
    others = tl.load(others_ptr + row)
    # Rare: the exponentials are made again over a pivot that is the slice's maximum.
    if (total > largest_sum) | unset:
        lane_top = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, C, BLOCK):
            _, _, _, z, _ = _exp_tile(logits_ptr, bias_ptr, start, label, C, end, shift, scale, cap, inner, BLOCK)
            lane_top = tl.maximum(lane_top, z)
        top = tl.max(lane_top, 0)
        if top > pivot:
            decay = tl.exp(pivot - top)
            others *= decay
            if earlier_ptr is not None:
                earlier_ptr += row * earlier_stride
                for start in range(0, earlier_columns, BLOCK):
                    columns = start + tl.arange(0, BLOCK)
                    mask = columns < earlier_columns
                    e = tl.load(earlier_ptr + columns, mask=mask, other=0.0).to(tl.float32) * decay
                    tl.store(earlier_ptr + columns, e.to(earlier_ptr.dtype.element_ty), mask=mask)
            pivot = top
            lane_sum = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, C, BLOCK):
                columns, mask, z, _, e = _exp_tile(
                    logits_ptr, bias_ptr, start, label, C, end, pivot, scale, cap, inner, BLOCK
                )
                lane_sum += e
                if out_ptr is not None:
                    _store_exp(out_ptr, columns, end, z, e, cap_slope)
            total = tl.sum(lane_sum, 0)
    tl.store(pivot_ptr + row, pivot)
    tl.store(others_ptr + row, others + total)
    if logit_sum_ptr is not None:
        tl.store(logit_sum_ptr + row, tl.load(logit_sum_ptr + row) + tl.sum(lane_total, 0))
    if argmax_ptr is not None:
        slice_max = tl.max(lane_max, 0)
        slice_argmax = tl.min(tl.where(lane_max == slice_max, lane_argmax, C), 0)
        old_top = tl.load(top_ptr + row)
        old_argmax = tl.load(argmax_ptr + row)
        tl.store(argmax_ptr + row, tl.where(slice_max > old_top, slice_argmax.to(tl.int64) + v_start, old_argmax))
        tl.store(top_ptr + row, tl.maximum(old_top, slice_max))


_TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _scalars(transform: LogitTransform) -> dict[str, float | None]:
    """scale, cap and inner; those that a call without a softcap leaves out: None."""
    return {name: value or None for name, value in transform.scalars.items()}


def _cap_slope(transform: LogitTransform) -> float | None:
    return transform.inverse_cap or None


def on_device_of(t: Tensor):
    """Triton launches on the current device, which need not be the tensor's (models spread over several)."""
    return torch.cuda.device_of(t) if t.is_cuda else contextlib.nullcontext()


def _block(columns: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(columns)))


def _padded(tile_nc: Tensor) -> bool:
    """Return whether rows whose columns are no multiple of 16 have memory up to a multiple of ROW_ELEMENTS."""
    n, columns = tile_nc.shape
    stride, offset, end = tile_nc.stride(0), tile_nc.storage_offset(), aligned(columns)
    if columns % 16 == 0 or stride % ROW_ELEMENTS or offset % ROW_ELEMENTS:
        return False
    return offset + (n - 1) * stride + end <= tile_nc.untyped_storage().nbytes() // tile_nc.itemsize


def temporary_bytes(n: int, columns: int, tile: torch.dtype) -> int:
    """Bytes that one call allocates in addition to an (n, columns) tile: none."""
    return 0


def row_stats(
    logits_nv: Tensor,
    labels_nk: Tensor,
    stats: RowStats,
    v_start: int,
    bias_v: Tensor | None,
    transform: LogitTransform,
) -> None:
    """Merge one vocabulary slice into the running statistics; the tile is left as it is."""
    n, columns = logits_nv.shape
    if n == 0:
        return
    with on_device_of(logits_nv):
        _row_stats_kernel[(n,)](
            *(logits_nv, packed(bias_v), labels_nk.contiguous(), stats.max_N, stats.sumexp_N, stats.label_logit_NK),
            *(stats.shifted_sum_N, stats.logit_sum_N, stats.argmax_N),
            *(logits_nv.stride(0), columns, labels_nk.shape[1], v_start),
            **_scalars(transform),
            BLOCK=_block(columns, BLOCK_COLUMNS),
            PADDED=_padded(logits_nv),
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )


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
    """Same contract as ``rows_torch.row_exp``."""
    n, columns = logits_nv.shape
    if n == 0:
        return
    block = EXP_BLOCK_COLUMNS if bias_v is None and transform.softcap is None else EXP_BLOCK_COLUMNS // 2
    with on_device_of(logits_nv):
        _row_exp_kernel[(n,)](
            *(logits_nv, packed(bias_v), labels_nk.contiguous(), stats.max_N, stats.others_N, stats.logit_sum_N),
            *(stats.argmax_N, stats.top_N, out_nv, earlier_nc),
            *(0 if tile is None else tile.stride(0) for tile in (logits_nv, out_nv, earlier_nc)),
            *(columns, 0 if earlier_nc is None else earlier_nc.shape[1], v_start),
            **_scalars(transform),
            cap_slope=_cap_slope(transform),
            largest_sum=LARGEST_SUM,
            BLOCK=_block(columns, block),
            PADDED=_padded(logits_nv) and (out_nv is None or _padded(out_nv)),
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )


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
    """The gradient in the raw logits, (n, columns) in ``out_dtype``, rounded once, in the tile's own storage."""
    n, columns = logits_nv.shape
    ratio = logits_nv.element_size() // out_dtype.itemsize
    out_nv = logits_nv.view(out_dtype)[:, :columns]
    if n == 0:
        return out_nv
    (max_n, log_sum_n), given = norms_2n, coefficients
    with on_device_of(logits_nv):
        _row_grad_kernel[(n,)](
            *(logits_nv, *map(packed, (bias_v, labels_nk, max_n, log_sum_n))),
            *map(packed, (given.prob_N, given.logp_slope_N, given.constant_N, given.label_NK)),
            *(logits_nv.stride(0), logits_nv.stride(0) * ratio, columns, labels_nk.shape[1], v_start),
            **_scalars(transform),
            cap_slope=_cap_slope(transform),
            BLOCK=_block(columns, BLOCK_COLUMNS),
            PADDED=_padded(logits_nv),
            OUT=_TRITON_DTYPE[out_dtype],
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )
    return out_nv
