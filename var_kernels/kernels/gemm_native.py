"""bf16 products summed in fp32, in C++ (csrc/gemm.cpp): to an fp32 result, which torch's CPU GEMMs do not give, or
added to one in place.
"""

import functools

import torch
from torch import Tensor

from . import rows_native

# Instructions of the GEMM: None for the best of this machine, else 0 (none: torch's GEMMs), 1 (AVX-512 BF16), 2 (AMX).
LEVEL: int | None = None
LEVEL_NAMES = ("torch", "AVX-512 BF16", "AMX")
# Of a product that is rounded to bf16: its sums stay in the cache.
_MAX_ROUNDED_DEPTH = 4096


@functools.cache
def best_level() -> int:
    """Index in ``LEVEL_NAMES`` of the best instructions that this machine runs."""
    return 0 if rows_native.obstacle() else torch.ops.var_kernels_native.best_gemm_level()


def _level() -> int:
    return best_level() if LEVEL is None else LEVEL


def runs() -> bool:
    """Whether this machine has the instructions."""
    return _level() > 0


def _readable(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.dtype == torch.bfloat16 and (1 in t.stride() or 1 in t.shape)


def takes(out: torch.dtype, left: Tensor, right: Tensor) -> bool:
    """Whether ``left @ right`` runs here: bf16 matrices with adjacent rows or columns, an fp32 result or a rounded one
    of moderate depth.
    """
    fits = out == torch.float32 or (out == torch.bfloat16 and left.shape[1] <= _MAX_ROUNDED_DEPTH)
    return fits and _readable(left) and _readable(right) and runs()


def product_into(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out = or += left @ right: exact products, fp32 sums in an order that depends on the depth alone. Denormal
    operands count as 0.
    """
    torch.ops.var_kernels_native.product_into(out, left, right, add, _level())
