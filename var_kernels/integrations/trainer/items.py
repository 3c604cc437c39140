"""What an item of a batch is, for each kind of loss: lists of row numbers that must stay in one micro-batch."""

import logging

import torch

from var_kernels.losses.advantages import WITHIN_PROMPT

logger = logging.getLogger(__name__)
_NAMED = 3


def _places(rows, groups: list[list[int]]) -> str:
    """Where the first of these prompts were read from."""
    places = [rows.where[group[0]] for group in groups[:_NAMED]]
    return ", ".join(places) + (", ..." if len(groups) > _NAMED else "")


def single_rows(rows, config) -> list[list[int]]:
    return [[row] for row in range(len(rows))]


def whole_prompts(rows, config) -> list[list[int]]:
    """A prompt with all its completions. Prompts of one completion have nothing to be compared with."""
    items = [group for group in rows.groups if len(group) > 1]
    lonely = [group for group in rows.groups if len(group) == 1]
    if not items:
        raise ValueError(
            f"method {config.method!r} compares the completions of a prompt: no prompt has two ({_places(rows, lonely)}"
            "); the data need rows of prompt + completions + rewards"
            + (", or take advantages='batch' or 'given'" if hasattr(config, "advantages") else "")
        )
    if lonely:
        logger.warning(
            "%d of %d prompts have a single completion, which cannot be compared, and are left out: %s",
            len(lonely), len(rows.groups), _places(rows, lonely),
        )  # fmt: skip
    return items


def advantage_items(rows, config) -> list[list[int]]:
    """Whole prompts where an advantage compares the completions of one, else single rows."""
    return whole_prompts(rows, config) if config.advantages in WITHIN_PROMPT else single_rows(rows, config)


def var_items(rows, config) -> list[list[int]]:
    per_prompt = config.normalizer in ("group", "self_normalised")
    return rows.groups if per_prompt else single_rows(rows, config)


def sft_items(rows, config) -> list[list[int]]:
    if config.sft_on == "all":
        return single_rows(rows, config)
    items = []
    for group, is_pair in zip(rows.groups, rows.is_pair, strict=True):
        if is_pair:
            items.append(group[:1])
        elif rows.reward is None or rows.reward[group].isnan().any():
            items += [[row] for row in group]
        else:
            items.append([group[int(rows.reward[group].argmax())]])
    return items


def pairs(rows, config) -> list[list[int]]:
    """[chosen, rejected]: those of a pair, otherwise the best and the worst of a prompt, if their rewards differ."""
    items, ties, equal = [], [], []
    for group, is_pair in zip(rows.groups, rows.is_pair, strict=True):
        if is_pair:
            (equal if equal_pair(rows, group, config) else items).append(group)
            continue
        reward = rows.reward[group]
        best, worst = group[int(reward.argmax())], group[int(reward.argmin())]
        if rows.reward[best] > rows.reward[worst]:
            (equal if equal_pair(rows, [best, worst], config) else items).append([best, worst])
        else:
            ties.append(group)
    if not items:
        raise ValueError(
            f"method {config.method!r} needs pairs: no prompt has two completions with different rewards "
            f"({_places(rows, ties + equal)}); the data need rows of prompt + chosen + rejected, or of prompt + "
            "completions + rewards, that still differ within max_length"
        )
    _warn_of_equal(rows, equal, config)
    if ties:
        logger.warning(
            "%d of %d prompts have no two completions with different rewards, make no pair and are left out: %s",
            len(ties), len(rows.groups), _places(rows, ties),
        )  # fmt: skip
    return items


def judged_rows(rows, config) -> list[list[int]]:
    """Single rows for KTO; each must be known to be desirable or not."""
    if rows.reward is None and not all(rows.is_pair):
        raise ValueError(f"method {config.method!r} needs rewards or pairs: which completions are desirable?")
    entries = zip(rows.groups, rows.is_pair, strict=True)
    equal = [group for group, is_pair in entries if is_pair and equal_pair(rows, group, config)]
    _warn_of_equal(rows, equal, config)
    left_out = {row for group in equal for row in group}
    items = [item for item in single_rows(rows, config) if item[0] not in left_out]
    if not items:
        raise ValueError(
            f"method {config.method!r} needs pairs whose halves differ within max_length = {config.max_length}, got "
            f"none ({_places(rows, equal)}); raise max_length"
        )
    return items


def equal_pair(rows, pair: list[int], config) -> bool:
    """Whether both halves hold the same tokens, so that a comparison says nothing. Draws of the policy are kept: that
    both are equal is part of their distribution."""
    if config.online:
        return False
    ids = [rows.token_ids[rows.offset[row] : rows.offset[row + 1]] for row in pair]
    return torch.equal(*ids)


def _warn_of_equal(rows, equal: list[list[int]], config) -> None:
    if equal:
        logger.warning(
            "%d of %d pairs hold the same tokens twice, at most max_length = %d of them, and are left out: %s",
            len(equal), len(rows.groups), config.max_length, _places(rows, equal),
        )  # fmt: skip
