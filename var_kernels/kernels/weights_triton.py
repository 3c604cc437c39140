"""VAR's weights over a batch in one Triton launch: sums over tokens, log-sum-exp, weights, effective sample size.

The batch is small, so what counts is the number of launches. One program in fp64 holds up to 4096 sequences, given by
their sums, or up to 32 sequences of 8192 tokens together.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import packed
from .rows_triton import LAUNCH_OPTIONS, ROW_COUNTS, on_device_of

MAX_SEQUENCES = 4096
# From tokens to tokens in the same launch.
TOKEN_SEQUENCES = 32
MAX_TOKENS = 1 << 13
TOKEN_TILE = 512  # tokens of a step, of all rows
NUM_WARPS = 8
LARGE_BATCH = 1024  # from here on
LARGE_BATCH_WARPS = 16
# A maximum that stands for "none yet": finite, so that differences are never NaN.
LOWEST = tl.constexpr(-1.7e308)


@triton.jit
def _segments(cu_seqlens_ptr, rows, inside, T):
    """Start and number of the rows' tokens: padded (B, T), or packed."""
    if cu_seqlens_ptr is not None:
        begin = tl.load(cu_seqlens_ptr + rows, mask=inside, other=0).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + rows + 1, mask=inside, other=0).to(tl.int64) - begin
    else:
        begin = rows * T
        length = tl.where(inside, T, 0).to(tl.int64)
    return begin, length


@triton.jit
def _token_sums(
    ref_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, T, ignore_index,
    TIME: tl.constexpr, TOKEN_REF: tl.constexpr,
):  # fmt: skip
    """Sums of each row: the reference's log-probs over the labels that count, and their number."""
    begin, length = _segments(cu_seqlens_ptr, rows, inside, T)
    total = tl.zeros(rows.shape, tl.float64)
    count = tl.zeros(rows.shape, tl.int64)
    for start in tl.range(0, tl.max(length, 0).to(tl.int32), TIME, num_stages=1):
        time = start + tl.arange(0, TIME)[None, :]
        token = begin[:, None] + time
        mask = time < length[:, None]
        counts = mask & (tl.load(labels_ptr + token, mask=mask, other=0).to(tl.int64) != ignore_index)
        count += tl.sum(counts.to(tl.int64), 1)
        if TOKEN_REF:
            # Ignored positions may hold anything, NaN too: they are not even read.
            total += tl.sum(tl.load(ref_ptr + token, mask=counts, other=0.0).to(tl.float64), 1)
    return total, count


@triton.jit
def _spread(
    token_weight_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, weight, T, ignore_index,
    TIME: tl.constexpr,
):  # fmt: skip
    """Each row's weight at its tokens, 0 at those that are ignored."""
    begin, length = _segments(cu_seqlens_ptr, rows, inside, T)
    for start in tl.range(0, tl.max(length, 0).to(tl.int32), TIME, num_stages=1):
        time = start + tl.arange(0, TIME)[None, :]
        token = begin[:, None] + time
        mask = time < length[:, None]
        counts = tl.load(labels_ptr + token, mask=mask, other=0).to(tl.int64) != ignore_index
        tl.store(token_weight_ptr + token, tl.where(counts, weight[:, None], 0.0), mask=mask)


@triton.jit(do_not_specialize=["inverse_lam_bits", "ignore_index", *ROW_COUNTS])
def _batch_weights_kernel(
    rewards_ptr,  # (B,)
    ref_ptr,  # (B,), or one per token
    lengths_ptr,  # (B,) integers
    labels_ptr,  # (B, T), or (N,) packed
    cu_seqlens_ptr,  # (B + 1,)
    weight_ptr,  # (B,)
    log_z_ptr,  # (1,)
    ess_ptr,  # (1,)
    token_weight_ptr,  # the shape of labels
    B,
    T,
    inverse_lam_bits,
    ignore_index,
    MEAN: tl.constexpr,
    REFERENCE: tl.constexpr,  # "none", "sum", "mean"
    TOKEN_REF: tl.constexpr,
    ROWS: tl.constexpr,
    TIME: tl.constexpr,
):
    rows = tl.arange(0, ROWS).to(tl.int64)
    inside = rows < B
    ref = tl.zeros((ROWS,), tl.float64)
    length = tl.full((ROWS,), 1, tl.int64)
    if labels_ptr is not None:
        ref, length = _token_sums(ref_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, T, ignore_index, TIME, TOKEN_REF)
    if REFERENCE != "none" and not TOKEN_REF:
        ref = tl.load(ref_ptr + rows, mask=inside, other=0.0).to(tl.float64)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + rows, mask=inside, other=0).to(tl.int64)

    # Few divisions: one in fp64 is a subroutine, whose calls make the compiler spill.
    reward = tl.load(rewards_ptr + rows, mask=inside, other=0.0)
    score = reward.to(tl.float64) * inverse_lam_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if REFERENCE == "sum":
        score += ref
    elif REFERENCE == "mean":
        score += ref * (1.0 / tl.maximum(length, 1).to(tl.float64))
    # Rows of length 0 are left out of everything.
    score = tl.where(inside & (length > 0), score, float("-inf"))
    top = tl.maximum(tl.max(score, 0), LOWEST)
    kept = tl.sum((score > float("-inf")).to(tl.int32), 0)
    # The largest is exactly 1, unless nothing is kept: no square underflows.
    share = tl.exp(score - top)
    total = tl.sum(share, 0)
    tl.store(ess_ptr, total * total / tl.maximum(tl.sum(share * share, 0), 1.0))
    if MEAN:
        total = total / tl.maximum(kept, 1).to(tl.float64)
    tl.store(log_z_ptr, top + tl.log(total))
    weight = share * (1.0 / tl.where(total == 0.0, 1.0, total))
    tl.store(weight_ptr + rows, weight, mask=inside)
    if labels_ptr is not None:
        _spread(token_weight_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, weight, T, ignore_index, TIME)


def var_weights(
    rewards: Tensor,
    ref_logp: Tensor | None,
    *,
    lam: float,
    mean: bool,
    reference: str,
    lengths: Tensor | None = None,
    labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """weight (B,), log Z () and ess () and, given labels, the weights over the tokens: all in ``dtype``.

    mean: Z is the mean of exp(a) over the batch, and not the sum. ref_logp: (B,) sums, or one per token in the shape of
    labels; unused for reference "none". labels: (B, T), or (N,) with cu_seqlens, of at most TOKEN_SEQUENCES rows and
    MAX_TOKENS; they give the lengths where ``lengths`` is None. Rows of length 0 have weight 0 and no part in Z. B is
    at most MAX_SEQUENCES.
    """
    num_rows, device, tokens = rewards.shape[0], rewards.device, labels is not None
    block = max(16, triton.next_power_of_2(num_rows))
    weight_B, log_z, ess = (torch.empty(size, dtype=dtype, device=device) for size in (num_rows, 1, 1))
    token_weight = None
    if tokens:
        # Rows behind the last packed sequence belong to none: they stay 0.
        token_weight = (torch.empty if cu_seqlens is None else torch.zeros)(labels.shape, dtype=dtype, device=device)
    ref_logp = None if reference == "none" else ref_logp
    with on_device_of(rewards):
        _batch_weights_kernel[(1,)](
            *map(packed, (rewards, ref_logp, lengths, labels, cu_seqlens)), weight_B, log_z, ess, token_weight,
            B=num_rows,
            T=labels.shape[1] if tokens and cu_seqlens is None else 0,
            inverse_lam_bits=struct.unpack("q", struct.pack("d", 1.0 / lam))[0],  # a scalar argument would be fp32
            ignore_index=int(ignore_index),
            MEAN=mean,
            REFERENCE=reference,
            TOKEN_REF=tokens and ref_logp is not None and ref_logp.shape == labels.shape,
            ROWS=block,
            TIME=max(1, TOKEN_TILE // block),
            num_warps=LARGE_BATCH_WARPS if block >= LARGE_BATCH else NUM_WARPS,
            **LAUNCH_OPTIONS,
        )  # fmt: skip
    return weight_B, log_z.squeeze(0), ess.squeeze(0), token_weight
