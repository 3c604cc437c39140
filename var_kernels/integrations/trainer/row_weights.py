"""Each row's share of the loss of the global batch ("weight"), advantages, and metrics of them, before a step's first
forward pass. One function for each way of sharing: (step, config, group) -> Prepared.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from var_kernels.losses import advantages_by_name, alol_advantage, standardised_advantage, var_weights
from var_kernels.losses.advantages import WITHIN_PROMPT
from var_kernels.losses.segments import group_rows
from var_kernels.losses.weights import PER_PROMPT

Rows = dict[str, Tensor]  # of a micro-batch or a whole step: "reward", "ref_logp", "group", "length", "weight" (B,)
Prepared = tuple[Rows, dict[str, Tensor]]  # what to add to the step's rows, metrics: () of the global batch, or (B,)


def _total(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def _equal_weights(step: Rows, group, number_of_items: Tensor | None = None) -> Tensor:
    """(B,) fp64: 1 / number of items of the global batch; rows unless told otherwise."""
    length = step["length"]
    count = torch.tensor(len(length), device=length.device) if number_of_items is None else number_of_items
    return (1.0 / _total(count.double(), group).clamp(min=1)).expand(len(length))


def var(step: Rows, config, group) -> Prepared:
    grouped = config.normalizer in PER_PROMPT
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
    return {"weight": share, "sample_weight": torch.ones_like(share)}, metrics


def tokens(step: Rows, config, group) -> Prepared:
    """Mean over the tokens of the global batch."""
    return {"weight": _equal_weights(step, group, step["length"].sum())}, {}


def rows(step: Rows, config, group) -> Prepared:
    return {"weight": _equal_weights(step, group)}, {}


def pairs(step: Rows, config, group) -> Prepared:
    return {"weight": 2.0 * _equal_weights(step, group)}, {}


def groups(step: Rows, config, group) -> Prepared:
    """A row's term is its part of the prompt's loss: mean over the prompts of the global batch."""
    return {"weight": _equal_weights(step, group, group_rows(step["group"]).count())}, {}


def awr(step: Rows, config, group) -> Prepared:
    advantage = standardised_advantage(step["reward"], process_group=group)
    return {"weight": _equal_weights(step, group), "advantage": advantage}, {}


def alol(step: Rows, config, group) -> Prepared:
    advantage = alol_advantage(step["reward"], step["value"], squash=getattr(config, "squash", True))
    return {"weight": _equal_weights(step, group), "advantage": advantage}, {"kept_share": advantage > 0}


def rgold(step: Rows, config, group) -> Prepared:
    return {"weight": _equal_weights(step, group), "advantage": step["reward"].sigmoid()}, {}


def policy_gradient(step: Rows, config, group) -> Prepared:
    """Advantages by their name, and the weights of GRPO, DAPO, Dr. GRPO or REINFORCE."""
    advantage = advantages_by_name(config.advantages, step["reward"], step["group"], process_group=group)
    weight, metrics = _equal_weights(step, group), {}
    if config.advantages in WITHIN_PROMPT:
        prompts = group_rows(step["group"])
        metrics["tied_share"] = prompts.max(step["reward"]) == -prompts.max(-step["reward"])
    normalization = getattr(config, "length_normalization", "sum")  # a loss of means has none
    if normalization == "sequence":
        weight = weight / step["length"].clamp(min=1)
    elif normalization == "token":
        weight = _equal_weights(step, group, step["length"].sum())
    elif normalization == "constant":
        weight = weight / (config.max_new_tokens if config.online else config.max_length)
    return {"weight": weight, "advantage": advantage}, metrics
