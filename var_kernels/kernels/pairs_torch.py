"""The pair kernels in plain torch: any device, any floating dtype, in row blocks that stay in cache."""

import torch
from torch import Tensor

from . import rows_torch
from .pairs import NEGLIGIBLE, PairOptions, raise_maxima_
from .rows_torch import _blocks, _transformed

# A gradient in another dtype than the tile's is a copy.
COPIES_GRADIENT = True


def temporary_bytes(n: int, columns: int, tile: torch.dtype) -> int:
    """Upper bound of what one call allocates beside two (n, columns) tiles: six temporaries of a block each."""
    block = min(max(rows_torch.BLOCK_ELEMENTS, columns), n * columns)
    return 6 * block * torch.promote_types(tile, torch.float32).itemsize


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
    math = torch.promote_types(torch.promote_types(z_nv.dtype, w_nv.dtype), torch.float32)
    for rows in _blocks(*z_nv.shape):
        state_6, block_nv = state_6n[:, rows], z_nv[rows]
        both = (
            _transformed(block_nv.to(math), bias_v, pair.transform, inplace=False),
            _transformed(w_nv[rows].to(math), ref_bias_v, pair.ref_transform, inplace=False),
        )
        if stats:
            _merge(*both, state_6, pair.kind)
        if mixture:
            _add_mixture(*both, state_6, pair.beta)
        if upstream_n is not None:
            grad_nv = _gradient(*both, state_6, pair, upstream_n[rows])
            (block_nv if out_nv is None else out_nv[rows]).copy_(grad_nv)
    if upstream_n is None:
        return None
    return z_nv.to(out_dtype or z_nv.dtype) if out_nv is None else out_nv


def _pivot(max_n: Tensor) -> Tensor:
    return max_n.masked_fill(max_n == -torch.inf, 0.0)


def _above(tile_nv: Tensor, max_n: Tensor) -> Tensor:
    """Differences with the row's maximum: first of all, so that large logits keep their digits."""
    return tile_nv - _pivot(max_n).to(tile_nv.dtype).unsqueeze(1)


def _merge(z_nv: Tensor, w_nv: Tensor, state_6: Tensor, kind: str) -> None:
    maxima = (torch.maximum(state_6[row], tile_nv.amax(1)) for row, tile_nv in ((0, z_nv), (2, w_nv)))
    raise_maxima_(state_6, *maxima, kind)
    z_nv, w_nv = _above(z_nv, state_6[0]), _above(w_nv, state_6[2])
    exp_z_nv, exp_w_nv = z_nv.exp(), w_nv.exp()
    if kind != "jsd":
        exp_a_nv, a_nv, b_nv = (exp_w_nv, w_nv, z_nv) if kind == "forward" else (exp_z_nv, z_nv, w_nv)
        # where a forbids a token the difference may be NaN, and its probability is 0
        state_6[4] += a_nv.sub_(b_nv).mul_(exp_a_nv).masked_fill_(exp_a_nv == 0, 0.0).sum(1)
    state_6[1] += exp_z_nv.sum(1)
    state_6[3] += exp_w_nv.sum(1)


def _probabilities(z_nv: Tensor, max_n: Tensor, sum_n: Tensor) -> Tensor:
    return _above(z_nv, max_n).exp_().mul_(sum_n.reciprocal().to(z_nv.dtype).unsqueeze(1))


def _log_share(p_nv: Tensor, q_nv: Tensor, mixture_nv: Tensor, beta: float) -> Tensor:
    """log(p / m) = log(1 + beta (p - q) / m), where p is near q; 0 where p is negligible."""
    share_nv = p_nv / mixture_nv
    log_nv = ((p_nv - q_nv) * beta).div_(mixture_nv).log1p_()
    return torch.where(share_nv < 0.5, share_nv.log_(), log_nv).masked_fill_(p_nv < NEGLIGIBLE, 0.0)


def _add_mixture(z_nv: Tensor, w_nv: Tensor, state_6: Tensor, beta: float) -> None:
    p_nv, q_nv = _probabilities(z_nv, state_6[0], state_6[1]), _probabilities(w_nv, state_6[2], state_6[3])
    mixture_nv = beta * q_nv + (1 - beta) * p_nv
    state_6[4] += _log_share(p_nv, q_nv, mixture_nv, beta).mul_(p_nv).sum(1)
    state_6[5] += _log_share(q_nv, p_nv, mixture_nv, 1 - beta).mul_(q_nv).sum(1)


def _gradient(z_nv: Tensor, w_nv: Tensor, state_6: Tensor, pair: PairOptions, upstream_n: Tensor) -> Tensor:
    transform, math = pair.transform, z_nv.dtype
    p_nv = _probabilities(z_nv, state_6[0], state_6[1])
    if pair.kind == "reverse":
        mean_n = (state_6[4] / state_6[1]).to(math)
        difference_nv = _above(z_nv, state_6[0]).sub_(_above(w_nv, state_6[2])).sub_(mean_n.unsqueeze(1))
        grad_nv = difference_nv.mul_(p_nv).masked_fill_(p_nv == 0, 0.0)
    elif pair.kind == "forward":
        grad_nv = p_nv.sub_(_probabilities(w_nv, state_6[2], state_6[3]))
    else:
        q_nv = _probabilities(w_nv, state_6[2], state_6[3])
        mixture_nv = pair.beta * q_nv + (1 - pair.beta) * p_nv
        above_nv = _log_share(p_nv, q_nv, mixture_nv, pair.beta).sub_(state_6[4].to(math).unsqueeze(1))
        grad_nv = above_nv.mul_(p_nv).mul_(1 - pair.beta)
    grad_nv.mul_((upstream_n.to(math) * transform.slope).unsqueeze(1))
    return grad_nv if transform.softcap is None else grad_nv.mul_(transform.cap_slope(z_nv))
