"""Advantage-leftover-lunch (A-LoL) and its relatives: offline policy gradient on sequences as single actions."""

import math

from torch import Tensor

from var_kernels.losses.checks import (
    check_constants,
    check_range,
    check_rows,
    check_sequences,
    check_share,
    check_tokens,
    times,
    wide,
)
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
    check_sequences(reward=reward, value=value)
    return (_squashed(reward, squash) - wide(value.detach())).clamp(min=0.0)


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

        loss = -A+ sg(clip(exp(s - sr), 1 - e, 1 + e)) s,     A+ = max(sigmoid(reward) - value, 0)

    The ratio keeps its value outside the clip range too (the gradient does not stop there, as PPO's does). Class C:
    the gradient of each token needs the sequence's sum s.

    Args:
        policy_logp: (B,) s, log-prob summed over tokens under the policy, nats; differentiated.
        ref_logp: (B,) sr, the same under the frozen reference, which the data stands for; a constant.
        reward, value, squash: see ``alol_advantage``.
        clip_range: e in [0, 1]; 0: ratio 1, no importance weight.

    Returns:
        (B,) loss of each sequence, nats times reward units, fp32 (fp64 for fp64); the caller reduces over sequences.

    Ratio, sum over tokens and e = 0.9 are those of the authors' code.
    """
    check_rows(policy_logp=policy_logp, ref_logp=ref_logp, reward=reward, value=value)
    check_constants(ref_logp=ref_logp)
    advantage_B = alol_advantage(reward, value, squash=squash)
    return times(-advantage_B * _clipped_ratio(policy_logp, ref_logp, clip_range), wide(policy_logp))


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

        loss_t = -A+ sg(clip(exp(lp_t - lpr_t), 1 - e, 1 + e)) lp_t

    Class B: ``linear_token_loss(hidden, lm_head_weight, labels, alol_seq_loss, (ref_token_logp, advantage))``.

    Args:
        token_logp: (...) log-prob of each label under the policy, nats; differentiated.
        ref_token_logp: (...) the same under the frozen reference.
        advantage: (...) A+ of the token's sequence (``alol_advantage``, repeated over its tokens).
        clip_range: e in [0, 1].

    Returns:
        The shape of token_logp, nats times reward units a token; the loss of a sequence is the sum over its tokens.
    """
    check_tokens(token_logp=token_logp, ref_token_logp=ref_token_logp, advantage=advantage)
    ratio = _clipped_ratio(token_logp, ref_token_logp, clip_range)
    return times(-wide(advantage.detach()) * ratio, wide(token_logp))


@register("alol_ref_free", pass_class="A", formula="-A+ s", source=_SOURCE, evidence="code", compares="data")
def alol_ref_free_loss(policy_logp: Tensor, reward: Tensor, value: Tensor, *, squash: bool = True) -> Tensor:
    """A-LoL without a reference policy: the ratio is 1, loss = -A+ s.

    Class A: ``linear_weighted_nll`` with token weights A+ does it in one pass, and leaves sequences of A+ = 0 out.

    Args:
        policy_logp: (B,) summed log-probs under the policy, nats; differentiated.
        reward, value, squash: see ``alol_advantage``.

    Returns:
        (B,) nats times reward units, fp32 (fp64 for fp64); the caller reduces over sequences.
    """
    check_rows(policy_logp=policy_logp, reward=reward, value=value)
    return times(-alol_advantage(reward, value, squash=squash), wide(policy_logp))


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
    """A-LoL with a KL term in place of the ratio: loss = -A+ s + beta (s - sr).

    The gradient in s is the constant -(A+ - beta): in truth an advantage shifted by beta, negative where A+ < beta,
    and no estimate of a KL gradient unless the responses come from the policy itself. Class A: token weights A+ - beta.

    Args:
        policy_logp: (B,) summed log-probs under the policy, nats; differentiated.
        ref_logp: (B,) the same under the frozen reference; enters the value only.
        reward, value, squash: see ``alol_advantage``.
        beta: >= 0, reward units a nat.

    Returns:
        (B,) nats times reward units, fp32 (fp64 for fp64); the caller reduces over sequences.
    """
    check_range("beta", beta, closed=True, remedy="it weighs the distance from the reference")
    check_rows(policy_logp=policy_logp, ref_logp=ref_logp, reward=reward, value=value)
    check_constants(ref_logp=ref_logp)
    slope_B = beta - alol_advantage(reward, value, squash=squash)
    return times(slope_B, wide(policy_logp)) - beta * wide(ref_logp.detach())


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

        loss = -R sg(clip(exp(s - sr), 1 - e, 1 + e)) s

    Equal to ``alol_loss`` at value 0. Class C.

    Args:
        policy_logp, ref_logp: (B,) summed log-probs, nats; the policy's are differentiated.
        reward: (B,) reward units; squash: False for rewards in [0, 1] already.
        clip_range: e in [0, 1].

    Returns:
        (B,) nats times reward units, fp32 (fp64 for fp64); the caller reduces over sequences.
    """
    check_sequences(policy_logp=policy_logp, ref_logp=ref_logp, reward=reward)
    return times(-_squashed(reward, squash) * _clipped_ratio(policy_logp, ref_logp, clip_range), wide(policy_logp))


@register("rgold", pass_class="B", formula="-R sg(max(p, 0.1)) lp", source=_SOURCE, evidence="code", reads_draws=True)
def rgold_loss(token_logp: Tensor, advantage: Tensor, *, min_prob: float = 0.1) -> Tensor:
    """Reward GOLD: the policy's own probability, bounded from below, stands for the importance ratio of each token.

        loss_t = -R sg(max(p_t, min_prob)) lp_t

    Class B: ``linear_token_loss(hidden, lm_head_weight, labels, rgold_loss, (advantage,))``. min_prob=1: weighted
    behaviour cloning.

    Args:
        token_logp: (...) log-prob of each label under the policy, nats; differentiated.
        advantage: (...) R = sigmoid(reward) of the token's sequence, repeated over its tokens.
        min_prob: in [0, 1].

    Returns:
        The shape of token_logp, nats times reward units a token; the loss of a sequence is the sum over its tokens.

    GOLD is arXiv 2009.07839.
    """
    check_share("min_prob", min_prob, "it bounds a probability from below")
    check_tokens(token_logp=token_logp, advantage=advantage)
    logp = wide(token_logp)
    return times(-wide(advantage.detach()) * logp.detach().exp().clamp(min=min_prob), logp)


@register("weighted_bc", pass_class="A", formula="-R s", source=_SOURCE, evidence="code", reads_draws=True)
def weighted_bc_loss(policy_logp: Tensor, reward: Tensor, *, squash: bool = True) -> Tensor:
    """Behaviour cloning weighted by the reward R = sigmoid(reward): loss = -R s.

    Class A: ``linear_weighted_nll`` with token weights R does it in one pass.

    Args:
        policy_logp: (B,) summed log-probs under the policy, nats; differentiated.
        reward: (B,) reward units; squash: False for rewards in [0, 1] already.

    Returns:
        (B,) nats times reward units, fp32 (fp64 for fp64); the caller reduces over sequences.
    """
    check_sequences(policy_logp=policy_logp, reward=reward)
    return times(-_squashed(reward, squash), wide(policy_logp))


def _squashed(reward: Tensor, squash: bool) -> Tensor:
    reward = wide(reward.detach())
    return reward.sigmoid() if squash else reward


def _clipped_ratio(policy_logp: Tensor, ref_logp: Tensor, clip_range: float) -> Tensor:
    """exp(policy - ref) in [1 - e, 1 + e], detached; clipped before the exponential, which cannot overflow then."""
    check_share("clip_range", clip_range, "the ratio is kept in 1 - e ... 1 + e")
    low = math.log(1 - clip_range) if clip_range < 1 else -math.inf
    log_ratio = wide(policy_logp.detach()) - wide(ref_logp.detach())
    return log_ratio.clamp(low, math.log(1 + clip_range)).exp()
