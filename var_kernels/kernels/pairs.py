"""The contract of the pair kernels: two models' logits over one vocabulary, on one tile of each.

z_nv are the policy's raw logits, w_nv the reference's (a teacher's), before bias and transform; p = softmax(z) and
q = softmax(w). Every backend (plain torch, Triton, C++) has

    pair_rows(z_nv, w_nv, state_6n, pair, bias_v, ref_bias_v, *, stats, mixture, upstream_n, out_dtype, out_nv)

stats: merge the slice into the running statistics; 8 bytes of fp32 logits read an element.
mixture: add the slice to KL(p||m) and KL(q||m), once maxima and sums are complete.
upstream_n: the gradient of sum_n upstream_n divergence_n in the raw logits, 8 bytes read, 2 written in 16 bit; None:
    nothing. It overwrites z_nv and is returned in ``out_dtype``, no wider than z_nv; or it is written to ``out_nv``.

They run in this order where several are asked for, on whole rows. w_nv is left as it is.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .rows import LogitTransform

# A probability below it adds nothing to a mixture's sums: quotients there would be of denormals.
NEGLIGIBLE = 1e-30
KINDS = ("reverse", "forward", "jsd")


@dataclass(frozen=True)
class PairOptions:
    """The divergence, one of ``KINDS``, beta of "jsd", and both models' transforms."""

    kind: str
    beta: float = 0.5
    transform: LogitTransform = field(default_factory=LogitTransform)
    ref_transform: LogitTransform = field(default_factory=LogitTransform)

    @property
    def needs_whole_rows(self) -> bool:
        """Return whether the divergence itself needs complete maxima and sums first."""
        return self.kind == "jsd"


def empty_state(n: int, math: torch.dtype, device: torch.device) -> Tensor:
    """Statistics of no slice at all, (6, N): maximum and sum of exp(z - maximum) of z, those of w, and two sums.

    "reverse": sum exp(z - max_z) t with t = (z - max_z) - (w - max_w), whose terms stay small whatever the logits' size
    is, and nothing; "forward": the same with the roles changed; "jsd": KL(p||m) and KL(q||m). fp64 on a CPU, where
    slices are many; the arithmetic's dtype elsewhere.
    """
    dtype = torch.float64 if device.type in ("cpu", "meta") else math
    state_6N = torch.zeros(6, n, dtype=dtype, device=device)
    state_6N[0] = state_6N[2] = -torch.inf
    return state_6N


def raise_maxima_(state_6N: Tensor, max_z_N: Tensor, max_w_N: Tensor, kind: str) -> None:
    """Statistics over new maxima of z and w, no smaller than their own."""
    # 0 for a row of -inf alone; exp() of the lowest is 0 and 0 times it is 0, which -inf does not give
    pivots = (new_N.masked_fill(new_N == -torch.inf, 0.0) for new_N in (max_z_N, max_w_N))
    drop_z_N, drop_w_N = ((state_6N[at] - pivot_N).clamp(min=-1e30) for at, pivot_N in zip((0, 2), pivots, strict=True))
    if kind != "jsd":
        # a weighs the terms: the policy's, or the reference's
        forward = kind == "forward"
        sum_a_N, drop_a_N, drop_b_N = (
            (state_6N[3], drop_w_N, drop_z_N) if forward else (state_6N[1], drop_z_N, drop_w_N)
        )
        moved_N = (state_6N[4] + (drop_a_N - drop_b_N) * sum_a_N) * drop_a_N.exp()
        # inf times 0, of a probability that is 0 over the new maximum
        state_6N[4] = moved_N.where((drop_a_N.exp() > 0) | state_6N[4].isnan(), 0.0)
    state_6N[1] *= drop_z_N.exp()
    state_6N[3] *= drop_w_N.exp()
    state_6N[0], state_6N[2] = max_z_N, max_w_N


def divergence_of(state_6N: Tensor, pair: PairOptions) -> Tensor:
    """(N,) nats from complete statistics; never below 0, which only rounding could make it."""
    _, sum_z_N, _, sum_w_N, first_N, second_N = state_6N
    if pair.kind == "jsd":
        value_N = pair.beta * second_N + (1 - pair.beta) * first_N
    elif pair.kind == "reverse":
        value_N = first_N / sum_z_N - sum_z_N.log() + sum_w_N.log()
    else:
        value_N = first_N / sum_w_N - sum_w_N.log() + sum_z_N.log()
    return value_N.clamp(min=0.0)
