"""Approximated variational alignment (AVA): a policy that must agree with the reward posterior it carries itself.

At position t, with the label y_t, the log-prob lp_t of which the head gives, and a posterior N(mu_t, sigma_t) of the
reward that a small head (``RewardHead``) reads from the same hidden state:

    Q_t = lp_t                          delta_t = Q_t - gamma Q_{t+1}
    KL_t = (sigma_t^2 + mu_t^2 - 1) / 2 - log sigma_t                    of N(mu_t, sigma_t) to the prior N(0, 1)
    TD_t = log N(delta_t; mu_t, sigma_t)

delta_t and TD_t exist where t and t + 1 both count, so not at a sequence's last position. Nothing is detached: Q learns
to be consistent with the rewards, and the rewards with Q. Class C, coupled between neighbours only: two passes.

Q is the paper's log softmax(alpha pi(.|y_1..y_{t-1}))[y_t]. Whether pi stands for logits or for probabilities is open:

    logits (default)   Q_t = lp_t at temperature 1 / alpha: pass ``temperature=1 / alpha`` where token_logp is made
    probabilities      Q_t = alpha p_t - log sum_v exp(alpha p_v): ``literal_q``, nearly constant unless alpha ~ log V
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from var_kernels.losses.checks import check_choice, check_kind, check_range, check_share, read_rows, times, wide
from var_kernels.losses.registry import register

REGULARISED = ("both", "chosen", "rejected")
_SOURCE = "AVA, arXiv 2411.09341; gradient flow and weights of 1 as in AVRIL's code"


@register(
    "ava_d",
    pass_class="C",
    item="sequence",
    formula="-sum_t [beta Q_t - KL_t + lam TD_t]",
    source=_SOURCE,
    evidence="paper",
)
def ava_d_loss(
    token_logp: Tensor,
    mu: Tensor,
    log_sigma: Tensor,
    mask: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    lam: float = 1.0,
    as_printed: bool = False,
) -> Tensor:
    """AVA from demonstrations: likelihood, the reward posterior's distance from its prior, temporal consistency.

        F = sum_t [beta Q_t - KL_t + lam TD_t],     loss = -F;     Q, KL and TD as in this module's docstring

    With e_t = -(delta_t - mu_t) / sigma_t^2 where TD_t exists, else 0:

        dF/dlp_t = beta + lam e_t - gamma lam e_{t-1}          dF/dmu_t = -mu_t - lam e_t
        dF/dsigma_t = -(sigma_t - 1/sigma_t) + lam (-1/sigma_t + (delta_t - mu_t)^2 / sigma_t^3)

    Args:
        token_logp: (B, T) Q_t: log-probs of the labels under the policy (``linear_logprob``), nats, or ``literal_q``;
            differentiated.
        mu, log_sigma: (B, T) the posterior's mean and log standard deviation; differentiated.
        mask: (B, T) bool, True at the positions that carry loss. The others may hold anything.
        beta, lam: >= 0, weights of the likelihood and of TD. gamma: in [0, 1], the discount.
        as_printed: the sums of the paper's equations 5 and 13, which end before the last position: it has no likelihood
            and no KL term either. The default counts every label.

    Returns:
        (B,) loss of each sequence, nats, fp32 (fp64 for fp64); the caller reduces over sequences.

    The values that AVA used for lam, beta and gamma are not known.
    """
    _check_options(beta=beta, lam=lam, gamma=gamma)
    _check("", token_logp=token_logp, mu=mu, log_sigma=log_sigma, mask=mask)
    q, mu, log_sigma = _masked(mask, token_logp, mu, log_sigma)
    counted = _counted(mask, as_printed)
    return -(times(beta, q.where(counted, 0.0).sum(-1)) + _regulariser(q, mu, log_sigma, mask, counted, gamma, lam))


@register(
    "ava_p",
    pass_class="C",
    formula="-[beta (sum Q+ - sum Q-) + sum (-KL + lam TD) + sigmoid(mu_last+ - mu_last-)]",
    source=_SOURCE,
    evidence="paper",
)
def ava_p_loss(
    chosen_token_logp: Tensor,
    rejected_token_logp: Tensor,
    chosen_mu: Tensor,
    rejected_mu: Tensor,
    chosen_log_sigma: Tensor,
    rejected_log_sigma: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    lam: float = 1.0,
    contrast: float = 1.0,
    regularise: str = "both",
    as_printed: bool = False,
) -> Tensor:
    """AVA from preference pairs: the likelihood of the chosen response against the rejected one's, and of its reward.

        F = beta (sum_t Q+_t - sum_t Q-_t) + sum_t (-KL_t + lam TD_t) + contrast sigmoid(mu+_last - mu-_last)

    loss = -F; the middle sum runs over the responses that ``regularise`` names, mu_last is mu at a response's last
    position that counts (0 where none does). -beta sum Q- has no lower bound: watch the rejected log-probs.

    Args:
        chosen_*: (P, T+), rejected_*: (P, T-), each as in ``ava_d_loss``; the two widths may differ.
        beta, gamma, lam, as_printed: see ``ava_d_loss``.
        contrast: >= 0, weight of the contrastive term.
        regularise: "both", "chosen" or "rejected"; which one the paper means is not known.

    Returns:
        (P,) loss of each pair, nats, fp32 (fp64 for fp64); the caller reduces over pairs.
    """
    _check_options(beta=beta, lam=lam, gamma=gamma, contrast=contrast)
    check_choice("regularise", regularise, REGULARISED)
    chosen = {"token_logp": chosen_token_logp, "mu": chosen_mu, "log_sigma": chosen_log_sigma, "mask": chosen_mask}
    rejected = {
        "token_logp": rejected_token_logp,
        "mu": rejected_mu,
        "log_sigma": rejected_log_sigma,
        "mask": rejected_mask,
    }
    _check("chosen_", **chosen)
    _check("rejected_", **rejected)
    if chosen_mask.shape[0] != rejected_mask.shape[0]:
        raise ValueError(
            f"rejected_token_logp must hold {chosen_mask.shape[0]} rows like chosen_token_logp, got "
            f"{rejected_mask.shape[0]}; pair the rows up"
        )
    objective: Tensor | float = 0.0
    last_mu = []
    for name, sign, response in (("chosen", 1.0, chosen), ("rejected", -1.0, rejected)):
        mask = response["mask"]
        q, mu, log_sigma = _masked(mask, response["token_logp"], response["mu"], response["log_sigma"])
        counted = _counted(mask, as_printed)
        objective = objective + times(sign * beta, q.where(counted, 0.0).sum(-1))
        if regularise in ("both", name):
            objective = objective + _regulariser(q, mu, log_sigma, mask, counted, gamma, lam)
        last_mu.append(last_value(mu, mask))
    return -(objective + contrast * torch.sigmoid(last_mu[0] - last_mu[1]))


def literal_q(token_logp: Tensor, prob_lse: Tensor, *, alpha: float) -> Tensor:
    """Q read literally, log softmax(alpha p)[y] = alpha exp(lp) - log sum_v exp(alpha p_v), differentiable in both.

    Args:
        token_logp: (B, T) log-probs of the labels, nats.
        prob_lse: (B, T) log sum_v exp(alpha p_v) over the whole vocabulary, of the same positions and the same alpha
            (``linear_prob_lse``).
        alpha: > 0. Probabilities differ by 1 at most: with alpha far below log V, Q is nearly -log V everywhere.

    Returns:
        (B, T), nats, for ``ava_d_loss`` and ``ava_p_loss`` in place of token_logp.

    Raises:
        TypeError, ValueError: alpha out of range, shapes that differ.

    Source: arXiv 2411.09341, read literally.
    """
    check_range("alpha", alpha, remedy="it scales the probabilities")
    _check("", token_logp=token_logp, prob_lse=prob_lse)
    return alpha * wide(token_logp).exp() - wide(prob_lse)


@register(
    "bradley_terry",
    pass_class="C",
    formula="-log sigmoid(r_w - r_l), r = mu of the reward head at the last token",
    source="Bradley and Terry (1952)",
    evidence="derived",
    of_log_probs=False,
)
def bradley_terry_loss(chosen_mu: Tensor, rejected_mu: Tensor) -> Tensor:
    """The loss of a reward model on pairs: -log sigmoid(mu_w - mu_l).

    The lm_head is not computed in ``VARTrainer``, and its weight, if it is not the embedding's too, is left as it is.

    Args:
        chosen_mu, rejected_mu: (P,) scores of completions, of any reward model; for ``VARTrainer`` those of the reward
            head at the last token. Differentiated.
    """
    return -logsigmoid(chosen_mu - rejected_mu)


def pair_accuracy(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """The share of pairs whose chosen reward is the larger, ties counting half: (P,), (P,) -> (), detached."""
    rewards = {"chosen_reward": chosen_reward, "rejected_reward": rejected_reward}
    chosen_P, rejected_P = read_rows("pair", rewards, **rewards)
    margin_P = (chosen_P - rejected_P).detach()
    return ((margin_P.sign() + 1) / 2).mean()


def _counted(mask: Tensor, as_printed: bool) -> Tensor:
    """Mask of the tokens that likelihood and KL count: every label, or all but the last."""
    return mask & (mask.flip(1).cumsum(1).flip(1) > 1) if as_printed else mask


def _regulariser(
    q: Tensor, mu: Tensor, log_sigma: Tensor, mask: Tensor, counted: Tensor, gamma: float, lam: float
) -> Tensor:
    """sum_t (-KL_t + lam TD_t) of each sequence, (B,)."""
    kl = (((2 * log_sigma).exp() + mu.square() - 1) / 2 - log_sigma).where(counted, 0.0)
    both = mask[:, 1:] & mask[:, :-1]
    error = (q[:, :-1] - times(gamma, q[:, 1:]) - mu[:, :-1]) * (-log_sigma[:, :-1]).exp()
    td = -error.square() / 2 - log_sigma[:, :-1] - math.log(2 * math.pi) / 2
    return times(lam, td.where(both, 0.0).sum(-1)) - kl.sum(-1)


def last_value(mu: Tensor, mask: Tensor) -> Tensor:
    """mu at the last position that counts, (B,)."""
    position = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask  # 0: none
    return mu.gather(1, (position.amax(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)


def _masked(mask: Tensor, *values: Tensor) -> list[Tensor]:
    return [wide(v).where(mask, 0.0) for v in values]


def _check_options(*, gamma: float, **weights: float) -> None:
    for name, value in weights.items():
        check_range(name, value, closed=True, remedy="it weighs a term of the objective")
    check_share("gamma", gamma, "it discounts the next position's Q")


def _check(prefix: str, **tensors: Tensor) -> None:
    """(B, T) tensors of one shape, floating point, and bool for a mask."""
    first = next(iter(tensors))
    for name, values in tensors.items():
        kind, remedy = "floating-point", "pass what the head gives"
        if name == "mask":
            kind, remedy = "bool", "write labels != ignore_index"
        check_kind(f"{prefix}{name}", values, kind, "(B, T), one value a token", remedy)
        if values.dim() != 2 or values.shape != tensors[first].shape:
            like = "" if name == first else f" = {tuple(tensors[first].shape)} like {prefix}{first}"
            raise ValueError(f"{prefix}{name} must be (B, T){like}, got {tuple(values.shape)}; pad packed rows first")
