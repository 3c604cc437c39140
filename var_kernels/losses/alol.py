"""Advantage-leftover-lunch (A-LoL) and its relatives: offline policy gradient on sequences as single actions."""

import math

from torch import Tensor

from var_kernels.losses.checks import check_range, check_share, read_rows, times
from var_kernels.losses.registry import register

_SOURCE = "A-LoL, arXiv 2305.14718, and its authors' code"


def alol_advantage(reward: Tensor, value: Tensor, *, squash: bool = True) -> Tensor:
    """A+ = max(sigmoid(reward) - value, 0): (B,), detached. Sequences worse than expected carry no loss.

    Args:
        reward: (B,) reward of each response, reward units; the sigmoid takes it to [0, 1].
        value: (B,) V(x), the expected sigmoid(reward) of the reference policy's own responses, in the same units as
            what it is taken from (a ``ValueHead`` on the frozen reference, trained on the squared error).
        squash: False for rewards that are in [0, 1] already: A+ = max(reward - value, 0).

    Returns:
        (B,), fp32 (fp64 for fp64), reward units.

    Raises:
        TypeError, ValueError: integer tensors, shapes that differ or are not (B,).

    Source: A-LoL, arXiv 2305.14718; the sigmoid as in the authors' code.
    """
    reward_B, value_B = read_rows(reward=reward, value=value)
    return (_squashed(reward_B, squash) - value_B).clamp(min=0.0)


@register(
    "alol",
    pass_class="C",
    formula="-A+ sg(clip(exp(s - sr), 1 - e, 1 + e)) s",
    source=_SOURCE,
    evidence="code",
    compares="data",
)
def alol_loss(
    policy_logp: Tensor,
    ref_logp: Tensor,
    reward: Tensor,
    value: Tensor,
    *,
    clip_range: float = 0.9,
    squash: bool = True,
) -> Tensor:
    """A-LoL: the positive advantage times the clipped importance ratio of the whole sequence, which is a constant.

        loss = -A+ sg(clip(exp(s - sr), 1 - e, 1 + e)) s          nats x reward units
        A+ = max(sigmoid(reward) - value, 0)

    The ratio keeps its value outside the clip range too (the gradient does not stop there, as PPO's does). Class C:
    the gradient of each token needs the sequence's sum s. Ratio, sum over tokens and e = 0.9 are those of the authors'
    code.

    Args:
        value, squash: see ``alol_advantage``.
        clip_range: e in [0, 1]; 0: ratio 1, no importance weight.
    """
    advantage_B = alol_advantage(reward, value, squash=squash)
    return times(-advantage_B * _clipped_ratio(policy_logp, ref_logp, clip_range), policy_logp)


@register(
    "alol_seq",
    pass_class="B",
    formula="-A+ sg(clip(exp(lp - lpr), 1 - e, 1 + e)) lp",
    source=_SOURCE,
    evidence="code",
    compares="data",
)
def alol_seq_loss(token_logp: Tensor, ref_token_logp: Tensor, advantage: Tensor, *, clip_range: float = 0.9) -> Tensor:
    """A-LoL (seq.): an importance ratio for each token, despite the name; element by element.

        loss_t = -A+ sg(clip(exp(lp_t - lpr_t), 1 - e, 1 + e)) lp_t          nats x reward units

    Class B: ``linear_token_loss(hidden, lm_head_weight, labels, alol_seq_loss, (ref_token_logp, advantage))``.

    Args:
        advantage: (...) A+ of the token's sequence (``alol_advantage``, repeated over its tokens).
        clip_range: e in [0, 1].
    """
    return times(-advantage * _clipped_ratio(token_logp, ref_token_logp, clip_range), token_logp)


@register("alol_ref_free", pass_class="A", formula="-A+ s", source=_SOURCE, evidence="code", compares="data")
def alol_ref_free_loss(policy_logp: Tensor, reward: Tensor, value: Tensor, *, squash: bool = True) -> Tensor:
    """A-LoL without a reference policy: the ratio is 1, loss = -A+ s, nats x reward units.

    Class A: ``linear_weighted_nll`` with token weights A+ does it in one pass, and leaves sequences of A+ = 0 out.

    Args:
        value, squash: see ``alol_advantage``.
    """
    return times(-alol_advantage(reward, value, squash=squash), policy_logp)


@register(
    "alol_kl",
    pass_class="A",
    formula="-A+ s + beta (s - sr)",
    source=_SOURCE,
    evidence="code",
    defaults={"beta": 0.1},
    compares="data",
)
def alol_kl_loss(
    policy_logp: Tensor, ref_logp: Tensor, reward: Tensor, value: Tensor, *, beta: float, squash: bool = True
) -> Tensor:
    """A-LoL with a KL term in place of the ratio: loss = -A+ s + beta (s - sr), nats x reward units.

    The gradient in s is the constant -(A+ - beta): in truth an advantage shifted by beta, negative where A+ < beta,
    and no estimate of a KL gradient unless the responses come from the policy itself. Class A: token weights A+ - beta.

    Args:
        value, squash: see ``alol_advantage``.
        beta: >= 0, reward units a nat.
    """
    check_range("beta", beta, closed=True, remedy="it weighs the distance from the reference")
    slope_B = beta - alol_advantage(reward, value, squash=squash)
    return times(slope_B, policy_logp) - beta * ref_logp


@register(
    "rlol",
    pass_class="C",
    formula="-R sg(clip(exp(s - sr), 1 - e, 1 + e)) s",
    source=_SOURCE,
    evidence="code",
    reads_draws=True,
)
def rlol_loss(
    policy_logp: Tensor, ref_logp: Tensor, reward: Tensor, *, clip_range: float = 0.9, squash: bool = True
) -> Tensor:
    """Reward LoL: A-LoL with the reward R = sigmoid(reward) in place of the advantage; every sequence counts.

        loss = -R sg(clip(exp(s - sr), 1 - e, 1 + e)) s          nats x reward units

    Equal to ``alol_loss`` at value 0. Class C.

    Args:
        squash: False for rewards in [0, 1] already.
        clip_range: e in [0, 1].
    """
    return times(-_squashed(reward, squash) * _clipped_ratio(policy_logp, ref_logp, clip_range), policy_logp)


@register("rgold", pass_class="B", formula="-R sg(max(p, 0.1)) lp", source=_SOURCE, evidence="code", reads_draws=True)
def rgold_loss(token_logp: Tensor, advantage: Tensor, *, min_prob: float = 0.1) -> Tensor:
    """Reward GOLD: the policy's own probability, bounded from below, stands for the importance ratio of each token.

        loss_t = -R sg(max(p_t, min_prob)) lp_t          nats x reward units

    Class B: ``linear_token_loss(hidden, lm_head_weight, labels, rgold_loss, (advantage,))``. min_prob=1: weighted
    behaviour cloning. GOLD is arXiv 2009.07839.

    Args:
        advantage: (...) R = sigmoid(reward) of the token's sequence, repeated over its tokens.
        min_prob: in [0, 1].
    """
    check_share("min_prob", min_prob, "it bounds a probability from below")
    return times(-advantage * token_logp.detach().exp().clamp(min=min_prob), token_logp)


@register("weighted_bc", pass_class="A", formula="-R s", source=_SOURCE, evidence="code", reads_draws=True)
def weighted_bc_loss(policy_logp: Tensor, reward: Tensor, *, squash: bool = True) -> Tensor:
    """Behaviour cloning weighted by the reward R = sigmoid(reward): loss = -R s, nats x reward units.

    Class A: ``linear_weighted_nll`` with token weights R does it in one pass.

    Args:
        squash: False for rewards in [0, 1] already.
    """
    return times(-_squashed(reward, squash), policy_logp)


def _squashed(reward: Tensor, squash: bool) -> Tensor:
    return reward.sigmoid() if squash else reward


def _clipped_ratio(policy_logp: Tensor, ref_logp: Tensor, clip_range: float) -> Tensor:
    """exp(policy - ref) in [1 - e, 1 + e], detached; clipped before the exponential, which cannot overflow then."""
    check_share("clip_range", clip_range, "the ratio is kept in 1 - e ... 1 + e")
    low = math.log(1 - clip_range) if clip_range < 1 else -math.inf
    return (policy_logp.detach() - ref_logp).clamp(low, math.log(1 + clip_range)).exp()
