"""Items of the training set and their padding into batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from var_kernels.integrations.data import EncodedRows


class Items(torch.utils.data.Dataset):
    """What a batch is made of: each item is one or more rows that must stay in one micro-batch (a completion, a
    prompt's completions, or a pair)."""

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
            "labels": _pad([row["labels"] for row in rows], -100),
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
        batch |= {"labels": torch.full_like(batch["labels"], -100), "stand_in": kept[kept]}
    return batch


def _pad(sequences: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)  # B x (T_i,) -> (B, T)
