"""KTO: completions judged one by one, against a baseline over the whole batch. Class D."""

from typing import Any

import torch
from torch import Tensor

from var_kernels.losses.checks import check_constants, check_range, read_rows, wide
from var_kernels.losses.registry import register


@register(
    "kto",
    pass_class="D",
    formula="w (1 - sigmoid(+-beta (s - sr - z0))), + and w = desirable_weight where desirable",
    source="arXiv 2402.01306",
    evidence="third-party code",
    defaults={"beta": 0.1},
)
def kto_loss(
    policy_logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    kl_baseline: Tensor | None = None,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation.

        rho = s - sr
        loss = desirable_weight   (1 - sigmoid(beta (rho - z0)))     where desirable
               undesirable_weight (1 - sigmoid(beta (z0 - rho)))     elsewhere

    z0 >= 0 estimates KL(policy || reference) and takes no gradient. The paper estimates it from completions of OTHER
    prompts, one per row, scored under policy and reference: ``kto_baseline`` of those. Without ``kl_baseline`` the mean
    over the rows given here stands in for it, which is a different estimate (the completions answer their own
    prompts).

    Over several ranks or accumulation steps z0 belongs to the GLOBAL batch: gather rho, or its sum and count, take
    max(0, mean), and pass it. Left to this function it is the micro-batch's own, another objective.

    Args:
        desirable: (B,) bool.
        kl_baseline: () z0, nats; a constant. None: max(0, mean rho) of this batch.
        beta: > 0.
        desirable_weight, undesirable_weight: >= 0, the paper's lambda_D and lambda_U; the loss is between 0 and these.
    """
    check_range("beta", beta, remedy="negate `desirable` to reverse the preference")
    check_range("desirable_weight", desirable_weight, closed=True, remedy="negate `desirable` instead")
    check_range("undesirable_weight", undesirable_weight, closed=True, remedy="negate `desirable` instead")
    if kl_baseline is None:
        kl_baseline = kto_baseline(policy_logp, ref_logp)
    else:
        _check_baseline(kl_baseline)
    gain_B = beta * (policy_logp - ref_logp - wide(kl_baseline.detach()))
    # 1 - sigmoid(x) as sigmoid(-x): no cancellation where x is large
    liked_B = desirable_weight * torch.sigmoid(-gain_B)
    disliked_B = undesirable_weight * torch.sigmoid(gain_B)
    return torch.where(desirable, liked_B, disliked_B)


def kto_baseline(policy_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """z0 = max(0, mean (s - sr)), () nats, detached; 0 for an empty batch. One process's rows: gather first.

    Args:
        policy_logp, ref_logp: (B,) summed log-probs, nats; after the paper, of completions under other prompts.

    Source: arXiv 2402.01306; third-party code.
    """
    logps: Any = {"policy_logp": policy_logp, "ref_logp": ref_logp}
    policy_B, ref_B = read_rows(learning=logps, **logps)
    ratio_B = (policy_B - ref_B).detach()
    return (ratio_B.sum() / max(ratio_B.numel(), 1)).clamp(min=0)


def _check_baseline(kl_baseline: Tensor) -> None:
    if not isinstance(kl_baseline, Tensor) or not kl_baseline.is_floating_point() or kl_baseline.dim() != 0:
        got = tuple(kl_baseline.shape) if isinstance(kl_baseline, Tensor) else type(kl_baseline).__name__
        raise TypeError(f"kl_baseline must be a floating-point scalar tensor (), got {got}; use kto_baseline(...)")
    check_constants(kl_baseline=kl_baseline)
