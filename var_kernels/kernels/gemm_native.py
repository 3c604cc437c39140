"""The head's matrix products, of bf16 operands in C++ (csrc/gemm.cpp): summed in fp32, to an fp32 result, which torch's
CPU GEMMs do not give, added to one in place, or rounded once. Others are torch's (``gemm_torch``).
"""

import functools

import torch
from torch import Tensor

from . import gemm_torch, rows_native
from .compile_time import compile_time
from .rows import LogitTransform, RowStats

# Instructions of the GEMM: None for the fastest of this machine, else an index of LEVEL_NAMES; 0: torch's GEMMs. Those
# up to AVX-512 multiply widened operands, the last two pairs of bf16.
LEVEL: int | None = None
LEVEL_NAMES = ("torch", "baseline vectors", "AVX2", "AVX-512", "AVX-512 BF16", "AMX")
# Of a product that is rounded to bf16: its sums stay in the cache.
MAX_ROUNDED_DEPTH = 4096
# Rows of fp32 sums at a time, of a product too deep to be rounded as it is summed.
ROUNDED_ROWS = 1024


@functools.cache
def best_level() -> int:
    """Index in ``LEVEL_NAMES`` of the fastest instructions that this machine runs."""
    return 0 if rows_native.obstacle() else torch.ops.var_kernels_native.best_gemm_level()


def levels() -> list[int]:
    """Every level of the extension that this machine runs."""
    if rows_native.obstacle():
        return []
    return [i for i in range(1, len(LEVEL_NAMES)) if torch.ops.var_kernels_native.has_gemm_level(i)]


def _level() -> int:
    return best_level() if LEVEL is None else LEVEL


@compile_time
def available() -> bool:
    """Return whether the extension is there and not switched off."""
    return _level() > 0


def _readable(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.dtype == torch.bfloat16 and (1 in t.stride() or 1 in t.shape)


def supports(out: torch.dtype, left: Tensor, right: Tensor) -> bool:
    """Return whether ``left @ right`` is supported: bf16 matrices with adjacent rows or columns, an fp32 result or a
    rounded one of moderate depth.
    """
    fits = out == torch.float32 or (out == torch.bfloat16 and left.shape[1] <= MAX_ROUNDED_DEPTH)
    return fits and _readable(left) and _readable(right) and available()


def multiply(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out = or += left @ right where ``supports``: exact products, fp32 sums in an order that depends on the depth
    alone. To AMX and AVX-512 BF16 denormal operands are 0.
    """
    torch.ops.var_kernels_native.product_into(out, left, right, add, _level())


def traits(hidden_nd: Tensor, weight_vd: Tensor, tile: torch.dtype) -> gemm_torch.Traits:
    """Traits of bf16 operands, whose gradients are summed in place: in fp32, where they are too deep to be rounded as
    they are summed; else torch's.
    """
    found = gemm_torch.traits(hidden_nd, weight_vd, tile)
    if hidden_nd.dtype != torch.bfloat16 or not available():
        return found
    (n, d), v, deep = hidden_nd.shape, weight_vd.shape[0], MAX_ROUNDED_DEPTH
    rounding = 4 * max(min(n, ROUNDED_ROWS) if v > deep else 0, min(v, ROUNDED_ROWS) if n > deep else 0) * d
    ends_in_exp = d <= deep and _readable(hidden_nd) and _readable(weight_vd)
    return gemm_torch.Traits(found.upcasts and not supports(tile, hidden_nd, weight_vd.t()), ends_in_exp, 0, rounding)


def logits_into(out_nv: Tensor, hidden_nd: Tensor, weight_vd: Tensor, add: bool = False) -> None:
    """Compute ``gemm_torch.logits_into``."""
    weight_dv = weight_vd.t()
    if supports(out_nv.dtype, hidden_nd, weight_dv) and not (add and out_nv.dtype != torch.float32):
        multiply(out_nv, hidden_nd, weight_dv, add=add)
    else:
        gemm_torch.logits_into(out_nv, hidden_nd, weight_vd, add)


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute ``gemm_torch.product_into``."""
    if supports(out.dtype, left, right):
        multiply(out, left, right)
    elif out.dtype == torch.bfloat16 and supports(torch.float32, left, right):
        for start in range(0, out.shape[0], ROUNDED_ROWS):
            out_md, left_md = out[start : start + ROUNDED_ROWS], left[start : start + ROUNDED_ROWS]
            total_md = torch.empty_like(out_md, dtype=torch.float32, memory_format=torch.contiguous_format)
            multiply(total_md, left_md, right)
            out_md.copy_(total_md)
    else:
        gemm_torch.product_into(out, left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute ``gemm_torch.add_product``."""
    if total.dtype == torch.float32 and supports(total.dtype, left, right):
        multiply(total, left, right, add=True)
    else:
        gemm_torch.add_product(total, left, right)


def product_exp(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    labels_nk: Tensor,
    stats: RowStats,
    v_start: int,
    bias_v: Tensor | None,
    transform: LogitTransform,
    out_nv: Tensor | None,
    earlier_nc: Tensor | None,
) -> None:
    """``row_exp`` of the logits hidden W^T, which are taken as their sums are finished, and never written."""
    given, place, memory, level = rows_native.exp_arguments(
        labels_nk, stats, v_start, bias_v, transform, out_nv, earlier_nc
    )
    torch.ops.var_kernels_native.product_exp(hidden_nd, weight_vd, *given, *place, *memory, _level(), level)
