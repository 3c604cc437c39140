"""Rewards that can move no loss, found before the first step: single completions, equal rewards, a lam beyond them."""

import logging

import torch

from var_kernels.integrations.trainer.collator import advantage_items, places, whole_prompts
from var_kernels.losses.advantages import WITHIN_PROMPT
from var_kernels.losses.segments import group_rows
from var_kernels.losses.weights import MIN_REWARD_SPREAD, PER_PROMPT

logger = logging.getLogger(__name__)


def z_over_batch(rows, config, train) -> dict[str, torch.Tensor]:
    """VAR's self_normalised where no prompt of the training set has two completions: Z is over the batch, as
    ``var_weights`` has it without group_ids, and not over each completion by itself, where every weight is 1."""
    if config.normalizer != "self_normalised" or any(len(group) > 1 for group in train.groups):
        return {}
    if rows is train and not config.online:
        logger.warning(
            "none of %d prompts has two completions: in a prompt by itself every weight would be 1 and rewards would "
            "have no effect, so Z is taken over the batch, as by normalizer='batch_mean', which compares rewards of "
            "different prompts", len(rows.groups),
        )  # fmt: skip
    return {"group": torch.zeros(len(rows), dtype=torch.int64)}


def compared_with(method, config) -> str:
    """The scope of a reward's comparison: the completions of its "prompt", of the "step", of the "data", or "" none."""
    if method.loss.name == "var" and config.normalizer in PER_PROMPT:
        return "prompt"
    if advantages := getattr(config, "advantages", ""):
        return "prompt" if advantages in WITHIN_PROMPT else "step" if advantages == "batch" else ""
    return "prompt" if getattr(config, "sft_on", "") == "best" else method.loss.compares


def check_rewards(rows, config, method, name: str, *, refuse: bool = True) -> None:
    """Refuse rewards without effect (``refuse=False``: warn of them); warn where that is so for part of the prompts.

    Raises:
        ValueError: rewards without effect, with what to use instead.
    """
    problem = _without_effect(rows, config, method, name, partly=refuse)
    if problem and refuse and not hasattr(config, "sft_on"):  # SFT on data that have rewards is SFT all the same
        raise ValueError(f"{name}: rewards would have no effect: {problem}")
    if problem:
        logger.warning("%s: rewards have no effect: %s", name, problem)


def _without_effect(rows, config, method, name: str, *, partly: bool) -> str:
    scope, reward = compared_with(method, config), rows.reward
    reads = {"reward", "advantage"} & set(method.loss.inputs) or method.need_rewards == "required"
    if "desirable" in rows.columns and rows.columns["desirable"].unique().numel() == 1:
        kind = "desirable" if rows.columns["desirable"][0] else "undesirable"
        logger.warning("%s: every completion is %s (desirable_above=%g)", name, kind, config.desirable_above)
    if reward is None or reward.isnan().any() or not (reads or scope):
        return ""
    who = f"method {config.method!r}"
    if config.method == "var":
        who += f" with normalizer={config.normalizer!r}"
    if scope == "prompt" and "group" not in rows.columns:
        return _within_prompts(rows, config, method, who, name, partly)
    if len(reward) == 1:
        return f"there is one completion, and {who} compares several; give more, or take method 'sft'" if scope else ""
    if not _spread(reward):
        equal = f"all {len(reward)} are {float(reward[0]):g}"
        if scope:
            return f"{equal}, and {who} compares them; give rewards that tell completions apart, or take method 'sft'"
        multiplies = getattr(config, "advantages", "") == "given" or not getattr(config, "squash", True)
        if float(reward[0]) == 0 and multiplies:
            return f"{equal}, by which {who} multiplies: nothing would be learnt; give rewards that differ from 0"
        logger.warning("%s: rewards tell no completion from another: %s", name, equal)
    elif getattr(config, "squash", method.loss.name == "rgold") and _spread(reward.sigmoid()) < MIN_REWARD_SPREAD:
        logger.warning(
            "%s: rewards have hardly an effect: %s reads their sigmoid, which differs by %.2g at most from %g to %g; "
            "scale them to about -2 to 2%s", name, who, _spread(reward.sigmoid()), float(reward.min()),
            float(reward.max()), ", or pass squash=False for rewards in [0, 1]" if hasattr(config, "squash") else "",
        )  # fmt: skip
    if "step" in (scope, method.loss.compares) and config.items_per_step == 1:
        return (
            f"every step has one completion, and {who} compares those of a step; raise per_device_train_batch_size or "
            "gradient_accumulation_steps"
        )
    _check_scale(_spread(reward), "a step", rows, config, name)
    return ""


def _within_prompts(rows, config, method, who: str, name: str, partly: bool) -> str:
    groups = rows.groups
    if hasattr(config, "sft_on"):  # a pair is ordered without rewards
        groups = [group for group, is_pair in zip(groups, rows.is_pair, strict=True) if not is_pair]
    leaves_out = method.items in (whole_prompts, advantage_items)  # single completions, and says so
    if leaves_out:
        groups = [group for group in groups if len(group) > 1]
    prompts = group_rows(rows.group)
    spread = (prompts.max(rows.reward) + prompts.max(-rows.reward)).tolist()  # of each row's prompt
    alone = [group for group in groups if len(group) == 1]
    tied = [group for group in groups if len(group) > 1 and not spread[group[0]]]
    counts = []
    if alone:
        counts.append(f"{len(alone)} of {len(rows.groups)} prompts have a single completion")
    if tied:
        counts.append(f"{len(tied)} of {len(rows.groups)} prompts have completions of equal rewards")
    found = " and ".join(counts)
    complete = len(groups) == len(rows.groups) or leaves_out
    if found and complete and len(alone) + len(tied) == len(groups):
        other = "" if config.method == "var" else "method 'var' with "
        return (
            f"{found}, and {who} compares the completions of a prompt; give several with different rewards, or take "
            f"{other}normalizer='batch', which compares those of a step"
        )
    if found and partly:
        text = "%s: %s, on which rewards have no effect (%s compares the completions of a prompt): %s"
        logger.warning(text, name, found, who, places(rows, [*alone, *tied]))
    _check_scale(max((spread[group[0]] for group in groups), default=0.0), "a prompt", rows, config, name)
    return ""


# Of the methods that weigh by exp(reward / scale): the setting that is the scale.
_SCALES = {"var": "lam", "awr": "beta", **dict.fromkeys(("exo", "info_nca", "nca"), "reward_temperature")}


def _check_scale(spread: float, where: str, rows, config, name: str) -> None:
    if config.method not in _SCALES:
        return
    setting = _SCALES[config.method]
    scale = getattr(config, setting)
    if config.method == "awr":  # of rewards that are standardised
        spread /= max(float(rows.reward.double().std(correction=0)), 1e-30)
    if spread < MIN_REWARD_SPREAD * scale:
        logger.warning(
            "%s: %s=%g leaves rewards without effect: within %s they differ by %.3g at most, and weights by less than "
            "a thousandth; at half that spread the better one counts seven times as much",
            name, setting, scale, where, spread,
        )  # fmt: skip


def _spread(reward: torch.Tensor) -> float:
    return float(reward.max() - reward.min())
