"""Rows of data as items of each kind of loss, and items padded into batches."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.data import (
    DataError,
    EncodedRows,
    Example,
    Problem,
    encode_examples,
    merge_prompts,
    parse_row,
)
from var_kernels.integrations.data.encode import rewards_of
from var_kernels.integrations.data.forms import RewardNeed
from var_kernels.integrations.trainer.ranks import check_same_rows, together
from var_kernels.integrations.trainer.rewards import apply_reward_function
from var_kernels.losses.advantages import WITHIN_PROMPT
from var_kernels.losses.weights import PER_PROMPT

logger = logging.getLogger(__name__)
_NAMED = 3


class Items(torch.utils.data.Dataset):
    """The items of batches: each is one or more rows that stay in one micro-batch (a completion, a pair, or a prompt's
    completions)."""

    def __init__(self, rows: EncodedRows, items: list[list[int]]):
        self.rows = rows
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> list[dict]:
        return [{**self.rows.row(row), "row": torch.tensor(row)} for row in self.items[index]]


def tables_of(data: Sequence) -> list[EncodedRows]:
    """The tables of the training set and of the evaluation sets: Items, several by name, or None."""
    named = [entry.values() if isinstance(entry, dict) else [entry] for entry in data]
    return [items.rows for entries in named for items in entries if items is not None]


@dataclass
class RowCollator:
    """Flattens items to rows and pads them on the right: input_ids, attention_mask, labels and log-probs of tokens
    (B, T); everything else (B,), the number of the row's item in the batch among it."""

    pad_token_id: int

    def __call__(self, items: Sequence[list[dict]]) -> dict[str, Tensor]:
        rows = [row for item in items for row in item]
        batch = {
            "input_ids": _pad([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": _pad([torch.ones_like(row["input_ids"]) for row in rows], 0),
            "labels": _pad([row["labels"] for row in rows], IGNORE_INDEX),
        }
        for key in rows[0]:
            if key not in batch:
                values = [row[key] for row in rows]
                batch[key] = torch.stack(values) if values[0].dim() == 0 else _pad(values, 0)
        batch["item"] = torch.tensor([number for number, item in enumerate(items) for _ in item])
        return batch


def first_items(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The batch without what follows its first ``count`` items.

    With none left one item stays, so that this rank takes part in its step: without labels, and with ``stand_in``,
    which keeps it out of everything that is computed from the step's rows.
    """
    kept = batch["item"] < max(count, 1)
    batch = {key: values[kept] for key, values in batch.items()}
    if count < 1:
        for key in ("ref_logp", "ref_token_logp"):
            if key in batch:
                batch[key] = torch.zeros_like(batch[key])
        batch |= {"labels": torch.full_like(batch["labels"], IGNORE_INDEX), "stand_in": kept[kept]}
    return batch


def model_inputs(rows: EncodedRows, numbers: Sequence[int], pad_token_id: int, device: Any) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, T) of the rows of these numbers."""
    batch = RowCollator(pad_token_id)([[rows.row(number)] for number in numbers])
    return {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "labels")}


def _pad(sequences: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)  # B x (T_i,) -> (B, T)


# ---- from data to items ----------------------------------------------------------------------------------------------


def parsed_examples(rows, name: str, need_rewards: RewardNeed) -> list[Example]:
    table = type(rows).__module__.partition(".")[0] in ("pandas", "polars", "pyarrow")
    if table or isinstance(rows, Mapping) or not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
        keys = f" of {', '.join(map(str, rows))}" if isinstance(rows, Mapping) else ""
        raise TypeError(
            f"{name} must be rows, a list of dicts or a datasets.Dataset, got a {type(rows).__name__}{keys:.80}; pass "
            "one split of a DatasetDict, Dataset.from_dict(...) or Dataset.from_pandas(...)"
        )
    if not hasattr(rows, "__iter__") and hasattr(rows, "__len__"):  # torch's map-style set: a loop may find no end
        rows = [rows[i] for i in range(len(rows))]
    if isinstance(rows, Sequence) and rows and isinstance(rows[0], Example):
        parsed = list(rows)
        if need_rewards not in ("optional", "prompt"):
            lacking = [ex for ex in parsed if ex.rewards is None and not (need_rewards == "unless_pair" and ex.is_pair)]
            parsed += [
                Problem(
                    ex.where[0],
                    "rewards must be in the data, since this method needs rewards, got none; add them, or pass a "
                    "reward function"
                    + ("; pairs without rewards are for method 'dpo' and its kin" if ex.is_pair else ""),
                )
                for ex in lacking
            ]
    else:
        parsed = [parse_row(row, f"{name} row {i + 1}", need_rewards) for i, row in enumerate(rows)]
    problems = [item for item in parsed if isinstance(item, Problem)]
    if problems:
        raise DataError(problems, remedy="mend or leave out these rows")
    if not parsed:
        raise DataError([Problem(name, "must hold at least one row, got none")], remedy="pass rows")
    return parsed


def read_items(
    rows, name: str, args, method, tokenizer, reward_function, end_token_ids: Sequence[int], train: EncodedRows | None
) -> Items:
    """Rows of data, or what ``load_examples`` returned, as the method's items: checked, scored by the reward function
    if there is one, tokenised, with the columns that the method makes of ``train`` (None: of these rows).

    Raises:
        DataError, ValueError: rows that the method, the tokenizer or the reward function cannot use.
    """

    def read():
        examples = parsed_examples(rows, name, "optional" if reward_function is not None else method.need_rewards)
        if reward_function is not None:
            examples = [replace(example, rewards=None) for example in examples]
        examples = merge_prompts(examples)
        return examples, encode_examples(examples, tokenizer, args.max_length, end_token_ids)

    examples, table = together(read)
    check_same_rows(table.fingerprint(table.group, table.reward), name)
    if reward_function is not None:
        scored = apply_reward_function(reward_function, examples, args, table.completion_ids, shared=True)
        table.reward = rewards_of(scored)
    items = Items(table, method.items(table, args))
    if method.columns is not None:
        table.columns |= method.columns(table, args, table if train is None else train)
    return items


# ---- items: lists of row numbers that stay in one micro-batch -------------------------------------------------------


def places(rows, groups: list[list[int]]) -> str:
    """The places in the data of the first of these prompts."""
    found = [rows.where[group[0]] for group in groups[:_NAMED]]
    return ", ".join(found) + (", ..." if len(groups) > _NAMED else "")


def _warn_left_out(rows, groups: list[list[int]], which: str) -> None:
    if groups:
        text = "%d of %d %s and are left out: %s"
        logger.warning(text, len(groups), len(rows.groups), which, places(rows, groups))


_EQUAL = "pairs hold the same tokens twice, at most max_length = {} of them,"


def single_rows(rows, config) -> list[list[int]]:
    return [[row] for row in range(len(rows))]


def whole_prompts(rows, config) -> list[list[int]]:
    """A prompt with all its completions. Prompts of one completion have nothing to be compared with."""
    items = [group for group in rows.groups if len(group) > 1]
    lonely = [group for group in rows.groups if len(group) == 1]
    if not items:
        raise ValueError(
            f"method {config.method!r} compares the completions of a prompt: no prompt has two ({places(rows, lonely)}"
            "); the data need rows of prompt + completions + rewards"
            + (", or take advantages='batch' or 'given'" if hasattr(config, "advantages") else "")
        )
    _warn_left_out(rows, lonely, "prompts have a single completion, which cannot be compared,")
    return items


def advantage_items(rows, config) -> list[list[int]]:
    """Whole prompts where an advantage compares the completions of one, else single rows."""
    return whole_prompts(rows, config) if config.advantages in WITHIN_PROMPT else single_rows(rows, config)


def var_items(rows, config) -> list[list[int]]:
    return rows.groups if config.normalizer in PER_PROMPT else single_rows(rows, config)


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
            pair = group
        else:
            reward = rows.reward[group]
            pair = [group[int(reward.argmax())], group[int(reward.argmin())]]
            if not reward.max() > reward.min():
                ties.append(group)
                continue
        (equal if equal_pair(rows, pair, config) else items).append(pair)
    if not items:
        raise ValueError(
            f"method {config.method!r} needs pairs: no prompt has two completions with different rewards "
            f"({places(rows, ties + equal)}); the data need rows of prompt + chosen + rejected, or of prompt + "
            "completions + rewards, that still differ within max_length"
        )
    _warn_left_out(rows, equal, _EQUAL.format(config.max_length))
    _warn_left_out(rows, ties, "prompts have no two completions with different rewards, make no pair")
    return items


def judged_rows(rows, config) -> list[list[int]]:
    """Single rows for KTO; each must be known to be desirable or not."""
    if rows.reward is None and not all(rows.is_pair):
        raise ValueError(
            f"method {config.method!r} must have rewards or pairs, got neither; they say which are desirable"
        )
    entries = zip(rows.groups, rows.is_pair, strict=True)
    equal = [group for group, is_pair in entries if is_pair and equal_pair(rows, group, config)]
    _warn_left_out(rows, equal, _EQUAL.format(config.max_length))
    left_out = {row for group in equal for row in group}
    items = [item for item in single_rows(rows, config) if item[0] not in left_out]
    if not items:
        raise ValueError(
            f"method {config.method!r} needs pairs whose halves differ within max_length = {config.max_length}, got "
            f"none ({places(rows, equal)}); raise max_length"
        )
    return items


def equal_pair(rows, pair: list[int], config) -> bool:
    """True where both halves hold the same tokens, so that a comparison says nothing. Draws of the policy are kept:
    equal ones are part of their distribution."""
    if config.online:
        return False
    ids = [rows.token_ids[rows.offset[row] : rows.offset[row + 1]] for row in pair]
    return torch.equal(*ids)
