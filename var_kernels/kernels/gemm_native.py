"""bf16 products summed in fp32, in C++ (csrc/gemm.cpp): to an fp32 result, which torch's CPU GEMMs do not give, or
added to one in place.
"""

import functools

import torch
from torch import Tensor

from . import rows_native
from .compile_time import compile_time
from .rows import LogitTransform, RowStats

# Instructions of the GEMM: None for the fastest of this machine, else an index of LEVEL_NAMES; 0: torch's GEMMs. Those
# up to AVX-512 multiply widened operands, the last two pairs of bf16.
LEVEL: int | None = None
LEVEL_NAMES = ("torch", "baseline vectors", "AVX2", "AVX-512", "AVX-512 BF16", "AMX")
# Of a product that is rounded to bf16: its sums stay in the cache.
MAX_ROUNDED_DEPTH = 4096


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


def product_into(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out = or += left @ right: exact products, fp32 sums in an order that depends on the depth alone. To AMX and
    AVX-512 BF16 denormal operands are 0.
    """
    torch.ops.var_kernels_native.product_into(out, left, right, add, _level())


def supports_exp(hidden_nd: Tensor, weight_vd: Tensor) -> bool:
    """Return whether ``product_exp`` supports these operands."""
    return hidden_nd.shape[1] <= MAX_ROUNDED_DEPTH and _readable(hidden_nd) and _readable(weight_vd) and available()


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
