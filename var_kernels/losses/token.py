"""Losses of each token's own log-prob: element by element, to be handed to ``linear_token_loss``. Class B: one pass.

    f = token_objective(grpo_loss, beta=0.04)
    inputs = (old_token_logp, ref_token_logp, advantage, token_weight)
    loss = linear_token_loss(hidden, lm_head_weight, labels, f, inputs)

How the terms of a sequence are weighted (1 / length and the like) is no part of a loss here: it enters as
``token_weight``, which ``length_weights`` makes for GRPO, DAPO and Dr. GRPO.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from var_kernels.losses.checks import check_choice, check_range, read_tokens, times
from var_kernels.losses.registry import register
from var_kernels.losses.sequences import expand_to_tokens, sequence_lengths
from var_kernels.ops.checks import values_readable

LENGTH_NORMALIZATIONS = ("sequence", "token", "constant", "sum")
# Beyond e^20 a ratio of probabilities says nothing any more, and fp32 overflows at e^88.
_LARGEST_LOG_RATIO = 20.0


@register("dft", pass_class="B", formula="-sg(p) lp", source="DFT, arXiv 2508.05629", evidence="code")
def dft_loss(token_logp: Tensor) -> Tensor:
    """Dynamic fine-tuning: each token's negative log-likelihood times its own probability, which is a constant.

        loss_t = -sg(exp(lp_t)) lp_t

    The gradient in the parameters is that of -p_t: the probability of the data, summed over tokens, is maximised.
    """
    return times(-token_logp.detach().exp(), token_logp)


@register(
    "ppo",
    pass_class="B",
    formula="-min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = exp(lp - lp_old); if A < 0 at most -dual_clip A",
    source="PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729",
    evidence="third-party code",
    compares="prompt",
    reads_draws=True,
)
def ppo_loss(
    token_logp: Tensor,
    old_token_logp: Tensor,
    advantage: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate, one importance ratio a token.

        ratio_t = exp(lp_t - lp_old_t);   loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)
        with dual_clip, where A_t < 0:    min(loss_t, -dual_clip A_t)          units of the advantage

    clip_high above clip_low is DAPO's "clip-higher". Without dual_clip a token of negative advantage that the policy
    has made much likelier costs without bound. From 20 nats on the ratio follows its tangent, so that it cannot
    overflow.

    Args:
        advantage: (...) a constant; for an outcome reward the sequence's, repeated over its tokens.
        clip_low: in [0, 1).
        clip_high: >= 0.
        dual_clip: > 1, the largest ratio that a negative advantage is multiplied by; None: any. 3 in verl and ms-swift;
            TRL's ``delta``.
    """
    return clipped_surrogate(importance_ratio(token_logp, old_token_logp), advantage, clip_low, clip_high, dual_clip)


def ppo_clipped(
    token_logp: Tensor,
    old_token_logp: Tensor,
    advantage: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """(...) bool: the tokens at which a clip of ``ppo_loss`` stops the gradient; its mean is the clip fraction.

    ratio > 1 + clip_high where the advantage is positive, ratio < 1 - clip_low or > dual_clip where it is negative.

    Args: as ``ppo_loss``, nothing differentiated.
    """
    _check_clip(clip_low, clip_high, dual_clip)
    given = {"token_logp": token_logp, "old_token_logp": old_token_logp, "advantage": advantage}
    logp, old_logp, advantage = read_tokens(**given)
    ratio = importance_ratio(logp.detach(), old_logp)
    outside = ratio < 1 - clip_low
    if dual_clip is not None:
        outside = outside | (ratio > dual_clip)
    return ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & outside)


@register(
    "grpo",
    pass_class="B",
    formula="ppo + beta k3,  k3 = exp(lp_ref - lp) - 1 - (lp_ref - lp)",
    source="GRPO, arXiv 2402.03300",
    evidence="third-party code",
    defaults={"beta": 0.04},
    compares="prompt",
    reads_draws=True,
)
def grpo_loss(
    token_logp: Tensor,
    old_token_logp: Tensor,
    ref_token_logp: Tensor,
    advantage: Tensor,
    *,
    beta: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """GRPO's loss of a token: PPO's clipped surrogate and beta times the estimate k3 of KL(policy || reference).

        loss_t = ppo_t + beta (exp(lpr_t - lp_t) - 1 - (lpr_t - lp_t))          units of the advantage

    ``group_advantage`` makes the advantages, ``length_weights`` the weights of the tokens in the sum
    (``token_objective``). Without a reference use ``ppo_loss``.

    Args:
        clip_low, clip_high, dual_clip: see ``ppo_loss``.
        beta: >= 0, units of the advantage a nat.
    """
    check_range("beta", beta, closed=True, remedy="it weighs the distance from the reference")
    clips: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    surrogate = ppo_loss(token_logp, old_token_logp, advantage, **clips)
    return surrogate + beta * kl_k3(token_logp, ref_token_logp)


# ---- what the losses are made of and combined with -------------------------------------------------------------------


def importance_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """exp(logp - old_logp), no gradient to old_logp; from 20 nats on its tangent, so that it cannot overflow."""
    near, beyond = _split(logp - old_logp)
    return near.exp() + math.exp(_LARGEST_LOG_RATIO) * beyond  # the gradient does not vanish


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """-min(ratio A, clip(ratio) A), at most -dual_clip A where A < 0: of tokens or of sequences, see ``ppo_loss``."""
    _check_clip(clip_low, clip_high, dual_clip)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    return loss if dual_clip is None else torch.minimum(loss, dual_clip * advantage.abs())  # below 0 where A > 0


def token_objective(
    token_loss: Callable[..., Tensor], *, entropy_bonus: float = 0.0, **options: Any
) -> Callable[..., Tensor]:
    """``token_loss`` with its options, a weight for each token and an entropy bonus: an f for ``linear_token_loss``.

        f(lp, *inputs, w) = w token_loss(lp, *inputs, **options)
        f(lp, H, *inputs, w) = w (token_loss(lp, *inputs, **options) - entropy_bonus H)       with entropy_bonus != 0

    Args:
        token_loss: a function of this module, or any other with the policy's log-probs first.
        entropy_bonus: units of the loss a nat; not 0: call ``linear_token_loss`` with ``entropy=True``.
        options: keyword arguments of token_loss.

    Returns:
        The function f. Its last input is ``token_weight``: (...) floating point, see ``length_weights``.
    """

    def weighted(token_logp: Tensor, *inputs: Tensor) -> Tensor:
        return inputs[-1] * token_loss(token_logp, *inputs[:-1], **options)

    def with_entropy(token_logp: Tensor, entropy: Tensor, *inputs: Tensor) -> Tensor:
        return inputs[-1] * (token_loss(token_logp, *inputs[:-1], **options) - entropy_bonus * entropy)

    return with_entropy if entropy_bonus else weighted


def length_weights(
    labels: Tensor,
    *,
    normalization: str,
    num_items: float | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The weight of each token in a sum over the batch, 0 where the label is ignored.

        normalization   weight                 num_items, where None                       as in
        "sequence"      1 / (num_items len_i)  sequences with a token, here                GRPO
        "token"         1 / num_items          tokens, here                                DAPO
        "constant"      1 / num_items          to be given: sequences x longest allowed    Dr. GRPO
        "sum"           1 / num_items          sequences with a token, here                REINFORCE

    A batch that is spread over ranks or accumulation steps needs num_items of the whole.

    Args:
        labels: (B, T), or (N,) with ``cu_seqlens`` (B + 1,): int64, aligned with the log-probs.

    Returns:
        fp32 in the shape of labels.

    Raises:
        ValueError: unknown normalization, num_items missing or not positive (on a CPU 0 where no token counts).

    Source: arXiv 2402.03300, 2503.14476 and 2503.20783, as other trainers implement them.
    """
    check_choice("normalization", normalization, LENGTH_NORMALIZATIONS)
    if num_items is None and normalization == "constant":
        raise ValueError(
            "num_items must be given for normalization='constant', got None; number of sequences x longest completion"
        )
    lengths_B = sequence_lengths(labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
    kept = (labels != ignore_index).to(torch.float32)
    if num_items == 0 and values_readable(kept) and not kept.any():
        return kept  # a batch without a token in a step without one
    if num_items is not None:
        check_range("num_items", num_items, remedy="count the items of the global batch")
    items: Tensor | float | None = num_items
    if items is None:
        items = (lengths_B if normalization == "token" else lengths_B > 0).sum().clamp(min=1)
    if normalization == "sequence":
        return kept / expand_to_tokens(lengths_B.clamp(min=1) * items, labels, cu_seqlens)
    return kept / items


def kl_k1(token_logp: Tensor, ref_token_logp: Tensor) -> Tensor:
    """lp - lpr: for tokens drawn from the policy an unbiased estimate of KL(policy || reference), nats; any sign.

    As a loss on such tokens it does nothing: its gradient is 0 on average. (...), (...) -> (...).
    """
    return -_log_ratio(token_logp, ref_token_logp)


def kl_k2(token_logp: Tensor, ref_token_logp: Tensor) -> Tensor:
    """(lp - lpr)^2 / 2: >= 0, biased, but its gradient on tokens drawn from the policy is, on average, that of
    KL(policy || reference). (...), (...) -> (...), nats^2.
    """
    return _log_ratio(token_logp, ref_token_logp).square() / 2


def kl_k3(token_logp: Tensor, ref_token_logp: Tensor) -> Tensor:
    """exp(lpr - lp) - 1 - (lpr - lp): >= 0 and, for tokens drawn from the policy, an unbiased estimate of
    KL(policy || reference), nats. Its gradient, on average, is that of KL(reference || policy) instead.

    From lpr - lp = 20 nats on it follows its tangent. (...), (...) -> (...).
    """
    log_ratio = _log_ratio(token_logp, ref_token_logp)
    near, beyond = _split(log_ratio)
    return near.expm1() - near + math.expm1(_LARGEST_LOG_RATIO) * beyond


def _log_ratio(token_logp: Tensor, ref_token_logp: Tensor) -> Tensor:
    logp, ref_logp = read_tokens(token_logp=token_logp, ref_token_logp=ref_token_logp)
    return ref_logp - logp


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """min(x, 20) and max(x - 20, 0): no difference of infinities for x = -inf."""
    return x.clamp(max=_LARGEST_LOG_RATIO), torch.relu(x - _LARGEST_LOG_RATIO)


def _check_clip(clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    check_range("clip_low", clip_low, high=1.0, closed=True, remedy="the ratio is kept above 1 - clip_low")
    check_range("clip_high", clip_high, closed=True, remedy="the ratio is kept below 1 + clip_high")
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, 1.0, remedy="pass None for no second clip")
