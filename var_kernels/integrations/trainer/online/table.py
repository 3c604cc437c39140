"""Drawn completions as rows of training data, and a training set of fixed length that is filled anew."""

import torch

from var_kernels.integrations.data import EncodedRows
from var_kernels.integrations.trainer.collator import Items
from var_kernels.integrations.trainer.online.buffer import Drawn

LABELS_BY = ("draw", "higher")


class FixedLengthItems(Items):
    """As many items as an iteration's steps take, whatever number was drawn: all of them in a new order, again and
    again. Trainer counts its steps before anything is drawn."""

    def __init__(self, length: int):
        super().__init__(None, [])
        self.length = length

    def __len__(self) -> int:
        return self.length

    def fill(self, rows: EncodedRows, items: list[list[int]], generator: torch.Generator) -> None:
        places: list[int] = []
        while len(places) < self.length:
            places += torch.randperm(len(items), generator=generator).tolist()
        self.rows, self.items = rows, [items[place] for place in places[: self.length]]


def encode_drawn(drawn: list[Drawn], *, pairs: bool) -> EncodedRows:
    """The token ids as they were drawn: a text may be tokenised otherwise. pairs: two completions are (chosen,
    rejected)."""
    rows, groups = [], []
    for entry in drawn:
        groups.append(list(range(len(rows), len(rows) + len(entry.completion_ids))))
        rows += [(entry.prompt_ids, ids) for ids in entry.completion_ids]
    rewards = None
    if drawn[0].rewards is not None:
        rewards = torch.tensor([reward for entry in drawn for reward in entry.rewards], dtype=torch.float32)
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    return EncodedRows(
        token_ids=torch.tensor([token for row in rows for ids in row for token in ids], dtype=torch.int32),
        offset=torch.tensor([0, *lengths]).cumsum(0),
        prompt_length=torch.tensor([len(prompt) for prompt, _ in rows]),
        reward=rewards,
        group=torch.tensor([number for number, members in enumerate(groups) for _ in members]),
        groups=groups,
        is_pair=[pairs] * len(groups),
        where=[f"{entry.where}, sample {number + 1}" for entry in drawn for number in range(len(entry.completions))],
    )


def label_pairs(rows: EncodedRows, label_by: str, generator: torch.Generator) -> None:
    """Chosen first in every pair of ``rows.groups``: the label drawn from sigmoid(r_1 - r_2), or the higher reward
    (a tie is drawn)."""
    first, second = (rows.reward[[group[place] for group in rows.groups]].double() for place in (0, 1))
    chance = (first - second).sigmoid()
    if label_by == "higher":
        chance = torch.where(first == second, chance, (first > second).double())
    chosen = torch.rand(chance.shape, generator=generator, dtype=chance.dtype) < chance
    rows.groups = [group if keep else group[::-1] for group, keep in zip(rows.groups, chosen.tolist(), strict=True)]
