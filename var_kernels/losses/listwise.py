"""Losses that fit a target over all completions of a prompt, known from their rewards: flat (B,) rows, equal group_ids
for one prompt. Each returns one term per row; a group's loss is the sum of its rows' terms. Class C."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from var_kernels.losses.advantages import group_advantage
from var_kernels.losses.checks import check_range, times
from var_kernels.losses.group import NEGATE, group_log_softmax, reward_log_softmax, scaled_log_ratio
from var_kernels.losses.registry import register
from var_kernels.losses.segments import group_rows


@register(
    "info_nca",
    pass_class="C",
    formula="-softmax_k(r / reward_temperature) log softmax_k(beta (s - sr)), summed over a prompt's completions",
    source="InfoNCA, arXiv 2402.05369",
    evidence="third-party code",
    defaults={"beta": 0.1, "reward_temperature": 1.0},
)
def info_nca_loss(
    policy_logp: Tensor, ref_logp: Tensor, reward: Tensor, group_ids: Tensor, *, beta: float, reward_temperature: float
) -> Tensor:
    """InfoNCA: cross-entropy of the softmax of a prompt's log-ratios against the softmax of its rewards.

        loss of row k = -softmax_k(r / reward_temperature) log softmax_k(beta (s - sr))

    ``exo_loss`` with the divergence the other way round: forward KL, up to the target's entropy. Its minimiser over a
    full candidate set is pi_ref exp(r / (beta reward_temperature)) / Z. Only differences of log-ratios matter. Of a
    pair with a hard preference it is DPO.

    Args:
        beta, reward_temperature: see ``exo_loss``.
    """
    groups, scaled_B = group_rows(group_ids), scaled_log_ratio(policy_logp, ref_logp, beta)
    target_B = reward_log_softmax(reward, reward_temperature, groups).exp()
    return times(-target_B, group_log_softmax(scaled_B, groups))


@register(
    "nca",
    pass_class="C",
    formula="-log sigmoid(-beta (s - sr)) / K - softmax_k(r / reward_temperature) log sigmoid(beta (s - sr)), summed "
    "over a prompt's completions",
    source="NCA, arXiv 2402.05369",
    evidence="third-party code",
    defaults={"beta": 0.1, "reward_temperature": 1.0},
)
def nca_loss(
    policy_logp: Tensor, ref_logp: Tensor, reward: Tensor, group_ids: Tensor, *, beta: float, reward_temperature: float
) -> Tensor:
    """NCA: each completion told by itself from noise of the reference, so that log-ratios have a level of their own.

        loss of row k = -log sigmoid(-beta rho_k) / K - softmax_k(r / reward_temperature) log sigmoid(beta rho_k)
        rho = s - sr,   K completions of the prompt

    Unlike ``info_nca_loss`` it does not let the likelihood of good completions fall as long as that of bad ones falls
    faster. Where the K completions are draws of the reference it aims at pi_ref exp(r / reward_temperature) / Z for
    beta 1, with Z their mean of exp(r / reward_temperature). TRL's ``nca_pair`` is this with (1, 0) for the softmax.

    A group of one costs log 2 or more.

    Args:
        beta, reward_temperature: see ``exo_loss``.
    """
    groups, scaled_B = group_rows(group_ids), scaled_log_ratio(policy_logp, ref_logp, beta)
    size_B = groups.sum(torch.ones_like(scaled_B))
    target_B = reward_log_softmax(reward, reward_temperature, groups).exp()
    return -logsigmoid(-scaled_B) / size_B - times(target_B, logsigmoid(scaled_B))


@register(
    "gvpo",
    pass_class="C",
    formula="(beta (rho - mean rho) - (r - mean r))^2 / (2 (K - 1)), rho = s - sr, summed over a prompt's completions",
    source="GVPO, arXiv 2504.19599",
    evidence="third-party code",
    defaults={"beta": 0.1},
    reads_draws=True,
)
def gvpo_loss(policy_logp: Tensor, ref_logp: Tensor, reward: Tensor, group_ids: Tensor, *, beta: float) -> Tensor:
    """GVPO: half the variance, over a prompt's completions, of what the log-ratios miss of the rewards.

        loss of row k = (beta (rho_k - mean rho) - (r_k - mean r))^2 / (2 (K - 1))     reward units^2; rho = s - sr

    Z cancels in the differences from the mean, and whoever drew the completions need not be the reference: the
    minimiser over completions of any full support is pi_ref exp(r / beta) / Z. With two completions it is
    ``rebel_loss`` at eta = 1 / beta, times beta^2 / 4. A group of one costs nothing. The paper's loss, divided by beta,
    has the same gradient.

    Args:
        beta: > 0, the KL temperature, reward units per nat.
    """
    groups, scaled_B = group_rows(group_ids), scaled_log_ratio(policy_logp, ref_logp, beta)
    missed_B = scaled_B - reward
    size_B = groups.sum(torch.ones_like(missed_B))
    missed_B = missed_B - groups.sum(missed_B) / size_B
    return missed_B.square() / (2 * (size_B - 1).clamp(min=1))


@register(
    "target_po",
    pass_class="C",
    formula="-softmax_k(s_old + A / eta) log softmax_k(s), A = (r - mean r) / std r, over a prompt's completions",
    source="Target policy optimisation, arXiv 2604.06159",
    evidence="paper",
    reads_draws=True,
)
def target_po_loss(
    policy_logp: Tensor, old_logp: Tensor, reward: Tensor, group_ids: Tensor, *, eta: float = 1.0
) -> Tensor:
    """Target policy optimisation: cross-entropy against the old policy, tilted by standardised rewards, on its draws.

        u = (r - mean r) / std r,   q = softmax_k(s_old + u / eta),   loss of row k = -q_k log softmax_k(s)

    The gradient, softmax_k(s) - q_k, is 0 once the target is met, and needs no clip. Not to be taken for the loss of
    triples that is called TPO too. A group of one row costs nothing.

    Args:
        eta: > 0; small ones follow the reward.
    """
    check_range("eta", eta, remedy=NEGATE)
    groups, tilted_B = group_rows(group_ids), old_logp + group_advantage(reward, group_ids) / eta
    return times(-group_log_softmax(tilted_B, groups).exp(), group_log_softmax(policy_logp, groups))
