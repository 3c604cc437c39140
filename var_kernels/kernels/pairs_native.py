"""The pair kernels in C++ (csrc/pairs.cpp), fp32 arithmetic, CPU only: each row is one thread's, its stages run one
after the other while it is in the cache.
"""

import torch
from torch import Tensor

from .pairs import KINDS, PairOptions
from .rows import packed
from .rows_native import _level, _ops

# A narrower gradient lies in the tile's own storage.
COPIES_GRADIENT = False


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
    transform, out_dtype = pair.transform, out_dtype or z_nv.dtype
    _ops().pair_rows(
        *(z_nv, w_nv, state_6n, KINDS.index(pair.kind), pair.beta),
        stats + 2 * mixture + 4 * (upstream_n is not None),
        *(packed(bias_v), *transform.scalars.values(), packed(ref_bias_v), *pair.ref_transform.scalars.values()),
        None if upstream_n is None else upstream_n.float().contiguous(),
        *(transform.inverse_cap, out_dtype, out_nv, _level()),
    )
    if upstream_n is None:
        return None
    return z_nv.view(out_dtype)[:, : z_nv.shape[1]] if out_nv is None else out_nv
