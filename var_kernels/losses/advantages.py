"""Advantages from rewards, by name: what a policy gradient multiplies a completion's log-probs by. Constants, (B,).

name                    advantage                                                       as in
"group"                 (r - mean r) / std r over the prompt's completions              GRPO
"group_mean"            r - mean r over the prompt's completions                        Dr. GRPO
"leave_one_out"         r - mean of r over the prompt's other completions               RLOO
"batch"                 (r - mean r) / std r over the global batch                      REINFORCE++
"group_mean_batch_std"  "group_mean", divided by its deviation over the global batch    REINFORCE++-baseline
"given"                 r as it is, of any sign: a weight column of the data            signed or weighted SFT
"""

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from var_kernels.losses.checks import check_beside, check_choice, read_rows
from var_kernels.losses.segments import group_rows
from var_kernels.losses.weights import warn_if_advantages_vanish

Advantages = Literal["group", "group_mean", "leave_one_out", "batch", "group_mean_batch_std", "given"]
ADVANTAGES: tuple[str, ...] = get_args(Advantages)
"""Names of ``advantages_by_name``."""
WITHIN_PROMPT = ("group", "group_mean", "leave_one_out", "group_mean_batch_std")  # compare a prompt's completions
_GROUP_EPS = 1e-4  # as other trainers have it
_BATCH_EPS = 1e-5  # AWR's authors' code


def advantages_by_name(
    name: Advantages, reward: Tensor, group_ids: Tensor, *, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """The advantage of each row by one of the names above, (B,), detached.

    Args:
        name: a key of the table above.
        reward: (B,) reward units.
        group_ids: (B,) integers, equal for the same prompt, whose rows are all here.
        process_group: the ranks that "batch" and "group_mean_batch_std" span.

    Raises:
        ValueError, TypeError: an unknown name, shapes and dtypes; on the CPU also rewards that are not finite.
    """
    check_choice("advantages", name, ADVANTAGES)
    if name == "given":
        return read_rows(reward=reward)[0]
    if name == "batch":
        return standardised_advantage(reward, process_group=process_group)
    if name == "leave_one_out":
        return leave_one_out_advantage(reward, group_ids)
    advantage_B = group_advantage(reward, group_ids, divide_by_std=name == "group")
    if name == "group_mean_batch_std":
        return standardised_advantage(advantage_B, process_group=process_group)
    return advantage_B


def group_advantage(reward: Tensor, group_ids: Tensor, *, divide_by_std: bool = True) -> Tensor:
    """(r - mean r) / (std r + 1e-4) over the completions of the row's prompt: the advantage of GRPO.

    Args:
        reward: (B,) reward units.
        group_ids: (B,) integers, equal for the same prompt; 0 comes of a group of one, and of equal rewards.
        divide_by_std: by the standard deviation of a sample (of n - 1). False: Dr. GRPO.

    Returns:
        (B,), fp32 (fp64 for fp64 inputs), detached; repeat it over the tokens of its row.

    Raises:
        TypeError, ValueError: shapes and dtypes; on the CPU also rewards that are not finite.

    Warns:
        IgnoredRewardsWarning: all are 0 (CPU).

    Source: arXiv 2402.03300 and 2503.20783, as other trainers implement them.
    """
    (reward_B,) = read_rows(reward=reward)
    check_beside("reward", reward, group_ids=group_ids)
    groups, exact_B = group_rows(group_ids), reward_B.double()
    size_B = groups.sum(torch.ones_like(exact_B))
    advantage_B = exact_B - groups.sum(exact_B) / size_B
    warn_if_advantages_vanish(advantage_B, exact_B, "group")
    if divide_by_std:
        spread_B = (groups.sum(advantage_B.square()) / (size_B - 1).clamp(min=1)).sqrt()
        advantage_B = advantage_B / (spread_B + _GROUP_EPS)
    return advantage_B.to(reward_B.dtype)


def leave_one_out_advantage(reward: Tensor, group_ids: Tensor) -> Tensor:
    """r minus the mean reward of the prompt's OTHER completions: RLOO's advantage, (B,), detached.

    K / (K - 1) times ``group_advantage(..., divide_by_std=False)``; the baseline does not depend on the row itself, so
    that the policy gradient stays without bias. 0 for a group of one.

    Args, Returns, Raises, Warns: as ``group_advantage``.

    Source: arXiv 2402.14740.
    """
    advantage_B = group_advantage(reward, group_ids, divide_by_std=False)
    size_B = group_rows(group_ids).sum(torch.ones_like(advantage_B))
    return advantage_B * size_B / (size_B - 1).clamp(min=1)


def standardised_advantage(
    reward: Tensor, value: Tensor | None = None, *, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """(A - mean A) / (std A + 1e-5) over the batch, A = reward - value: (B,) fp32 (fp64 for fp64 inputs), detached.

    Args:
        reward: (B,) reward units.  value: (B,) a baseline, such as a learned V(x); None: 0.
        process_group: mean and standard deviation (of the population) then span all its ranks; their B may differ.

    Raises:
        TypeError, ValueError: shapes and dtypes; on the CPU also values that are not finite.

    Warns:
        IgnoredRewardsWarning: all are 0 (CPU).

    Source: arXiv 1910.00177, the authors' code.
    """
    baseline: Any = {} if value is None else {"value": value}
    advantage_B, *values = read_rows(reward=reward, **baseline)
    if values:
        advantage_B = advantage_B - values[0]
    exact_B = advantage_B.double()
    total = torch.stack([exact_B.sum(), torch.ones_like(exact_B).sum()])  # a sum and a count, made on the device
    if process_group is not None:
        dist.all_reduce(total, group=process_group)
    count = total[1].clamp(min=1)
    centred_B = exact_B - total[0] / count
    squares = centred_B.square().sum()
    if process_group is not None:
        dist.all_reduce(squares, group=process_group)
    deviation = (squares / count).sqrt()
    warn_if_advantages_vanish(deviation, exact_B, "batch")
    return (centred_B / (deviation + _BATCH_EPS)).to(advantage_B.dtype)
