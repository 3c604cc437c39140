"""Pair losses without a reference policy: SLiC-HF, SimPO, ORPO. Class C: two passes of the head."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from var_kernels.losses.checks import check_range, per_token, times
from var_kernels.losses.registry import register


@register(
    "slic",
    pass_class="C",
    formula="max(0, delta - s_w + s_l) - target_weight s_target",
    source="arXiv 2305.10425",
    evidence="third-party code",
    defaults={"delta": 1.0, "target_weight": 0.1},
)
def slic_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    policy_target_logp: Tensor | None = None,
    *,
    delta: float,
    target_weight: float,
) -> Tensor:
    """Sequence likelihood calibration: a hinge on the bare log-probs, held down by SFT on a target.

        loss = max(0, delta - s_w + s_l) - target_weight s_target

    Which delta and lambda the paper takes is open.

    Args:
        policy_target_logp: (P,) of the sequence that regularises, nats; differentiated. None: the chosen one.
        delta: >= 0, the margin, nats.
        target_weight: >= 0, the paper's lambda.
    """
    check_range("delta", delta, closed=True, remedy="swap chosen and rejected to reverse the preference")
    check_range("target_weight", target_weight, closed=True, remedy="0 leaves the hinge alone")
    hinge_P = torch.relu(delta - (policy_chosen_logp - policy_rejected_logp))
    return hinge_P - times(target_weight, policy_chosen_logp if policy_target_logp is None else policy_target_logp)


@register(
    "simpo",
    pass_class="C",
    formula="-log sigmoid(beta (s_w / len_w - s_l / len_l) - gamma)",
    source="arXiv 2405.14734",
    evidence="third-party code",
    defaults={"beta": 2.0, "gamma": 1.0},
)
def simpo_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float,
) -> Tensor:
    """Simple preference optimisation: DPO's loss on per-token means, with a target margin and without a reference.

        loss = -log sigmoid(beta (s_w / len_w - s_l / len_l) - gamma)

    Args:
        beta: > 0. Much larger than DPO's, for a mean is divided by the length.
        gamma: >= 0, the margin after beta (code that takes gamma / beta: multiply).
    """
    check_range("beta", beta, remedy="swap chosen and rejected to reverse the preference")
    check_range("gamma", gamma, closed=True, remedy="0 is no margin")
    chosen_P = per_token(policy_chosen_logp, chosen_lengths, row="chosen_")
    rejected_P = per_token(policy_rejected_logp, rejected_lengths, row="rejected_")
    return -logsigmoid(beta * (chosen_P - rejected_P) - gamma)


@register(
    "orpo",
    pass_class="C",
    formula="-lp_w - odds_weight log sigmoid(logit(exp lp_w) - logit(exp lp_l)), lp = s / len",
    source="arXiv 2403.07691",
    evidence="third-party code",
    defaults={"odds_weight": 0.1},
)
def orpo_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    odds_weight: float,
) -> Tensor:
    """Odds-ratio preference optimisation: SFT on the chosen completion and a log-odds ratio against the rejected one.

        lp = s / len;   log odds = lp - log(1 - exp(lp))
        loss = -lp_w - odds_weight log sigmoid(log odds_w - log odds_l)

    lp is held at -eps of its dtype or below in the odds, which are infinite at probability 1; there the odds have no
    gradient. The SFT part is the mean over each sequence's own tokens; code that averages over all tokens of the batch
    weighs long sequences more.

    Args:
        odds_weight: >= 0, the paper's lambda.
    """
    check_range("odds_weight", odds_weight, closed=True, remedy="0 is plain SFT on the chosen completions")
    chosen_P = per_token(policy_chosen_logp, chosen_lengths, row="chosen_")
    rejected_P = per_token(policy_rejected_logp, rejected_lengths, row="rejected_")
    return -chosen_P - times(odds_weight, logsigmoid(log_odds(chosen_P) - log_odds(rejected_P)))


def log_odds(logp_P: Tensor) -> Tensor:
    """logit(exp(lp)) of mean log-probs lp, (P,), finite and without a gradient where lp is 0."""
    logp_P = logp_P.clamp(max=-torch.finfo(logp_P.dtype).eps)
    return logp_P - (-torch.expm1(logp_P)).log()
