"""The pair kernels in Triton, fp32 arithmetic: one program per row walks both tiles' columns in blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pairs import KINDS, NEGLIGIBLE, PairOptions
from .rows import packed
from .rows_triton import (
    _TRITON_DTYPE,
    LAUNCH_OPTIONS,
    NUM_WARPS,
    ROW_COUNTS,
    _block,
    _cap_slope,
    _scalars,
    _transformed,
    on_device_of,
)

# A narrower gradient lies in the tile's own storage.
COPIES_GRADIENT = False
# Columns a program holds at a time of each tile: 8 elements a thread, half of it in the mixture's sums.
BLOCK_COLUMNS = 2048
_NEGLIGIBLE = tl.constexpr(NEGLIGIBLE)
REVERSE, FORWARD, JSD = (tl.constexpr(i) for i in range(3))


@triton.jit
def _pivot(maximum):
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _log_share(p, q, m, beta):
    """log(p / m) = log(1 + beta (p - q) / m) where p is near q, with what the sum rounds away."""
    share = p / m
    x = beta * (p - q) / m
    u = 1.0 + x
    log = tl.where(share < 0.5, tl.log(share), tl.log(u) + (x - (u - 1.0)) / u)
    return tl.where(p < _NEGLIGIBLE, 0.0, log)


@triton.jit
def _pair_of(
    z_ptr, w_ptr, bias_ptr, ref_bias_ptr, start, C, scale, cap, inner, ref_scale, ref_cap, ref_inner,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(columns, mask, z, w) of one block; -inf beyond the tile."""
    columns = start + tl.arange(0, BLOCK)
    mask = columns < C
    z = tl.load(z_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    z = _transformed(z, bias_ptr, columns, mask, scale, cap, inner)
    w = _transformed(w, ref_bias_ptr, columns, mask, ref_scale, ref_cap, ref_inner)
    return columns, mask, tl.where(mask, z, float("-inf")), tl.where(mask, w, float("-inf"))


@triton.jit
def _moved(shifted, sum_a, drop_a, drop_b):
    """sum exp(a - max_a) t over maxima that rose by -drop_a and -drop_b."""
    decay = tl.exp(drop_a)
    # inf times 0, of a probability that is 0 over the new maximum
    return tl.where((decay == 0.0) & (shifted == shifted), 0.0, decay * (shifted + (drop_a - drop_b) * sum_a))


@triton.jit(do_not_specialize=ROW_COUNTS)
def _pair_stats_kernel(
    z_ptr,  # (n, C), any floating dtype
    w_ptr,  # (n, C)
    bias_ptr,  # (C,)
    ref_bias_ptr,
    state_ptr,  # (6, n), see kernels/pairs.py
    z_stride,
    w_stride,
    state_stride,
    C,
    scale,
    cap,
    inner,
    ref_scale,
    ref_cap,
    ref_inner,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    w_ptr += row * w_stride
    # a weighs the terms of the KL: p, or q. Its statistics' first row in the state, and b's.
    at_a: tl.constexpr = 2 if KIND == FORWARD else 0
    at_b: tl.constexpr = 0 if KIND == FORWARD else 2
    state_ptr += row
    # Below every finite logit that a network makes, and finite, so that differences are never NaN.
    lowest = -1e38
    max_a = tl.full((BLOCK,), lowest, tl.float32)
    max_b = tl.full((BLOCK,), lowest, tl.float32)
    sum_a = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    shifted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        _, _, z, w = _pair_of(
            z_ptr, w_ptr, bias_ptr, ref_bias_ptr, start, C, scale, cap, inner, ref_scale, ref_cap, ref_inner, BLOCK
        )
        if KIND == FORWARD:
            a, b = w, z
        else:
            a, b = z, w
        above_a = a > max_a
        above_b = b > max_b
        # One exponential an element, of minus the distance to the lane's maximum, whichever side is the larger.
        decay_a = tl.exp(-tl.abs(a - max_a))
        decay_b = tl.exp(-tl.abs(b - max_b))
        new_a = tl.where(above_a, a, max_a)
        new_b = tl.where(above_b, b, max_b)
        if KIND != JSD:
            e = tl.where(above_a, 1.0, decay_a)
            term = tl.where(e == 0.0, 0.0, e * ((a - new_a) - (b - new_b)))
            kept = tl.where(above_a, decay_a, 1.0)
            moved = shifted + ((max_a - new_a) - (max_b - new_b)) * sum_a
            shifted = tl.where((kept == 0.0) & (shifted == shifted), 0.0, kept * moved) + term
        sum_a = tl.where(above_a, sum_a * decay_a + 1.0, sum_a + decay_a)
        sum_b = tl.where(above_b, sum_b * decay_b + 1.0, sum_b + decay_b)
        max_a = new_a
        max_b = new_b

    old_max_a = tl.maximum(tl.load(state_ptr + at_a * state_stride).to(tl.float32), lowest)
    old_max_b = tl.maximum(tl.load(state_ptr + at_b * state_stride).to(tl.float32), lowest)
    old_sum_a = tl.load(state_ptr + (at_a + 1) * state_stride).to(tl.float32)
    old_sum_b = tl.load(state_ptr + (at_b + 1) * state_stride).to(tl.float32)
    top_a = tl.maximum(tl.max(max_a, 0), old_max_a)
    top_b = tl.maximum(tl.max(max_b, 0), old_max_b)
    if KIND != JSD:
        old_shifted = tl.load(state_ptr + 4 * state_stride).to(tl.float32)
        total = tl.sum(_moved(shifted, sum_a, max_a - top_a, max_b - top_b), 0)
        total += _moved(old_shifted, old_sum_a, old_max_a - top_a, old_max_b - top_b)
        tl.store(state_ptr + 4 * state_stride, total)
    total_a = tl.sum(sum_a * tl.exp(max_a - top_a), 0) + old_sum_a * tl.exp(old_max_a - top_a)
    total_b = tl.sum(sum_b * tl.exp(max_b - top_b), 0) + old_sum_b * tl.exp(old_max_b - top_b)
    tl.store(state_ptr + (at_a + 1) * state_stride, total_a)
    tl.store(state_ptr + (at_b + 1) * state_stride, total_b)
    # Nothing but -inf so far: no maximum either.
    tl.store(state_ptr + at_a * state_stride, tl.where(top_a == lowest, float("-inf"), top_a))
    tl.store(state_ptr + at_b * state_stride, tl.where(top_b == lowest, float("-inf"), top_b))


@triton.jit(do_not_specialize=ROW_COUNTS)
def _pair_mixture_kernel(
    z_ptr,
    w_ptr,
    bias_ptr,
    ref_bias_ptr,
    state_ptr,
    z_stride,
    w_stride,
    state_stride,
    C,
    scale,
    cap,
    inner,
    ref_scale,
    ref_cap,
    ref_inner,
    beta,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    w_ptr += row * w_stride
    state_ptr += row
    pivot_z = _pivot(tl.load(state_ptr).to(tl.float32))
    pivot_w = _pivot(tl.load(state_ptr + 2 * state_stride).to(tl.float32))
    inverse_z = 1.0 / tl.load(state_ptr + state_stride).to(tl.float32)
    inverse_w = 1.0 / tl.load(state_ptr + 3 * state_stride).to(tl.float32)
    of_p = tl.zeros((BLOCK,), tl.float32)
    of_q = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        _, _, z, w = _pair_of(
            z_ptr, w_ptr, bias_ptr, ref_bias_ptr, start, C, scale, cap, inner, ref_scale, ref_cap, ref_inner, BLOCK
        )
        p = tl.exp(z - pivot_z) * inverse_z
        q = tl.exp(w - pivot_w) * inverse_w
        m = beta * q + (1.0 - beta) * p
        of_p += p * _log_share(p, q, m, beta)
        of_q += q * _log_share(q, p, m, 1.0 - beta)
    first_ptr, second_ptr = state_ptr + 4 * state_stride, state_ptr + 5 * state_stride
    tl.store(first_ptr, tl.load(first_ptr).to(tl.float32) + tl.sum(of_p, 0))
    tl.store(second_ptr, tl.load(second_ptr).to(tl.float32) + tl.sum(of_q, 0))


@triton.jit(do_not_specialize=ROW_COUNTS)
def _pair_grad_kernel(
    z_ptr,  # (n, C)
    w_ptr,
    bias_ptr,
    ref_bias_ptr,
    state_ptr,
    upstream_ptr,  # (n,)
    out_ptr,  # (n, C), or z where it is overwritten: in its own dtype, or in OUT at twice the row stride
    z_stride,
    w_stride,
    out_stride,
    state_stride,
    C,
    scale,
    cap,
    inner,
    ref_scale,
    ref_cap,
    ref_inner,
    cap_slope,
    beta,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    OUT: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if IN_PLACE:
        out_ptr = z_ptr.to(tl.pointer_type(OUT), bitcast=True)
    out_ptr += row * out_stride
    z_ptr += row * z_stride
    w_ptr += row * w_stride
    state_ptr += row
    pivot_z = _pivot(tl.load(state_ptr).to(tl.float32))
    pivot_w = _pivot(tl.load(state_ptr + 2 * state_stride).to(tl.float32))
    inverse_z = 1.0 / tl.load(state_ptr + state_stride).to(tl.float32)
    inverse_w = 1.0 / tl.load(state_ptr + 3 * state_stride).to(tl.float32)
    mean = tl.load(state_ptr + 4 * state_stride).to(tl.float32)
    if KIND == REVERSE:
        mean *= inverse_z
    factor = tl.load(upstream_ptr + row).to(tl.float32) * scale
    # In order: a narrower output overwrites only columns that were read before.
    for start in range(0, C, BLOCK):
        columns, mask, z, w = _pair_of(
            z_ptr, w_ptr, bias_ptr, ref_bias_ptr, start, C, scale, cap, inner, ref_scale, ref_cap, ref_inner, BLOCK
        )
        p = tl.exp(z - pivot_z) * inverse_z
        if KIND == REVERSE:
            grad = tl.where(p == 0.0, 0.0, p * (((z - pivot_z) - (w - pivot_w)) - mean))
        else:
            q = tl.exp(w - pivot_w) * inverse_w
            if KIND == FORWARD:
                grad = p - q
            else:
                m = beta * q + (1.0 - beta) * p
                grad = (1.0 - beta) * p * (_log_share(p, q, m, beta) - mean)
        if cap is not None:
            tanh = z * cap_slope
            grad *= 1.0 - tanh * tanh
        # Every thread has read its columns before any writes into the storage that they share.
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(out_ptr + columns, (grad * factor).to(OUT), mask=mask)
        if IN_PLACE:
            tl.debug_barrier()


def temporary_bytes(n: int, columns: int, tile: torch.dtype) -> int:
    """Bytes that one call allocates in addition to two (n, columns) tiles: none."""
    return 0


def pair_rows(
    z_nv: Tensor,
    w_nv: Tensor,
    state_6n: Tensor,
    pair: PairOptions,
    bias_v: Tensor | None = None,
    ref_bias_v: Tensor | None = None,
    *,
    stats: bool = False,
    mixture: bool = False,
    upstream_n: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out_nv: Tensor | None = None,
) -> Tensor | None:
    """See ``kernels/pairs.py``."""
    n, columns = z_nv.shape
    out_dtype, transform = out_dtype or z_nv.dtype, pair.transform
    in_place = out_nv is None
    if in_place:
        out_nv = z_nv.view(out_dtype)[:, :columns]
    if n == 0:
        return None if upstream_n is None else out_nv
    tiles = (z_nv, w_nv, packed(bias_v), packed(ref_bias_v), state_6n)
    options = {
        "C": columns,
        "state_stride": state_6n.stride(0),
        "z_stride": z_nv.stride(0),
        "w_stride": w_nv.stride(0),
        **_scalars(transform),
        **{f"ref_{name}": value for name, value in _scalars(pair.ref_transform).items()},
        "BLOCK": _block(columns, BLOCK_COLUMNS),
        "num_warps": NUM_WARPS,
        **LAUNCH_OPTIONS,
    }
    kind = KINDS.index(pair.kind)
    with on_device_of(z_nv):
        if stats:
            _pair_stats_kernel[(n,)](*tiles, KIND=kind, **options)
        if mixture:
            _pair_mixture_kernel[(n,)](
                *tiles, beta=pair.beta, **options | {"BLOCK": _block(columns, BLOCK_COLUMNS // 2)}
            )
        if upstream_n is not None:
            _pair_grad_kernel[(n,)](
                *tiles,
                upstream_n.contiguous(),
                z_nv if in_place else out_nv,
                out_stride=out_nv.stride(0),
                cap_slope=_cap_slope(transform),
                beta=pair.beta,
                KIND=kind,
                OUT=_TRITON_DTYPE[out_nv.dtype],
                IN_PLACE=in_place,
                **options,
            )
    return None if upstream_n is None else out_nv
