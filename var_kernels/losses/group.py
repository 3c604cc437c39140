"""Losses over all completions of a prompt: flat (B,) rows, equal group_ids for one prompt, groups of any size. Each
returns one term per row; a group's loss is the sum of its rows' terms."""

import torch
from torch import Tensor

from var_kernels.losses.checks import TokenReduction, check_beside, check_range, per_token, read_rows
from var_kernels.losses.registry import register
from var_kernels.losses.segments import Groups, group_rows

NEGATE = "negate the rewards to minimise them"


@register(
    "exo",
    pass_class="C",
    formula="KL(softmax(beta (s - sr)) || softmax(r / reward_temperature)) over a prompt's completions",
    source="arXiv 2402.00856",
    evidence="code",
    defaults={"beta": 0.1, "reward_temperature": 1.0},
)
def exo_loss(
    policy_logp: Tensor, ref_logp: Tensor, reward: Tensor, group_ids: Tensor, *, beta: float, reward_temperature: float
) -> Tensor:
    """Efficient exact optimisation: reverse KL between two softmaxes over the completions of a prompt.

        f = softmax_k(beta (s_k - sr_k)),   p = softmax_k(r_k / reward_temperature)
        loss of row k = f_k (log f_k - log p_k)           their sum over the group: KL(f || p)

    0 loss over a full candidate set is pi_ref exp(r / (beta reward_temperature)) / Z. Hard preferences: rewards whose
    softmax is (1 - e, e).

    Args:
        group_ids: (B,) integers, equal for the same prompt. A group of one row costs nothing.
        beta: > 0, on the policy's log-ratio.
        reward_temperature: > 0, reward units.
    """
    groups, scaled_B = group_rows(group_ids), scaled_log_ratio(policy_logp, ref_logp, beta)
    log_f_B = group_log_softmax(scaled_B, groups)
    log_p_B = reward_log_softmax(reward, reward_temperature, groups)
    f_B = log_f_B.exp()
    return f_B * (log_f_B - log_p_B).where(f_B > 0, 0.0)


@register(
    "lire",
    pass_class="C",
    formula="-softmax_k(s / temperature) softmax_k(r), summed over a prompt's completions",
    source="arXiv 2405.13516",
    evidence="code",
    defaults={"temperature": 2.0},
)
def lire_loss(
    policy_logp: Tensor,
    reward: Tensor,
    group_ids: Tensor,
    lengths: Tensor | None = None,
    *,
    temperature: float,
    token_reduction: TokenReduction = "sum",
) -> Tensor:
    """Listwise reward enhancement: the expected (normalised) reward under the policy restricted to the completions.

        f = softmax_k(s_k / temperature),   R = softmax_k(r_k)
        loss of row k = -f_k R_k          in [-1, 0]

    No reference: add ``sft_loss`` on the best completion, or stop early, against drift.

    Args:
        reward: (B,), divided by its own temperature where one is wanted; constants.
        group_ids: (B,) integers, equal for the same prompt. A group of one row has the constant loss -1.
        temperature: > 0, nats. 2 in the authors' code; sums are tens of nats apart there too, where f is one-hot and
            the gradient vanishes.
        token_reduction: "sum", as the authors' code has it, or "mean" over the tokens, for which it needs lengths.
    """
    check_range("temperature", temperature, remedy=NEGATE)
    groups, s_B = group_rows(group_ids), per_token(policy_logp, lengths, token_reduction)
    log_f_B = group_log_softmax(s_B / temperature, groups)
    log_r_B = group_log_softmax(reward, groups)
    return -(log_f_B + log_r_B).exp()


@register(
    "raft",
    pass_class="A",
    formula="-s of each prompt's completion of the highest reward, 0 for its others",
    source="arXiv 2304.06767",
    evidence="code",
)
def raft_loss(
    policy_logp: Tensor,
    reward: Tensor,
    group_ids: Tensor,
    lengths: Tensor | None = None,
    *,
    token_reduction: TokenReduction = "sum",
) -> Tensor:
    """Best-of-n SFT (RAFT): maximum likelihood of each prompt's best completion.

        loss = -s (or -s / len) for the row with its group's highest reward (``best_of_group``), 0 for the others

    To train by it alone, drop the others before the forward pass and use ``linear_weighted_nll``. The best of each
    prompt's K samples is the local ranking of the authors' code (LMFlow); its other strategy takes the best 1 / K of
    all samples together.

    Args:
        token_reduction: "sum" or "mean" over the tokens, for which it needs lengths.
    """
    nll_B = -per_token(policy_logp, lengths, token_reduction)
    # where, not times 0: a left-out row of -inf would make NaN
    return nll_B.where(best_of_group(reward, group_ids), 0.0)


def best_of_group(reward: Tensor, group_ids: Tensor) -> Tensor:
    """(B,) bool: the row with the highest reward of its group, the first one where several have it."""
    read_rows(reward=reward)
    check_beside("reward", reward, group_ids=group_ids)
    groups = group_rows(group_ids)
    row_B = torch.arange(reward.shape[0], device=reward.device)
    earliest_first_B = (-row_B.double()).where(reward == groups.max(reward), -torch.inf)
    return earliest_first_B == groups.max(earliest_first_B)


def group_log_softmax(score_B: Tensor, groups: Groups) -> Tensor:
    """score - LSE of the scores of the row's group: (B,), differentiable; 0 for a group of one."""
    top_B = groups.max(score_B)
    # the difference to the maximum is formed first: fp32 sums of a thousand nats would lose four digits in an LSE
    below_top_B = (score_B - top_B).where(top_B != -torch.inf, 0.0)  # rows that are all -inf count alike
    return below_top_B - groups.sum(below_top_B.exp()).log()


def scaled_log_ratio(policy_logp: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    check_range("beta", beta, remedy=NEGATE)
    return beta * (policy_logp - ref_logp)


def reward_log_softmax(reward: Tensor, reward_temperature: float, groups: Groups) -> Tensor:
    check_range("reward_temperature", reward_temperature, remedy=NEGATE)
    return group_log_softmax(reward / reward_temperature, groups)
