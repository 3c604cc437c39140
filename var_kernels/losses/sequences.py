"""From tokens to sequences: per-token values summed, padded (B, T) or packed (N,) with cu_seqlens (B + 1,)."""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from var_kernels.ops.checks import check_are_tensors, values_readable


def sequence_sum(
    token_values: Tensor,
    labels: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sum of per-token values over each sequence, differentiable in the values.

        s_i = sum over the tokens t of sequence i that carry loss of token_values[t]

    Use it to make ``s`` and ``sr`` (sums of ``linear_logprob``) for ``var_weights``, ``dpo_loss`` and the others.

    Args:
        token_values: (B, T) padded, or (N,) with ``cu_seqlens``; floating point. Ignored positions may hold anything,
            NaN too, once ``labels`` says which they are.
        labels: the values' shape, int64; positions equal to ``ignore_index`` are left out. None: every position counts.
        cu_seqlens: (B + 1,) int32 or int64, from 0 to N: sequence i is the rows cu_seqlens[i]:cu_seqlens[i + 1].
        ignore_index: the label that carries no loss.
        process_group: the ranks that hold the tokens of these B sequences between them (context or sequence
            parallelism, in any order); the sums go over all of them. Every rank makes the call, and the same loss of
            the sums: its gradient reaches the own tokens as it is, so gradients of weights are to be summed over the
            group (times the group's size where a layout takes their mean).

    Returns:
        (B,), fp32 (fp64 for fp64 values); 0 for a sequence without a kept token. Nats where the values are log-probs.

    Raises:
        ValueError: shapes that do not belong together; on the CPU also a ``cu_seqlens`` that does not run from 0 to N
            (CUDA values are not read, which would stall the device).
    """
    check_are_tensors(token_values=token_values, **({} if labels is None else {"labels": labels}))
    if cu_seqlens is None and token_values.dim() != 2:
        raise ValueError(
            f"token_values must be padded (B, T), got {tuple(token_values.shape)}; for packed rows pass cu_seqlens"
        )
    if labels is not None:
        if labels.shape != token_values.shape:
            raise ValueError(
                f"labels must have the shape of token_values, {tuple(token_values.shape)}, got {tuple(labels.shape)}; "
                "align them (one label per row of hidden, already shifted)"
            )
        token_values = token_values.where(labels != ignore_index, 0.0)
    # hundreds of nats in a sum: fp64 keeps a long sequence's rounding out of the weights
    values = token_values.double()
    if cu_seqlens is None:
        total_B = values.sum(-1)
    else:
        values_N = values.reshape(-1)
        check_cu_seqlens(cu_seqlens, values_N.shape[0])
        total_B = torch.segment_reduce(values_N, "sum", offsets=cu_seqlens.long(), initial=0.0, unsafe=True)
    if process_group is not None:
        total_B = _SumOverRanks.apply(total_B, process_group)
    return total_B if token_values.dtype == torch.float64 else total_B.float()


class _SumOverRanks(torch.autograd.Function):
    """All-reduce of (B,). Every rank computes the same loss of the sums, so its gradient is each summand's already."""

    @staticmethod
    def forward(ctx: Any, part_B: Tensor, group: dist.ProcessGroup) -> Tensor:
        total_B = part_B.clone()
        dist.all_reduce(total_B, group=group)
        return total_B

    @staticmethod
    def backward(ctx: Any, dtotal_B: Tensor) -> tuple[Tensor, None]:
        return dtotal_B, None


def sequence_lengths(
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Number of tokens that carry loss in each sequence: labels (B, T), or (N,) with ``cu_seqlens`` -> (B,) int64.

    process_group: as in ``sequence_sum``.
    """
    check_are_tensors(labels=labels)
    kept = (labels != ignore_index).to(torch.float64)
    return sequence_sum(kept, cu_seqlens=cu_seqlens, process_group=process_group).long()


def expand_to_tokens(per_sequence_B: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """A value per sequence, (B,), repeated at each of its tokens: the shape of ``labels``."""
    if cu_seqlens is None:
        return per_sequence_B.unsqueeze(-1).expand(labels.shape)  # (B,) -> (B, T), no copy
    num_rows = labels.numel()
    per_row_N = torch.repeat_interleave(per_sequence_B, cu_seqlens.long().diff(), output_size=num_rows)  # (B,) -> (N,)
    return per_row_N.reshape(labels.shape)


def check_layout(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> int:
    """Refuse shapes that do not belong together; returns the number of sequences B."""
    check_are_tensors(hidden=hidden, labels=labels)
    if cu_seqlens is None and labels.dim() != 2:
        raise ValueError(
            f"labels must be padded (B, T), got {tuple(labels.shape)}; for packed rows (N,) pass cu_seqlens"
        )
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must be {tuple(hidden.shape[:-1])}, one label per row of hidden {tuple(hidden.shape)}, got "
            f"{tuple(labels.shape)}; align them: hidden[:, :-1] with labels[:, 1:]"
        )
    if cu_seqlens is None:
        return labels.shape[0]
    check_cu_seqlens(cu_seqlens, labels.numel())
    return cu_seqlens.numel() - 1


def check_cu_seqlens(cu_seqlens: Tensor, num_rows: int) -> None:
    """Refuse a cu_seqlens of the wrong form; its values are read on the CPU only."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor (B + 1,), got {type(cu_seqlens).__name__}; use torch.tensor(...)")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"cu_seqlens must be (B + 1,) int32 or int64, got shape {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; "
            "build it as torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
        )
    if not values_readable(cu_seqlens):
        return
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != num_rows or any(b < a for a, b in pairwise(starts)):
        raise ValueError(
            f"cu_seqlens must increase from 0 to the number of rows, {num_rows}, got {starts[:4]}...{starts[-1:]}; "
            "build it as torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), and drop the rows behind its end"
        )
