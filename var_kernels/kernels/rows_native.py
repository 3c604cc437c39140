"""The row kernels in C++ (csrc/), fp32 arithmetic, CPU only. Each row is one thread's: their number changes no bit.

The extension is optional; ``obstacle`` says why it cannot run here.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from .rows import LogitTransform, RowCoefficients, RowStats, packed

# Dtypes of a tile. fp64 is left to plain torch.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A narrower gradient lies in the tile's own storage.
COPIES_GRADIENT = False
# Tiles that stay in the last-level cache are faster than larger ones.
CACHED_TILES = True
READS_PIVOTS = False
# Instruction set of the kernels: None for the best of this machine, else 0 (baseline), 1 (AVX2), 2 (AVX-512).
LEVEL: int | None = None
LEVEL_NAMES = ("baseline vectors", "AVX2", "AVX-512")
# From a checkout; needs a C++ compiler, torch and setuptools >= 77.
BUILD_COMMAND = "pip install --no-build-isolation --no-deps -e ."
# Ops of the extension that work on tensors: a binary older than its sources may lack the newest.
OPS = ("row_stats", "row_exp", "row_grad", "exp_into", "pair_rows", "product_into", "product_exp")


@functools.cache
def obstacle() -> str | None:
    """Reason why the extension cannot run, or None; the first call loads it."""
    spec = importlib.util.find_spec(f"{__package__}._native")
    if spec is None or spec.origin is None:
        return "the C++ extension is not built"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the C++ extension does not load: {str(error).splitlines()[0]}"
    if not all(hasattr(torch.ops.var_kernels_native, name) for name in OPS):
        return "the C++ extension is older than its sources; build it again"
    return None


def _ops():
    reason = obstacle()
    if reason:
        raise RuntimeError(f"the native row kernels cannot run: {reason}; in a checkout: {BUILD_COMMAND}")
    return torch.ops.var_kernels_native


@functools.cache
def best_level() -> int:
    """Index in ``LEVEL_NAMES`` of the best instruction set that this machine runs."""
    return _ops().best_level()


def _level() -> int:
    return best_level() if LEVEL is None else LEVEL


def temporary_bytes(n: int, columns: int, tile: torch.dtype) -> int:
    """Bytes that one call allocates in addition to an (n, columns) tile: none."""
    return 0


def exp(x: Tensor, level: int | None = None) -> Tensor:
    """The kernels' own exponential of a contiguous fp32 tensor: at most 1.02 ulp off, denormal results are 0."""
    y = torch.empty_like(x)
    _ops().exp_into(x, y, _level() if level is None else level)
    return y


def row_stats(
    logits_nv: Tensor,
    labels_nk: Tensor,
    stats: RowStats,
    v_start: int,
    bias_v: Tensor | None,
    transform: LogitTransform,
) -> None:
    """Merge one vocabulary slice into the running statistics; the tile is left as it is."""
    _ops().row_stats(
        *(logits_nv, labels_nk.contiguous(), stats.max_N, stats.sumexp_N, stats.label_logit_NK, stats.shifted_sum_N),
        *(stats.logit_sum_N, stats.argmax_N, v_start, packed(bias_v), *transform.scalars.values(), _level()),
    )


def exp_arguments(labels_nk, stats, v_start, bias_v, transform, out_nv, earlier_nc):
    """Arguments of ``row_exp`` and of gemm_native's ``product_exp``: statistics, place, transform, memory, level."""
    given = labels_nk.contiguous(), stats.max_N, stats.others_N
    place = v_start, packed(bias_v), *transform.scalars.values(), transform.inverse_cap
    return given, place, (out_nv, earlier_nc), _level()


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
    given, place, memory, level = exp_arguments(labels_nk, stats, v_start, bias_v, transform, out_nv, earlier_nc)
    _ops().row_exp(logits_nv, *given, stats.logit_sum_N, stats.argmax_N, stats.top_N, *place, *memory, level)


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
    given = coefficients
    _ops().row_grad(
        logits_nv,
        *map(packed, (labels_nk, norms_2n, given.prob_N, given.label_NK, given.logp_slope_N, given.constant_N)),
        *(v_start, packed(bias_v), *transform.scalars.values(), transform.inverse_cap, out_dtype, _level()),
    )
    return logits_nv.view(out_dtype)[:, : logits_nv.shape[1]]
