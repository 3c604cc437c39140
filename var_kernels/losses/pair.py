"""Losses of (chosen, rejected) pairs against a reference: functions of D = (s_w - sr_w) - (s_l - sr_l). Class C: two
passes of the head."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from var_kernels.losses.checks import TokenReduction, check_range, per_token, read_rows, times
from var_kernels.losses.registry import register

_SWAP = "swap chosen and rejected to reverse the preference"


@register(
    "dpo",
    pass_class="C",
    formula="-(1-e) log sigmoid(beta D) - e log sigmoid(-beta D)",
    source="arXiv 2305.18290 eq. 7; e: the authors' code (cDPO)",
    evidence="code",
    defaults={"beta": 0.1},
)
def dpo_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation, with conservative (label-smoothed) DPO as an option.

        m = beta ((s_w - sr_w) - (s_l - sr_l))
        loss = -(1 - label_smoothing) log sigmoid(m) - label_smoothing log sigmoid(-m)

    With labels drawn from Bradley-Terry on a reward r, sigmoid(r_w - r_l), the minimiser is pi_ref exp(r / beta) / Z:
    VAR's pi* at lam = beta.

    Args:
        beta: > 0, the KL temperature.
        label_smoothing: in [0, 0.5): probability that a label is flipped.
    """
    _check_smoothing(label_smoothing)
    margin_P = _scaled_margin(beta, policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return -(1 - label_smoothing) * logsigmoid(margin_P) - times(label_smoothing, logsigmoid(-margin_P))


@register(
    "robust_dpo",
    pass_class="C",
    formula="[-(1-e) log sigmoid(beta D) + e log sigmoid(-beta D)] / (1-2e)",
    source="arXiv 2403.00409",
    evidence="third-party code",
    defaults={"beta": 0.1, "label_smoothing": 0.1},
)
def robust_dpo_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """DPO's loss of the true labels, estimated without bias from labels that are flipped with a known probability e.

        m = beta D
        loss = [-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2e)

    Its mean over the flips, (1 - e) loss(m) + e loss(-m), is -log sigmoid(m). A single pair's loss may be negative and
    has no lower bound: for large m its slope stays -e / (1 - 2e).

    Args:
        beta: see ``dpo_loss``.
        label_smoothing: e, in [0, 0.5): the rate of flipped labels.
    """
    _check_smoothing(label_smoothing)
    margin_P = _scaled_margin(beta, policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    loss_P = -(1 - label_smoothing) * logsigmoid(margin_P) + times(label_smoothing, logsigmoid(-margin_P))
    return loss_P / (1 - 2 * label_smoothing)


@register(
    "ipo",
    pass_class="C",
    formula="(D - 1/(2 tau))^2, D of per-token means (default) or of sums",
    source="arXiv 2310.12036",
    evidence="code",
    defaults={"tau": 0.1},
)
def ipo_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    *,
    tau: float,
    token_reduction: TokenReduction = "mean",
) -> Tensor:
    """Identity preference optimisation: regress D onto 1 / (2 tau), instead of driving it to infinity.

        D = (s_w - sr_w) / n_w - (s_l - sr_l) / n_l,     n = tokens ("mean") or 1 ("sum")
        loss = (D - 1 / (2 tau))^2                       nats^2, for "mean" per token^2

    Which of the two reductions the paper means is open: its text writes sums, the DPO authors' code takes sums, TRL
    takes means and says that IPO's authors confirmed it. With sums over all pairs of a candidate set the minimiser is
    pi_ref exp(E_y'[p(y > y')] / tau) / Z.

    Args:
        chosen_lengths, rejected_lengths: (P,) integers, tokens that carry loss; needed for "mean".
        tau: > 0, the KL temperature.
        token_reduction: "mean" | "sum".
    """
    check_range("tau", tau, remedy=_SWAP)
    chosen_P = per_token(policy_chosen_logp - ref_chosen_logp, chosen_lengths, token_reduction, "chosen_")
    rejected_P = per_token(policy_rejected_logp - ref_rejected_logp, rejected_lengths, token_reduction, "rejected_")
    return (chosen_P - rejected_P - 1 / (2 * tau)).square()


@register(
    "hinge",
    pass_class="C",
    formula="relu(1 - beta D)",
    source="arXiv 2309.06657",
    evidence="third-party code",
    defaults={"beta": 0.1},
)
def hinge_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: float,
) -> Tensor:
    """SLiC's hinge on DPO's margin: pairs with a margin of 1 or more cost nothing.

        loss = max(0, 1 - beta D)          beta x nats

    The gradient per sequence is -beta (chosen) and +beta (rejected) inside the hinge, 0 outside; which one is known
    only after both sums: class C all the same. ``slic_loss`` is SLiC-HF's own, without a reference. RSO's hinge, TRL's
    "hinge".

    Args:
        beta: see ``dpo_loss``.
    """
    margin_P = _scaled_margin(beta, policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return torch.relu(1 - margin_P)


def implicit_reward(policy_logp: Tensor, ref_logp: Tensor, *, beta: float) -> Tensor:
    """beta (s - sr), (P,) detached, for metrics: the reward, up to a constant a prompt, that the policy is optimal for.

    Args:
        policy_logp, ref_logp: (P,) summed log-probs, nats.  beta: > 0.

    Source: arXiv 2305.18290 eq. 5.
    """
    check_range("beta", beta, remedy=_SWAP)
    logps = {"policy_logp": policy_logp, "ref_logp": ref_logp}
    policy_P, ref_P = read_rows("pair", logps, **logps)
    return beta * (policy_P - ref_P).detach()


def _scaled_margin(
    beta: float, chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor
) -> Tensor:
    check_range("beta", beta, remedy=_SWAP)
    return beta * ((chosen_P - ref_chosen_P) - (rejected_P - ref_rejected_P))


def _check_smoothing(label_smoothing: float) -> None:
    check_range("label_smoothing", label_smoothing, 0.0, 0.5, closed=True, remedy="above 0.5 swap chosen and rejected")
