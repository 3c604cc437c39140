"""Policy gradients by an importance ratio: detached and bounded (CISPO, VESPO, TOPR), soft (SAPO), of whole sequences
(GSPO), or none (REINFORCE). Advantages come from outside, of any sign: ``group_advantage`` and its kin.

PPO and GRPO, and the ratio and the clip that all share, are in ``token``.
"""

import torch
from torch import Tensor

from var_kernels.losses.checks import check_range, per_token, times
from var_kernels.losses.registry import register
from var_kernels.losses.token import clipped_surrogate, importance_ratio


@register(
    "cispo",
    pass_class="B",
    formula="-sg(clip(ratio, ratio_min, ratio_max)) A lp, ratio = exp(lp - lp_old)",
    source="CISPO, arXiv 2506.13585",
    evidence="third-party code",
    compares="prompt",
    reads_draws=True,
)
def cispo_loss(
    token_logp: Tensor, old_token_logp: Tensor, advantage: Tensor, *, ratio_min: float = 0.0, ratio_max: float = 5.0
) -> Tensor:
    """CISPO: the importance ratio is clipped and held constant, so that every token keeps a gradient.

        loss_t = -sg(clip(ratio_t, ratio_min, ratio_max)) A_t lp_t          nats x units of the advantage
        ratio_t = exp(lp_t - lp_old_t)

    The bounds are of the ratio itself. The paper tunes the upper one alone, as TRL has it (its ``epsilon_high`` is
    ratio_max, 5 as in arXiv 2510.13786) and OpenRLHF; verl clips on both sides (ratio_min = 1 - low, ratio_max =
    1 + high).

    Args:
        ratio_min: >= 0.
        ratio_max: >= ratio_min.
    """
    check_range("ratio_min", ratio_min, closed=True, remedy="0 leaves small ratios as they are")
    check_range("ratio_max", ratio_max, ratio_min, closed=True, remedy="ratio_min is the lower of the two")
    ratio = importance_ratio(token_logp.detach(), old_token_logp).clamp(ratio_min, ratio_max)
    return times(-ratio * advantage, token_logp)


@register(
    "sapo",
    pass_class="B",
    formula="-A (4 / t) sigmoid(t (ratio - 1)), ratio = exp(lp - lp_old), t by the sign of A",
    source="SAPO, arXiv 2511.20347",
    evidence="third-party code",
    compares="prompt",
    reads_draws=True,
)
def sapo_loss(
    token_logp: Tensor,
    old_token_logp: Tensor,
    advantage: Tensor,
    *,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.05,
) -> Tensor:
    """SAPO: a sigmoid in place of PPO's clip; the gradient fades with the distance from the old policy.

        loss_t = -A_t (4 / t) sigmoid(t (ratio_t - 1)),     t = temperature_pos where A_t > 0, else temperature_neg

    In units of the advantage. At ratio 1 the slope in the ratio is -A, as PPO's.

    Args:
        temperature_pos, temperature_neg: > 0; larger ones fade sooner.
    """
    for name, value in (("temperature_pos", temperature_pos), ("temperature_neg", temperature_neg)):
        check_range(name, value, remedy="1 is the paper's for positive advantages, 1.05 for negative ones")
    temperature = torch.where(advantage > 0, temperature_pos, temperature_neg).to(advantage.dtype)
    gate = (temperature * (importance_ratio(token_logp, old_token_logp) - 1)).sigmoid()
    return -advantage * 4 / temperature * gate


@register(
    "gspo",
    pass_class="C",
    formula="-min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = exp((s - s_old) / len)",
    source="GSPO, arXiv 2507.18071",
    evidence="third-party code",
    compares="prompt",
    reads_draws=True,
)
def gspo_loss(
    policy_logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    lengths: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """GSPO: PPO's clipped surrogate with one importance ratio a sequence, the geometric mean of its tokens'.

        ratio = exp((s - s_old) / len);   loss = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)

    In units of the advantage. The paper's other form, a token loss with sg(ratio) lp / sg(lp) in place of the ratio
    (GSPO-token, which verl runs), has the same gradient where the advantage is the sequence's. TRL's
    ``importance_sampling_level="sequence"``.

    Args:
        clip_low, clip_high: see ``ppo_loss``; a geometric mean is near 1, and so are the paper's bounds.
    """
    means = [per_token(s, lengths) for s in (policy_logp, old_logp)]
    return clipped_surrogate(importance_ratio(*means), advantage, clip_low, clip_high)


@register(
    "reinforce",
    pass_class="A",
    formula="-A s, A of any sign",
    source="Williams (1992); RLOO, arXiv 2402.14740; REINFORCE++, arXiv 2501.03262",
    evidence="third-party code",
    compares="prompt",
    reads_draws=True,
)
def reinforce_loss(policy_logp: Tensor, advantage: Tensor) -> Tensor:
    """Signed REINFORCE: log-likelihood times a given weight, which may be negative. One pass of the head.

        loss = -A s          nats x units of the advantage

    The weight is a column of the data, or an advantage: that of a prompt's other completions (RLOO,
    ``leave_one_out_advantage``), standardised over the global batch (REINFORCE++, ``standardised_advantage``), or
    within the prompt (``group_advantage``). A sequence of negative weight has no lower bound of its loss.
    """
    return times(-advantage, policy_logp)


@register(
    "vespo",
    pass_class="C",
    formula="-sg(phi) A s, phi = w^k exp(lam (1 - w)), w = exp(s - s_old); k, lam by the sign of A",
    source="VESPO, arXiv 2602.10693",
    evidence="third-party code",
    compares="prompt",
    reads_draws=True,
)
def vespo_loss(
    policy_logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    k_pos: float = 2.0,
    lam_pos: float = 3.0,
    k_neg: float = 3.0,
    lam_neg: float = 2.0,
) -> Tensor:
    """VESPO: the sequence's importance ratio, reshaped by a gamma density that vanishes at 0 and at infinity.

        w = exp(s - s_old),   phi(w) = w^k exp(lam (1 - w)),   loss = -sg(phi(w)) A s          nats x units of A

    phi(1) = 1: on policy it is REINFORCE. TRL floors w at 1e-8, where phi is below 1e-14.

    Args:
        k_pos, lam_pos: > 0, where A >= 0.  k_neg, lam_neg: > 0, where A < 0.
    """
    for name, value in (("k_pos", k_pos), ("lam_pos", lam_pos), ("k_neg", k_neg), ("lam_neg", lam_neg)):
        check_range(name, value, remedy="the defaults are the authors'")
    k_B, lam_B = (torch.where(advantage >= 0, *pair) for pair in ((k_pos, k_neg), (lam_pos, lam_neg)))
    log_w_B = (policy_logp.detach() - old_logp).clamp(max=20.0)  # phi is 0 long before
    phi_B = (lam_B + k_B * log_w_B - lam_B * log_w_B.exp()).exp().to(advantage.dtype)
    return times(-phi_B * advantage, policy_logp)


@register(
    "topr",
    pass_class="C",
    formula="-sg(c) A s, c = 1 where A >= 0, else min(exp(s - s_old), 1)",
    source="TOPR, arXiv 2503.14286",
    evidence="third-party code",
    compares="prompt",
    reads_draws=True,
)
def topr_loss(policy_logp: Tensor, old_logp: Tensor, advantage: Tensor) -> Tensor:
    """TOPR: SFT on good sequences; bad ones are pushed down only as far as the policy still draws them.

        loss = -sg(c) A s,     c = 1 where A >= 0, else min(exp(s - s_old), 1)          nats x units of A

    The ratio is that of the whole sequence, as in the paper.

    Args:
        advantage: (B,) the reward, of both signs (1 and -1 for right and wrong in the paper), or an advantage.
    """
    ratio_B = (policy_logp.detach() - old_logp).clamp(max=0.0).exp()
    return times(-torch.where(advantage >= 0, 1.0, ratio_B) * advantage, policy_logp)
