"""Sums and maxima over the rows that share an id: O(B) memory, the same bits in every run, no host sync."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Groups:
    """The rows of each group, groups in the order of their ids; those beyond the last one are empty."""

    order: Tensor  # (B,) int64: the rows, group by group
    offsets: Tensor  # (B + 1,) int64: where each group begins in ``order``
    index: Tensor  # (B,) int64: the number of each row's group

    def sum(self, values_B: Tensor) -> Tensor:
        """(B,): the sum over each row's group, formed in fp64; differentiable."""
        return _GroupSum.apply(values_B, self.order, self.offsets, self.index)

    def max(self, values_B: Tensor) -> Tensor:
        """(B,): the largest value of each row's group; detached."""
        return _reduce(values_B.detach(), "max", -torch.inf, self.order, self.offsets, self.index)

    def count(self) -> Tensor:
        """() int64: the number of groups."""
        return (self.offsets.diff() > 0).sum()


def group_rows(group_ids_B: Tensor) -> Groups:
    """Rows with equal ids, of any values, are one group."""
    ids_B, order_B = group_ids_B.sort(stable=True)
    sorted_index_B = torch.zeros_like(order_B)
    sorted_index_B[1:] = (ids_B[1:] != ids_B[:-1]).cumsum(0)
    numbers = torch.arange(len(order_B) + 1, device=order_B.device)
    index_B = torch.empty_like(order_B).scatter(0, order_B, sorted_index_B)  # a permutation: each entry once
    return Groups(order_B, torch.searchsorted(sorted_index_B, numbers), index_B)


class _GroupSum(torch.autograd.Function):
    """A symmetric map of the rows, so its own derivative. No scatter: on CUDA their sums differ from run to run."""

    @staticmethod
    def forward(ctx: Any, values_B: Tensor, order_B: Tensor, offsets: Tensor, index_B: Tensor) -> Tensor:
        ctx.save_for_backward(order_B, offsets, index_B)
        return _reduce(values_B.double(), "sum", 0.0, order_B, offsets, index_B).to(values_B.dtype)

    @staticmethod
    def backward(ctx: Any, dsum_B: Tensor) -> tuple[Tensor, None, None, None]:
        return _GroupSum.apply(dsum_B, *ctx.saved_tensors), None, None, None


def _reduce(values_B: Tensor, how: str, of_none: float, order_B: Tensor, offsets: Tensor, index_B: Tensor) -> Tensor:
    of_group = torch.segment_reduce(values_B[order_B], how, offsets=offsets, initial=of_none, unsafe=True)
    return of_group[index_B]
