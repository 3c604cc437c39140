"""The methods by name: what an item of a batch is, what is known before the forward pass, and the loss inside the
lm_head.

A step is prepared once for all of its micro-batches on this rank (``prepare``), because normalisers span the global
batch. The micro-batch losses of a step, summed over accumulation steps and ranks, are the loss of the global batch.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from var_kernels.losses import dpo_loss, var_weights
from var_kernels.losses.sequences import expand_to_tokens, sequence_sum
from var_kernels.ops import linear_logprob, linear_weighted_nll

logger = logging.getLogger(__name__)

Rows = dict[str, Tensor]  # of a micro-batch or a whole step: "reward", "ref_logp", "group", "length", "weight" (B,)


@dataclass(frozen=True)
class Method:
    """``items(rows, config)`` lists the row numbers of each item. ``prepare(step, config, group)`` returns what to add
    to the step's rows, (B,) each, and metrics of the global batch. ``loss(hidden, head, labels, rows, config)``
    returns the micro-batch's share of the loss (scalar), the sequences' log-probs (B,) and the argmax hits at each
    label (B, T); it runs inside the head."""

    items: Callable[[Any, Any], list[list[int]]]
    need_rewards: str
    uses_ref: Callable[[Any], bool]
    prepare: Callable[[Rows, Any, dist.ProcessGroup | None], tuple[Rows, dict[str, Tensor]]]
    loss: Callable[..., tuple[Tensor, Tensor, Tensor]]


# ---- items -----------------------------------------------------------------------------------------------------------


def _var_items(rows, config) -> list[list[int]]:
    whole_prompts = config.normalizer in ("group", "self_normalised")
    return rows.groups if whole_prompts else [[row] for row in range(len(rows))]


def _sft_items(rows, config) -> list[list[int]]:
    if config.sft_on == "all":
        return [[row] for row in range(len(rows))]
    items = []
    for group, is_pair in zip(rows.groups, rows.is_pair, strict=True):
        if is_pair:
            items.append(group[:1])
        elif rows.reward is None or rows.reward[group].isnan().any():
            items += [[row] for row in group]
        else:
            items.append([group[int(rows.reward[group].argmax())]])
    return items


def _dpo_items(rows, config) -> list[list[int]]:
    """[chosen, rejected]: those of a pair, otherwise the best and the worst of a prompt, if their rewards differ."""
    items, ties = [], 0
    for group, is_pair in zip(rows.groups, rows.is_pair, strict=True):
        if is_pair:
            items.append(group)
            continue
        reward = rows.reward[group]
        best, worst = group[int(reward.argmax())], group[int(reward.argmin())]
        if rows.reward[best] > rows.reward[worst]:
            items.append([best, worst])
        else:
            ties += 1
    if ties:
        logger.warning(
            "%d of %d prompts have no two completions with different rewards: no pair", ties, len(rows.groups)
        )
    if not items:
        raise ValueError("method 'dpo' needs pairs: no prompt has two completions with different rewards")
    return items


# ---- what is known before the forward pass ---------------------------------------------------------------------------


def _total(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def _prepare_var(step: Rows, config, group) -> tuple[Rows, dict[str, Tensor]]:
    grouped = config.normalizer in ("group", "self_normalised")
    weights = var_weights(
        step["reward"],
        step["ref_logp"] if config.reference != "none" else None,
        lam=config.lam,
        normalizer=config.normalizer,
        reference=config.reference,
        lengths=step["length"],
        group_ids=step["group"] if grouped else None,
        process_group=group,
    )
    weight, log_z = weights.weight.double(), weights.log_z.double()
    log_z_sum = log_z.sum() if log_z.dim() else log_z * len(weight)
    size, total, log_z_total = _total(torch.stack([weight.new_tensor(len(weight)), weight.sum(), log_z_sum]), group)
    # The estimators differ in sum w (1, B, the number of prompts); divided by it, lam alone decides and not the batch
    # size.
    share = weight / total
    entropy = _total(torch.special.entr(share).sum(), group)
    metrics = {
        "ess": weights.ess,
        "ess_share": weights.ess / size,
        "log_z": log_z_total / size,
        "weight_entropy": entropy,
    }
    return {"weight": share}, metrics


def _prepare_sft(step: Rows, config, group) -> tuple[Rows, dict[str, Tensor]]:
    tokens = _total(step["length"].sum(), group)
    return {"weight": torch.ones_like(step["length"], dtype=torch.float64) / tokens.clamp(min=1)}, {}


def _prepare_dpo(step: Rows, config, group) -> tuple[Rows, dict[str, Tensor]]:
    rows = _total(torch.ones_like(step["length"]).sum(), group)
    return {"weight": (2.0 / rows.double()).expand(len(step["length"]))}, {}


# ---- losses inside the head ------------------------------------------------------------------------------------------


def _weighted_nll(hidden: Tensor, head, labels: Tensor, rows: Rows, config) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i weight_i * nll_i: class A, gradients made in the forward pass."""
    weight = rows["weight"].to(torch.promote_types(hidden.dtype, torch.float32))
    loss, logp, argmax = linear_weighted_nll(
        hidden,
        head.lm_head_weight,
        labels,
        expand_to_tokens(weight, labels),
        head.bias,
        return_logp=True,
        return_argmax=True,
        workspace_mb=config.workspace_mb,
        **head.logit_options,
    )
    return loss, sequence_sum(logp, labels), argmax == labels


def _dpo(hidden: Tensor, head, labels: Tensor, rows: Rows, config) -> tuple[Tensor, Tensor, Tensor]:
    """Rows 2p and 2p + 1 are the chosen and the rejected completion of pair p."""
    logp, argmax = linear_logprob(
        hidden,
        head.lm_head_weight,
        labels,
        head.bias,
        return_argmax=True,
        workspace_mb=config.workspace_mb,
        **head.logit_options,
    )
    s, ref = sequence_sum(logp, labels), rows["ref_logp"]
    pair_loss = dpo_loss(s[0::2], s[1::2], ref[0::2], ref[1::2], beta=config.beta)
    return (pair_loss * rows["weight"][0::2].to(pair_loss.dtype)).sum(), s.detach(), argmax == labels


METHODS = {
    "var": Method(_var_items, "required", lambda config: True, _prepare_var, _weighted_nll),
    "sft": Method(_sft_items, "optional", lambda config: False, _prepare_sft, _weighted_nll),
    "dpo": Method(_dpo_items, "unless_pair", lambda config: True, _prepare_dpo, _dpo),
}
