"""Divergence from a teacher of whom the log-probs of a few tokens are known."""

from typing import Literal

import torch
from torch import Tensor

from var_kernels.losses.checks import check_choice
from var_kernels.ops.checks import check_are_tensors

TAILS = ("bucket", "drop")
SPARSE_DIRECTIONS = ("forward", "reverse")
# The least log-prob of a tail: what is left of 1 in fp32 is known to about that.
_LOWEST = -16.0


def sparse_token_kl(
    logp: Tensor,
    teacher_logp: Tensor,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    tail: Literal["bucket", "drop"] = "bucket",
) -> Tensor:
    """KL of each token between a teacher's top-k log-probs and the student's of the same ids.

        "forward"   sum_k q_k (log q_k - log p_k)  + q_tail (log q_tail - log p_tail)
        "reverse"   sum_k p_k (log p_k - log q_k)  + p_tail (log p_tail - log q_tail)

    The tail is what the k leave of 1, one bucket of all other tokens: the result is then a KL of distributions over
    k + 1 events, at most the full one. "drop" leaves its term out, and divides the k by their sum on both sides.

    Args:
        logp: (..., K) the student's, of ``linear_logprob(hidden, weight, top_ids)``; differentiable.
        teacher_logp: (..., K) the teacher's, nats, <= 0; -inf for a place that holds no token. A constant.

    Returns:
        (...) nats, >= 0. A tail below e^-16 counts as e^-16, on both sides.

    Raises:
        ValueError: shapes that differ, a tail or a direction of another name.
    """
    check_choice("direction", direction, SPARSE_DIRECTIONS)
    check_choice("tail", tail, TAILS)
    check_are_tensors(logp=logp, teacher_logp=teacher_logp)
    if logp.shape != teacher_logp.shape or not logp.dim():
        raise ValueError(
            f"teacher_logp must have the shape of logp, {tuple(logp.shape)}, got {tuple(teacher_logp.shape)}; score "
            "the teacher's own ids: linear_logprob(hidden, weight, top_ids)"
        )
    q = teacher_logp.detach().to(logp.dtype)
    known = q > -torch.inf
    p = logp.masked_fill(~known, -torch.inf)
    if tail == "bucket":
        p, q = (torch.cat((t, _tail(t)), -1) for t in (p, q))
        known = torch.cat((known, torch.ones_like(known[..., :1])), -1)
    else:
        p, q = (t - t.logsumexp(-1, keepdim=True) for t in (p, q))
    p, q = p.masked_fill(~known, 0.0), q.masked_fill(~known, 0.0)
    a, b = (q, p) if direction == "forward" else (p, q)
    return (a.exp() * (a - b)).masked_fill(~known, 0.0).sum(-1).clamp(min=0.0)


def _tail(logp: Tensor) -> Tensor:
    """log(1 - sum exp logp), (..., 1)."""
    total = logp.logsumexp(-1, keepdim=True).clamp(max=-(2.0**-23))
    return (-total.expm1()).log().clamp(min=_LOWEST)
