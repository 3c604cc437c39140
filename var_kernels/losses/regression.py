"""Losses that regress a policy's log-ratio onto rewards: REBEL (pairs), QRPO, A*-PO and DRO-V (single completions).
Class C: the gradient is the residual, known only with the sequence's sum."""

import math
from typing import Any

import torch
from torch import Tensor

from var_kernels.losses.checks import check_beside, check_constants, check_range, read_rows
from var_kernels.losses.group import NEGATE
from var_kernels.losses.registry import register
from var_kernels.losses.segments import group_rows


@register(
    "rebel",
    pass_class="C",
    formula="(D - eta (r_w - r_l))^2",
    source="arXiv 2404.16767",
    evidence="code",
    defaults={"eta": 1.0},
)
def rebel_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    chosen_reward: Tensor,
    rejected_reward: Tensor,
    *,
    eta: float,
) -> Tensor:
    """Regression of relative rewards. Which of the two is called chosen plays no part.

        loss = (D - eta (r_w - r_l))^2,     D = (s_w - sr_w) - (s_l - sr_l)          nats^2

    The minimiser over all pairs is pi_ref exp(eta r) / Z: VAR's pi* at lam = 1 / eta. Written as
    (D / eta - (r_w - r_l))^2, the loss and its gradient are eta^2 times smaller.

    Args:
        ref_chosen_logp, ref_rejected_logp: (P,) the same under the policy that drew the completions (the iteration's
            starting model), nats; constants.
        eta: > 0, nats per reward unit.
    """
    check_range("eta", eta, remedy=NEGATE)
    margin_P = (policy_chosen_logp - ref_chosen_logp) - (policy_rejected_logp - ref_rejected_logp)
    return (margin_P - eta * (chosen_reward - rejected_reward)).square()


@register(
    "qrpo",
    pass_class="C",
    formula="(T(q) - beta log Z - beta (s - sr))^2",
    source="arXiv 2507.08068",
    evidence="code",
    defaults={"beta": 0.1},
    compares="prompt",
    reads_draws=True,
)
def qrpo_loss(
    policy_logp: Tensor, ref_logp: Tensor, reward: Tensor, *, beta: float, log_z: float | None = None
) -> Tensor:
    """Quantile reward policy optimisation: with rewards replaced by their quantiles, Z is known and one completion is
    enough.

        loss = (T(q) - beta log Z - beta (s - sr))^2          units of T(q), squared

    q, the quantile of the completion's reward among those of the reference's own completions (``quantile_reward``), is
    uniform on [0, 1] for completions of the reference. So for T(q) = q

        Z = integral of exp(q / beta) over [0, 1] = beta (exp(1 / beta) - 1)

    which is the default; the authors' code leaves out the -1, as good for small beta. 0 loss everywhere is
    pi_ref exp(T(q) / beta) / Z.

    Args:
        reward: (B,) T(q): q itself, in [0, 1], or another transformation with its own log_z; constants.
        beta: > 0, the KL temperature, in units of T(q); 3e-4 to 3e-3 in the authors' experiments, on sums over long
            completions.
        log_z: log E[exp(T(q) / beta)] of the transformation, nats; None: that of T(q) = q.
    """
    check_range("beta", beta, remedy=NEGATE)
    if log_z is None:
        log_z = math.log(beta) + 1 / beta + math.log(-math.expm1(-1 / beta))  # exp(1 / beta) overflows below 0.0015
    check_range("log_z", log_z, -math.inf, remedy="pass None for T(q) = q")
    return (reward - beta * log_z - beta * (policy_logp - ref_logp)).square()


def quantile_reward(reward: Tensor, ref_rewards: Tensor) -> Tensor:
    """q: the share of the reference's completions of the same prompt with a reward not above that of the completion.

    Args:
        reward: (B,) rewards of the completions to train on.
        ref_rewards: (B, M) rewards of M completions that the reference drew for each row's prompt.

    Returns:
        (B,) in [0, 1], fp32 (fp64 for fp64 inputs), detached.

    Raises:
        TypeError, ValueError: shapes, dtypes, M = 0; on the CPU also rewards that are not finite.

    Source: arXiv 2507.08068.
    """
    (reward_B,) = read_rows(reward=reward)
    if not isinstance(ref_rewards, Tensor) or ref_rewards.dim() != 2 or ref_rewards.shape[0] != reward.shape[0]:
        got = tuple(ref_rewards.shape) if isinstance(ref_rewards, Tensor) else type(ref_rewards).__name__
        raise ValueError(
            f"ref_rewards must be (B, M) with B = {reward.shape[0]} rows like reward, got {got}; M rewards of the "
            "reference's own completions a prompt"
        )
    if ref_rewards.shape[1] == 0:
        raise ValueError(
            "ref_rewards must hold at least one completion a prompt, got M = 0; draw some from the reference"
        )
    check_constants(ref_rewards=ref_rewards)
    not_above = ref_rewards.detach() <= reward.detach().unsqueeze(1)
    return not_above.to(reward_B.dtype).mean(1)  # (B, M) -> (B,)


@register(
    "astar_po",
    pass_class="C",
    formula="(r - V - beta (s - sr))^2, V = T log mean exp(r / T) over the prompt's completions, T = value_temperature",
    source="A*-PO, arXiv 2505.20686; OAPL, arXiv 2602.19362",
    evidence="paper",
    defaults={"beta": 0.1},
    compares="prompt",
    reads_draws=True,
)
def astar_po_loss(policy_logp: Tensor, ref_logp: Tensor, reward: Tensor, value: Tensor, *, beta: float) -> Tensor:
    """A*-PO: the log-ratio regressed onto the optimal advantage, its value estimated from draws of the reference.

        loss = (r - V - beta (s - sr))^2          reward units^2

    with V by ``soft_value`` of the rewards of the reference's own completions.

    At V = beta log Z the residual vanishes at pi* = pi_ref exp(r / beta) / Z, VAR's, whoever drew the completions.
    A*-PO draws these from the policy and V's from the reference beforehand; OAPL takes V from the same group, with the
    lagged policy that drew it as the reference. ``dro_loss`` learns V and is 2 beta times smaller.

    Args:
        beta: > 0, the KL temperature, reward units per nat; 1e-3 in the authors' runs, on long completions.
    """
    check_range("beta", beta, remedy=NEGATE)
    return (reward - value - beta * (policy_logp - ref_logp)).square()


def soft_value(reward: Tensor, group_ids: Tensor, *, temperature: float) -> Tensor:
    """temperature log mean exp(r / temperature) over the completions of the row's prompt: (B,), detached.

    For completions of the reference it estimates V = temperature log Z, from below where they are few. Large
    temperatures give their mean, small ones the best of them.

    Args:
        reward: (B,) reward units.  group_ids: (B,) integers, equal for the same prompt.
        temperature: > 0, reward units.

    Returns:
        (B,) reward units, equal within a prompt, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: temperature out of range, shapes and dtypes; on the CPU also rewards that are not finite.

    Source: arXiv 2505.20686.
    """
    check_range("temperature", temperature, remedy=NEGATE)
    (reward_B,) = read_rows(reward=reward)
    check_beside("reward", reward, group_ids=group_ids)
    groups, exact_B = group_rows(group_ids), reward_B.double()
    best_B = groups.max(exact_B)
    mass_B = groups.sum(((exact_B - best_B) / temperature).exp()) / groups.sum(torch.ones_like(exact_B))
    return (best_B + temperature * mass_B.log()).to(reward_B.dtype)


@register(
    "dro",
    pass_class="C",
    formula="(r - V - tau (s - sr))^2 / (2 tau), V constant",
    source="arXiv 2405.19107",
    evidence="paper",
    defaults={"tau": 1.0},
    compares="data",
)
def dro_loss(policy_logp: Tensor, ref_logp: Tensor, reward: Tensor, value: Tensor, *, tau: float) -> Tensor:
    """Direct reward optimisation with a learned value (DRO-V): the policy's part.

        loss = (r - V - tau (s - sr))^2 / (2 tau)          reward units x nats,   dloss/ds = -(r - V - tau (s - sr))

    1 / tau is the paper's, which keeps the gradient's size where tau is small. V gets no gradient here: train it by
    ``dro_value_loss``. Both residuals vanish at pi* = pi_ref exp(r / tau) / Z and V = tau log Z. The paper standardises
    rewards and learns one value per token; this function takes one value per sequence.

    Args:
        tau: > 0, the KL temperature, reward units per nat.
    """
    check_range("tau", tau, remedy=NEGATE)
    return (reward - value - tau * (policy_logp - ref_logp)).square() / (2 * tau)


def dro_value_loss(value: Tensor, policy_logp: Tensor, ref_logp: Tensor, reward: Tensor, *, tau: float) -> Tensor:
    """The value's part of DRO-V: 1/2 (r - V - tau (s - sr))^2, with a gradient to ``value`` alone.

    Args:
        value: (B,) V(x), reward units; differentiated.
        policy_logp, ref_logp: (B,) summed log-probs, nats; constants.
        reward: (B,) reward units; constants.
        tau: > 0.

    Returns:
        (B,) reward units^2 per sequence, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: as ``dro_loss``.

    Source: arXiv 2405.19107.
    """
    check_range("tau", tau, remedy=NEGATE)
    given: Any = {"policy_logp": policy_logp, "ref_logp": ref_logp, "reward": reward, "value": value}
    policy_B, ref_B, reward_B, value_B = read_rows(learning=("policy_logp", "value"), **given)
    return 0.5 * (reward_B - value_B - tau * (policy_B.detach() - ref_B)).square()
