"""VAR's weights in one Triton launch: sums over tokens, log-sum-exp over the batch or each prompt, weights, ESS.

The batch is small, so what counts is the number of launches; fp64 throughout. One program does everything for up to 32
sequences and 8192 tokens, and, from sums and without groups, for up to 4096 sequences. Beyond that the sums over
tokens, the pairs of rows and the rest are launches of their own.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows_triton import LAUNCH_OPTIONS, on_device_of

MAX_SEQUENCES = 4096
# Rows of which one program holds all pairs, and all tokens.
SINGLE = 32
# Rows by rows of one step, where several programs share the pairs.
PAIR_ROWS = 32
PAIR_WARPS = 4
# Tokens of one step, in a program for one sequence and in one for all of them.
TOKEN_TILE = 2048
INLINE_TILE = 512
# How many one program may read before the sums get launches of their own.
INLINE_TOKENS = 1 << 13
NUM_WARPS = 8
LARGE_BATCH = 1024  # from here on
LARGE_BATCH_WARPS = 16
# A maximum that stands for "none yet": finite, so that differences are never NaN.
LOWEST = tl.constexpr(-1.7e308)


@triton.jit
def _segments(cu_seqlens_ptr, rows, inside, T, PACKED: tl.constexpr):
    """Where the rows' tokens begin, and how many there are: padded (B, T), or packed."""
    if PACKED:
        begin = tl.load(cu_seqlens_ptr + rows, mask=inside, other=0).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + rows + 1, mask=inside, other=0).to(tl.int64) - begin
    else:
        begin = rows * T
        length = tl.where(inside, T, 0).to(tl.int64)
    return begin, length


@triton.jit
def _token_sums(
    ref_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, T, ignore_index,
    TIME: tl.constexpr, PACKED: tl.constexpr, TOKEN_REF: tl.constexpr,
):  # fmt: skip
    """Of each row: the sum of the reference's log-probs over the labels that count, and their number."""
    begin, length = _segments(cu_seqlens_ptr, rows, inside, T, PACKED)
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
    TIME: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Each row's weight at its tokens, 0 at those that are ignored."""
    begin, length = _segments(cu_seqlens_ptr, rows, inside, T, PACKED)
    for start in tl.range(0, tl.max(length, 0).to(tl.int32), TIME, num_stages=1):
        time = start + tl.arange(0, TIME)[None, :]
        token = begin[:, None] + time
        mask = time < length[:, None]
        counts = tl.load(labels_ptr + token, mask=mask, other=0).to(tl.int64) != ignore_index
        tl.store(token_weight_ptr + token, tl.where(counts, weight[:, None], 0.0), mask=mask)


@triton.jit
def _load_rows(
    ref_ptr, lengths_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, T, ignore_index,
    TIME: tl.constexpr, REFERENCE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    TOKENS: tl.constexpr, TOKEN_REF: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The rows' reference term and length, read or summed over tokens."""
    ref = tl.zeros(rows.shape, tl.float64)
    length = tl.full(rows.shape, 1, tl.int64)
    if TOKENS:
        ref, length = _token_sums(
            ref_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, T, ignore_index, TIME, PACKED, TOKEN_REF
        )
    if REFERENCE != "none" and not TOKEN_REF:
        ref = tl.load(ref_ptr + rows, mask=inside, other=0.0).to(tl.float64)
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + rows, mask=inside, other=0).to(tl.int64)
    return ref, length


@triton.jit
def _score(reward, ref, length, inside, inverse_lam_bits, REFERENCE: tl.constexpr):
    """a = ref + r / lam; -inf outside and for rows of length 0, which are left out of everything."""
    # Few divisions: one in fp64 is a subroutine, whose calls make the compiler spill.
    score = reward.to(tl.float64) * inverse_lam_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if REFERENCE == "sum":
        score += ref
    elif REFERENCE == "mean":
        score += ref * (1.0 / tl.maximum(length, 1).to(tl.float64))
    return tl.where(inside & (length > 0), score, float("-inf"))


@triton.jit
def _share(score, top, total):
    """exp(score - top) / total, 0 for what is left out. NaN stays NaN."""
    return tl.where(score == float("-inf"), 0.0, tl.exp(score - top) * (1.0 / tl.where(total == 0.0, 1.0, total)))


@triton.jit
def _ess(weight):
    """(sum w)^2 / sum w^2 of weights >= 0; 0 where all are 0. Squares of small weights would underflow: scaled."""
    largest = tl.max(weight, 0)
    scaled = weight * (1.0 / tl.where(largest == 0.0, 1.0, largest))
    total = tl.sum(scaled, 0)
    return total * total / tl.maximum(tl.sum(scaled * scaled, 0), 1.0)


@triton.jit(do_not_specialize=["inverse_lam_bits", "ignore_index"])
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
    HAS_LENGTHS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKEN_REF: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    TIME: tl.constexpr,
):
    rows = tl.arange(0, ROWS).to(tl.int64)
    inside = rows < B
    ref, length = _load_rows(
        ref_ptr, lengths_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, T, ignore_index,
        TIME, REFERENCE, HAS_LENGTHS, TOKENS, TOKEN_REF, PACKED,
    )  # fmt: skip
    score = _score(
        tl.load(rewards_ptr + rows, mask=inside, other=0.0), ref, length, inside, inverse_lam_bits, REFERENCE
    )
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
    if TOKENS:
        _spread(token_weight_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, weight, T, ignore_index, TIME, PACKED)


@triton.jit(do_not_specialize=["inverse_lam_bits", "ignore_index"])
def _pair_weights_kernel(
    rewards_ptr,  # (B,), or (B, B)
    ref_ptr,  # (B,) or one per token; (B, B) for "cross"
    lengths_ptr,  # (B,) integers
    groups_ptr,  # (B,) integers
    labels_ptr,  # (B, T), or (N,) packed
    cu_seqlens_ptr,  # (B + 1,)
    weight_ptr,  # (B,)
    log_z_ptr,  # (B,)
    ess_ptr,  # (1,)
    token_weight_ptr,  # the shape of labels
    B,
    T,
    inverse_lam_bits,
    ignore_index,
    CROSS: tl.constexpr,
    MEAN: tl.constexpr,
    REFERENCE: tl.constexpr,  # "none", "sum", "mean"
    REWARD_PAIRS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKEN_REF: tl.constexpr,
    PACKED: tl.constexpr,
    ALONE: tl.constexpr,  # this program holds all rows
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    TIME: tl.constexpr,
):
    # (ROWS, 1) and (1, OTHERS) below: what Z of a row sums over is its group, or all responses under its prompt.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < B
    OWN_REFERENCE: tl.constexpr = "none" if CROSS else REFERENCE
    ref, length = _load_rows(
        ref_ptr, lengths_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, T, ignore_index,
        TIME, OWN_REFERENCE, HAS_LENGTHS, TOKENS, TOKEN_REF, PACKED,
    )  # fmt: skip
    if CROSS and REFERENCE != "none":
        ref = tl.load(ref_ptr + rows * (B + 1), mask=inside, other=0.0).to(tl.float64)
    own_reward = tl.load(rewards_ptr + (rows * (B + 1) if REWARD_PAIRS else rows), mask=inside, other=0.0)
    own = _score(own_reward, ref, length, inside, inverse_lam_bits, REFERENCE)
    if not CROSS:
        group = tl.load(groups_ptr + rows, mask=inside, other=0)

    top = tl.full((ROWS,), LOWEST, tl.float64)
    total = tl.zeros((ROWS,), tl.float64)
    kept = tl.zeros((ROWS,), tl.float64)
    for start in tl.range(0, B, OTHERS, num_stages=1):
        others = (start + tl.arange(0, OTHERS)).to(tl.int64)
        other_inside = others < B
        pair = inside[:, None] & other_inside[None, :]
        other_length = length
        if not ALONE:
            other_ref, other_length = _load_rows(
                ref_ptr, lengths_ptr, labels_ptr, cu_seqlens_ptr, others, other_inside, T, ignore_index,
                TIME, OWN_REFERENCE, HAS_LENGTHS, TOKENS, TOKEN_REF, PACKED,
            )  # fmt: skip
        if CROSS:
            cells = rows[:, None] * B + others[None, :]
            cell_ref = tl.zeros((ROWS, OTHERS), tl.float64)
            if REFERENCE != "none":
                cell_ref = tl.load(ref_ptr + cells, mask=pair, other=0.0).to(tl.float64)
            if REWARD_PAIRS:
                reward = tl.load(rewards_ptr + cells, mask=pair, other=0.0)
            else:
                reward = tl.load(rewards_ptr + others, mask=other_inside, other=0.0)[None, :]
            table = _score(reward, cell_ref, other_length[None, :], pair, inverse_lam_bits, REFERENCE)
        else:
            other_score = own
            if not ALONE:
                reward = tl.load(rewards_ptr + others, mask=other_inside, other=0.0)
                other_score = _score(reward, other_ref, other_length, other_inside, inverse_lam_bits, REFERENCE)
            other_group = tl.load(groups_ptr + others, mask=other_inside, other=0)
            table = tl.where(pair & (group[:, None] == other_group[None, :]), other_score[None, :], float("-inf"))
        new_top = tl.maximum(top, tl.max(table, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(table - new_top[:, None]), 1)
        kept += tl.sum((table > float("-inf")).to(tl.float64), 1)
        top = new_top

    if MEAN:
        total = total / tl.maximum(kept, 1.0)
    weight = _share(own, top, total)
    tl.store(weight_ptr + rows, weight, mask=inside)
    log_z = tl.where(inside, top, 0.0) + tl.log(tl.where(inside, total, 1.0))
    tl.store(log_z_ptr + rows, log_z, mask=inside)
    if ALONE:
        tl.store(ess_ptr, _ess(weight))
        if TOKENS:
            _spread(token_weight_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, weight, T, ignore_index, TIME, PACKED)


@triton.jit(do_not_specialize=["ignore_index"])
def _sequence_sums_kernel(
    ref_ptr, labels_ptr, cu_seqlens_ptr, sum_ptr, count_ptr, B, T, ignore_index,
    ROWS: tl.constexpr, TIME: tl.constexpr, PACKED: tl.constexpr, TOKEN_REF: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < B
    total, count = _token_sums(
        ref_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, T, ignore_index, TIME, PACKED, TOKEN_REF
    )
    tl.store(sum_ptr + rows, total, mask=inside)
    tl.store(count_ptr + rows, count, mask=inside)


@triton.jit(do_not_specialize=["ignore_index"])
def _finish_kernel(
    weight_ptr, ess_ptr, token_weight_ptr, labels_ptr, cu_seqlens_ptr, B, T, ignore_index,
    ROWS: tl.constexpr, TIME: tl.constexpr, ALL: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr,
    ESS: tl.constexpr,
):  # fmt: skip
    """The first program computes the ESS of all; each spreads its own rows over their tokens."""
    if ESS:  # noqa: SIM102 (constexpr, decided when compiled)
        if tl.program_id(0) == 0:
            everyone = tl.arange(0, ALL)
            tl.store(ess_ptr, _ess(tl.load(weight_ptr + everyone, mask=everyone < B, other=0.0).to(tl.float64)))
    if TOKENS:
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = rows < B
        weight = tl.load(weight_ptr + rows, mask=inside, other=0.0)
        _spread(token_weight_ptr, labels_ptr, cu_seqlens_ptr, rows, inside, weight, T, ignore_index, TIME, PACKED)


def var_weights(
    rewards: Tensor,
    ref_logp: Tensor | None,
    *,
    lam: float,
    normalizer: str,
    reference: str,
    lengths: Tensor | None = None,
    group_ids: Tensor | None = None,
    labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """weight (B,), log Z () or (B,), ess () and, given labels, the weights over the tokens: all in ``dtype``.

    rewards: (B,); (B, B) possible for "cross". ref_logp: (B,) sums, (B, B) for "cross", or one per token in the shape
    of labels; unused for reference "none". labels: (B, T), or (N,) with cu_seqlens; they give the lengths where
    ``lengths`` is None. Rows of length 0 have weight 0 and no part in Z. B is at most MAX_SEQUENCES.
    """
    b, device = rewards.shape[0], rewards.device
    grouped = normalizer in ("group", "self_normalised") and group_ids is not None
    paired, alone, tokens = grouped or normalizer == "cross", b <= SINGLE, labels is not None
    inline = tokens and alone and labels.numel() <= INLINE_TOKENS
    rows = PAIR_ROWS if paired and not alone else max(16, triton.next_power_of_2(b))
    programs = triton.cdiv(b, rows)
    token_ref = tokens and reference != "none" and normalizer != "cross" and ref_logp.shape == labels.shape
    packed = cu_seqlens is not None

    weight_B, ess = torch.empty(b, dtype=dtype, device=device), torch.empty(1, dtype=dtype, device=device)
    log_z = torch.empty(b if paired else 1, dtype=dtype, device=device)
    unused = token_weight = weight_B
    if tokens:
        # Rows behind the last packed sequence belong to none: they stay 0.
        token_weight = (torch.zeros if packed else torch.empty)(labels.shape, dtype=dtype, device=device)
    layout = {"B": b, "T": labels.shape[1] if tokens and not packed else 0, "ignore_index": int(ignore_index)}
    layout |= {"PACKED": packed}
    labels = unused if labels is None else labels.contiguous()
    cu_seqlens = unused if cu_seqlens is None else cu_seqlens.contiguous()
    ref_logp = unused if reference == "none" else ref_logp.contiguous()
    by_sequence = {**layout, "ROWS": 1, "TIME": TOKEN_TILE, "num_warps": NUM_WARPS, **LAUNCH_OPTIONS}
    with on_device_of(rewards):
        if tokens and not inline:
            sum_B, count_B = weight_B.new_empty(b, dtype=torch.float64), weight_B.new_empty(b, dtype=torch.int64)
            _sequence_sums_kernel[(b,)](
                ref_logp, labels, cu_seqlens, sum_B, count_B, **by_sequence, TOKEN_REF=token_ref
            )  # fmt: skip
            ref_logp = sum_B if token_ref else ref_logp
            lengths = count_B if lengths is None else lengths

        inputs = (rewards.contiguous(), ref_logp, unused if lengths is None else lengths.contiguous())
        outputs = (weight_B, log_z, ess, token_weight)
        options = {
            **layout,
            **LAUNCH_OPTIONS,
            # Scalar arguments are fp32; these are all the bits of a double.
            "inverse_lam_bits": struct.unpack("q", struct.pack("d", 1.0 / lam))[0],
            "MEAN": normalizer in ("batch_mean", "self_normalised"),
            "REFERENCE": reference,
            "HAS_LENGTHS": lengths is not None,
            "TOKENS": inline,
            "TOKEN_REF": token_ref and inline,
            "ROWS": rows,
            "TIME": max(1, INLINE_TILE // rows),
            "num_warps": PAIR_WARPS if programs > 1 else LARGE_BATCH_WARPS if rows >= LARGE_BATCH else NUM_WARPS,
        }
        if paired:
            groups = group_ids.contiguous() if grouped else unused
            pairs = {"CROSS": not grouped, "REWARD_PAIRS": rewards.dim() == 2, "ALONE": alone, "OTHERS": rows}
            _pair_weights_kernel[(programs,)](*inputs, groups, labels, cu_seqlens, *outputs, **options, **pairs)
        else:
            _batch_weights_kernel[(1,)](*inputs, labels, cu_seqlens, *outputs, **options)
        spread, ess_is_missing = tokens and not inline, paired and not alone
        if spread or ess_is_missing:
            _finish_kernel[(b if spread else 1,)](
                weight_B, ess, token_weight, labels, cu_seqlens, **by_sequence,
                ALL=triton.next_power_of_2(b), TOKENS=spread, ESS=ess_is_missing,
            )  # fmt: skip
    return weight_B, log_z if paired else log_z.squeeze(0), ess.squeeze(0), token_weight if tokens else None
