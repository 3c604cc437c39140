"""Supervised fine-tuning that weighs tokens or sequences by how the policy sees them: importance-weighted SFT, proximal
SFT, entropy-adaptive fine-tuning and CHORD's phi. Weights are constants; DFT, the first of the kind, is in ``token``.
"""

from torch import Tensor

from var_kernels.losses.checks import check_range, per_token, times
from var_kernels.losses.registry import register
from var_kernels.losses.token import importance_ratio

_IW_SFT = "iw-SFT, arXiv 2507.12856, and its authors' code"


@register(
    "iw_sft",
    pass_class="C",
    formula="-sg(min(exp(temperature (s - sr) / len), max_weight)) s",
    source=_IW_SFT,
    evidence="code",
)
def iw_sft_loss(
    policy_logp: Tensor, ref_logp: Tensor, lengths: Tensor, *, temperature: float = 1.0, max_weight: float = 16.0
) -> Tensor:
    """Importance-weighted SFT: each sequence counts by how much likelier the policy finds it than the reference.

        loss = -sg(min(exp(temperature (s - sr) / len), max_weight)) s

    On curated data, a tighter lower bound of the reward than SFT's. At the reference it is SFT. The authors divide by
    the batch's tokens.

    Args:
        temperature: >= 0, a factor of the mean log-ratio. max_weight: > 0.
    """
    check_range("temperature", temperature, closed=True, remedy="0 is SFT")
    check_range("max_weight", max_weight, remedy="1e9 hardly clips")
    mean_B = per_token(policy_logp.detach() - ref_logp, lengths)
    weight_B = importance_ratio(times(temperature, mean_B), mean_B.new_zeros(())).clamp(max=max_weight)
    return times(-weight_B, policy_logp)


@register(
    "iw_sft_token",
    pass_class="B",
    formula="-sg(clip(exp(lp - lp_ref), ratio_min, ratio_max)) lp",
    source=_IW_SFT,
    evidence="code",
)
def iw_sft_token_loss(
    token_logp: Tensor, ref_token_logp: Tensor, *, ratio_min: float = 0.2, ratio_max: float = 1.8
) -> Tensor:
    """Importance-weighted SFT with a weight for each token, in one pass.

        loss_t = -sg(clip(exp(lp_t - lp_ref_t), ratio_min, ratio_max)) lp_t

    Args:
        ratio_min, ratio_max: 0 <= ratio_min <= ratio_max.
    """
    check_range("ratio_min", ratio_min, closed=True, remedy="0 leaves small ratios as they are")
    check_range("ratio_max", ratio_max, ratio_min, closed=True, remedy="1e9 hardly clips")
    ratio = importance_ratio(token_logp.detach(), ref_token_logp).clamp(ratio_min, ratio_max)
    return times(-ratio, token_logp)


@register(
    "psft",
    pass_class="B",
    formula="-min(ratio, 1 + clip_high), ratio = exp(lp - lp_old)",
    source="PSFT, arXiv 2508.17784",
    evidence="summary",
)
def psft_loss(token_logp: Tensor, old_token_logp: Tensor, *, clip_high: float = 0.2) -> Tensor:
    """Proximal SFT: PPO's clipped surrogate with an advantage of 1 for every token of the data.

        loss_t = -min(ratio_t, 1 + clip_high),     ratio_t = exp(lp_t - lp_old_t)          without unit

    ``ppo_loss`` at advantage 1, whose lower clip never binds there. A token stops learning once the policy finds it
    1 + clip_high times as likely as the old policy did.

    Args:
        old_token_logp: (...) the same under an earlier policy, such as the one training began with; a constant.
        clip_high: >= 0.
    """
    check_range("clip_high", clip_high, closed=True, remedy="the ratio is kept below 1 + clip_high")
    return -importance_ratio(token_logp, old_token_logp).clamp(max=1 + clip_high)


@register(
    "eaft",
    pass_class="B",
    formula="-sg((H / max_entropy)^alpha) lp",
    source="EAFT, arXiv 2601.02151",
    evidence="third-party code",
)
def eaft_loss(token_logp: Tensor, entropy: Tensor, *, alpha: float = 1.0, max_entropy: float = 3.0) -> Tensor:
    """Entropy-adaptive fine-tuning: a token counts by how undecided the policy is there.

        loss_t = -sg((H_t / max_entropy)^alpha) lp_t

    Where the policy is sure, and the data say otherwise, little is unlearnt. H is that of the whole vocabulary, which
    the head gives in the same pass. The authors approximate it by the 20 likeliest tokens, made to sum to 1, and
    divide by 3, about log 20; the two differ where the tail of the distribution has mass.

    Args:
        alpha: >= 0; 0 is SFT.
        max_entropy: > 0, nats.
    """
    check_range("alpha", alpha, closed=True, remedy="0 is SFT")
    check_range("max_entropy", max_entropy, remedy="3 is about the log of the authors' 20 tokens")
    gate = (entropy.clamp(min=0.0) / max_entropy).pow(alpha)
    return times(-gate, token_logp)


@register(
    "chord_phi",
    pass_class="B",
    formula="-sg(p (1 - p)) lp",
    source="CHORD, arXiv 2508.11408",
    evidence="third-party code",
)
def chord_phi_loss(token_logp: Tensor) -> Tensor:
    """CHORD's phi: SFT on tokens that the policy neither knows already nor rules out.

        loss_t = -sg(p_t (1 - p_t)) lp_t,     p_t = exp(lp_t)

    The gradient in a token's log-prob is that of -p + p^2 / 2. CHORD adds it, scaled, to a policy gradient.
    """
    p = token_logp.detach().exp()
    return times(-p * (1 - p), token_logp)
