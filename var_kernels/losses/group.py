"""Losses over all completions of a prompt: flat (B,) rows, equal group_ids for one prompt, groups of any size. Each
returns one term per row; a group's loss is the sum of its rows' terms."""

import torch
from torch import Tensor

from var_kernels.losses.checks import (
    TokenReduction,
    check_constants,
    check_integers,
    check_range,
    check_rows,
    check_sequences,
    per_token,
    wide,
)
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
        policy_logp: (B,) summed log-probs under the policy, nats; differentiated.
        ref_logp: (B,) the same under the frozen reference, nats; constants.
        reward: (B,) reward units; constants.
        group_ids: (B,) integers, equal for the same prompt. A group of one row costs nothing.
        beta: > 0, on the policy's log-ratio.
        reward_temperature: > 0, reward units.

    Returns:
        (B,) the rows' terms, nats, fp32 (fp64 for fp64 inputs); sum them and divide by the number of groups.
    """
    groups, scaled_B = scaled_log_ratio(policy_logp, ref_logp, reward, group_ids, beta)
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
        loss of row k = -f_k R_k

    No reference: add ``sft_loss`` on the best completion, or stop early, against drift.

    Args:
        policy_logp: (B,) SUMMED log-probs under the policy, nats; differentiated.
        reward: (B,), divided by its own temperature where one is wanted; constants.
        group_ids: (B,) integers, equal for the same prompt. A group of one row has the constant loss -1.
        lengths: (B,) integers, tokens that carry loss; for "mean".
        temperature: > 0, nats. 2 in the authors' code; sums are tens of nats apart there too, where f is one-hot and
            the gradient vanishes.
        token_reduction: "sum", as the authors' code has it, or "mean" over the tokens.

    Returns:
        (B,) the rows' terms, each in [-1, 0], fp32 (fp64 for fp64 inputs); sum them and divide by the number of groups.
    """
    check_range("temperature", temperature, remedy=NEGATE)
    groups = check_groups(policy_logp, reward, group_ids)
    s_B = per_token(wide(policy_logp), lengths, token_reduction, name="lengths", like="policy_logp")
    log_f_B = group_log_softmax(s_B / temperature, groups)
    log_r_B = group_log_softmax(wide(reward.detach()), groups)
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

    To train by it alone, drop the others before the forward pass and use ``linear_weighted_nll``.

    Args:
        policy_logp: (B,) SUMMED log-probs under the policy, nats; differentiated.
        reward: (B,); constants.
        group_ids: (B,) integers, equal for the same prompt.
        lengths: (B,) integers, tokens that carry loss; for "mean".
        token_reduction: "sum" | "mean".

    Returns:
        (B,) nats per sequence or per token, fp32 (fp64 for fp64 inputs); one row of each group is not 0.

    The best of each prompt's K samples is the local ranking of the authors' code (LMFlow); its other strategy takes the
    best 1 / K of all samples together.
    """
    check_rows(policy_logp=policy_logp, reward=reward)
    nll_B = -per_token(wide(policy_logp), lengths, token_reduction, name="lengths", like="policy_logp")
    # where, not times 0: a left-out row of -inf would make NaN
    return nll_B.where(best_of_group(reward, group_ids), 0.0)


def best_of_group(reward: Tensor, group_ids: Tensor) -> Tensor:
    """(B,) bool: the row with the highest reward of its group, the first one where several have it."""
    check_sequences(reward=reward)
    check_integers("reward", reward, group_ids=group_ids)
    groups = group_rows(group_ids)
    row_B = torch.arange(reward.shape[0], device=reward.device)
    earliest_first_B = (-row_B.double()).where(reward == groups.max(reward), -torch.inf)
    return earliest_first_B == groups.max(earliest_first_B)


def group_log_softmax(score_B: Tensor, groups: Groups) -> Tensor:
    """score - LSE of the scores of the row's group: (B,), differentiable; 0 for a group of one."""
    top_B = groups.max(score_B)
    # the difference to the maximum is formed first: fp32 sums of a thousand nats would lose four digits in an LSE
    below_top_B = (score_B - top_B).where(top_B > -torch.inf, 0.0)  # rows that are all -inf count alike
    return below_top_B - groups.sum(below_top_B.exp()).log()


def scaled_log_ratio(
    policy_logp: Tensor, ref_logp: Tensor, reward: Tensor, group_ids: Tensor, beta: float
) -> tuple[Groups, Tensor]:
    """The groups and beta (s - sr), (B,), checked; no gradient to the reference."""
    check_range("beta", beta, remedy=NEGATE)
    check_rows(policy_logp=policy_logp, ref_logp=ref_logp)
    groups = check_groups(policy_logp, reward, group_ids)
    check_constants(ref_logp=ref_logp)
    return groups, beta * (wide(policy_logp) - wide(ref_logp.detach()))


def check_groups(policy_logp: Tensor, reward: Tensor, group_ids: Tensor) -> Groups:
    check_sequences(policy_logp=policy_logp, reward=reward)
    check_integers("policy_logp", policy_logp, group_ids=group_ids)
    return group_rows(group_ids)


def reward_log_softmax(reward: Tensor, reward_temperature: float, groups: Groups) -> Tensor:
    check_range("reward_temperature", reward_temperature, remedy=NEGATE)
    return group_log_softmax(wide(reward.detach()) / reward_temperature, groups)
