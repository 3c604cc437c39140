"""``vocab_parallel_logprob`` and ``vocab_parallel_token_kl``: of an lm_head whose vocabulary is sharded over ranks."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from var_kernels.kernels.pairs import raise_maxima_
from var_kernels.kernels.rows import RowStats
from var_kernels.ops.checks import complete_options, values_readable
from var_kernels.ops.define import Forward, define_op, outside_of_graphs
from var_kernels.ops.engines import Gradients, forward_pass, vocabulary_pass
from var_kernels.ops.head import Head, HeadPair, Tensors, prepare
from var_kernels.ops.kl import prepare_pair
from var_kernels.ops.kl_engine import divergence_pass, recomputed_gradients
from var_kernels.ops.logprob import coefficients_of
from var_kernels.ops.signatures import Direction, RowKeywords, names_options

_NO_GRAPH = (
    "{} exchanges statistics between ranks and is no registered op: compile without fullgraph=True, or only what comes "
    "before and after it"
)


@outside_of_graphs(_NO_GRAPH.format("vocab_parallel_logprob"))
@names_options
def vocab_parallel_logprob(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    process_group: dist.ProcessGroup,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    **options: Unpack[RowKeywords],
) -> Tensor | tuple[Tensor, ...]:
    """``linear_logprob`` where each rank holds some rows of the lm_head: slices of the vocabulary in rank order.

    Every rank computes statistics over its slice and the ranks merge (max, sum of exponentials, label logit, entropy
    term) per row: 4 numbers a row in two all-reduces (with argmax a third), not a logit. The backward recomputes the
    rank's own logits; dW stays where W is, dhidden is all-reduced: N x D (dleft too: N x R). Two passes, 4 GEMMs, of
    V / ranks each.

    Args:
        hidden: (..., D), the same on every rank; labels: (...) or (..., K), global token ids, the same on every rank.
        lm_head_weight: (V_rank, D) this rank's slice; slices may differ in size.  bias: (V_rank,) likewise.
        low_rank: (left (..., R), the same on every rank, right (V_rank, R), this rank's slice).
        process_group: the ranks of the vocabulary. Every rank makes the call, forward and backward.
        the other options: see ``linear_logprob``.

    Returns:
        As ``linear_logprob``, the same on every rank. Each rank's gradient of hidden (and of left) is the whole one, as
        every rank sees the same upstream gradient; under a layout that sums hidden's gradients over ranks divide by
        their number.

    Raises:
        TypeError, ValueError: as ``linear_logprob``; labels beyond the whole vocabulary on a CPU.
    """
    start, vocabulary = _place(lm_head_weight, process_group)
    options = complete_options("vocab_parallel_logprob", options, RowKeywords)
    asked = {"lse": return_lse, "entropy": return_entropy, "argmax": return_argmax}
    call = prepare(hidden, lm_head_weight, labels, bias, options, vocabulary=vocabulary, **asked)
    call.head.labels_NK = call.head.labels_NK - start
    arguments = VocabParallelArguments(call.head, start, process_group)
    logp_NK, lse_N, entropy_N, argmax_N = _vocab_parallel_logprob(arguments)
    logp = call.restore(logp_NK.where(call.active_NK, 0.0))
    return call.outputs(logp, lse_N, entropy_N, argmax_N=argmax_N)


@dataclass
class VocabParallelArguments:
    """head: this rank's slice, which begins at ``start`` of the vocabulary; its labels count from there."""

    head: Head
    start: Tensor
    group: dist.ProcessGroup


def _forward(arguments: VocabParallelArguments) -> Forward:
    head = arguments.head
    stats = _merged(forward_pass(head), arguments)
    lse_N = stats.lse_N if head.options.lse else None
    entropy_N = stats.entropy_N if head.options.entropy else None
    outputs = stats.logp_NK(0.0, head.v), lse_N, entropy_N, stats.argmax_N
    return Forward(outputs, (stats.norms_2N, entropy_N), arguments)


def _backward(arguments: VocabParallelArguments, saved: Tensors, upstream: Tensors, _: None) -> Tensors:
    head, (norms_2N, entropy_N) = arguments.head, saved
    gradients = vocabulary_pass(head, norms_2N, coefficients_of(head, upstream, norms_2N, entropy_N))
    return _of_all_ranks(gradients, head, arguments.group)


def _of_all_ranks(gradients: Gradients, head: Head, group: dist.ProcessGroup) -> Tensors:
    for partial in (gradients.dhidden_ND, gradients.dleft_NR):
        if partial is not None:
            dist.all_reduce(partial, group=group)  # before it is rounded
    return gradients.like(head.tensors)


_vocab_parallel_logprob = define_op(
    "vocab_parallel_logprob", VocabParallelArguments, _forward, _backward, None, outputs=4
)


def _merged(stats: RowStats, arguments: VocabParallelArguments) -> RowStats:
    """Statistics of the whole vocabulary from those of each rank's slice."""
    labels_NK, group, max_N = arguments.head.labels_NK, arguments.group, stats.max_N.clone()
    dist.all_reduce(max_N, dist.ReduceOp.MAX, group=group)
    drop_N = (stats.max_N - max_N.masked_fill(max_N == -torch.inf, 0.0)).clamp(min=-1e30)
    scale_N = drop_N.exp()
    inside_NK = (labels_NK >= 0) & (labels_NK < arguments.head.v)
    parts = [stats.label_logit_NK.where(inside_NK, 0.0), inside_NK.to(max_N.dtype), (scale_N * stats.sumexp_N)[:, None]]
    if stats.shifted_sum_N is not None:
        parts.append((scale_N * (stats.shifted_sum_N + drop_N * stats.sumexp_N))[:, None])
    table = torch.cat(parts, 1)  # (N, 2K + 1 or 2)
    dist.all_reduce(table, group=group)
    k = inside_NK.shape[1]
    argmax_N = stats.argmax_N
    if argmax_N is not None:
        nowhere = torch.iinfo(torch.int64).max
        argmax_N = (argmax_N + arguments.start).where(stats.max_N == max_N, nowhere)
        dist.all_reduce(argmax_N, dist.ReduceOp.MIN, group=group)
    # a label on no rank stays NaN, as in one process
    label_logit_NK = table[:, :k].where(table[:, k : 2 * k] > 0, torch.nan)
    shifted_N = None if stats.shifted_sum_N is None else table[:, -1].contiguous()
    merged = {"max_N": max_N, "sumexp_N": table[:, 2 * k].contiguous(), "label_logit_NK": label_logit_NK}
    return replace(stats, **merged, shifted_sum_N=shifted_N, argmax_N=argmax_N)


def _place(lm_head_weight: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, int | None]:
    """Start of this rank's rows in the whole vocabulary, a number on the device, and the whole's size, or None on an
    accelerator, which is not waited for.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a ProcessGroup, got {type(group).__name__}; torch.distributed.group.WORLD, or a "
            "device mesh's get_group()"
        )
    rows = lm_head_weight.shape[0]
    own = torch.full((1,), rows, device=lm_head_weight.device)
    parts = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    sizes_R = torch.cat(parts)
    start = sizes_R[: dist.get_rank(group)].sum()
    if rows and not values_readable(sizes_R):
        torch._assert_async((sizes_R > 0).all(), "lm_head_weight must hold rows on every rank of process_group")
        return start, None
    # Read on the host: on a CPU, or by a rank without rows, which stops here.
    sizes = sizes_R.tolist()
    if not all(sizes):
        raise ValueError(
            f"lm_head_weight must hold rows on every rank of process_group, got {sizes}; leave ranks without rows out "
            "of the group"
        )
    return start, sum(sizes)


@outside_of_graphs(_NO_GRAPH.format("vocab_parallel_token_kl"))
@names_options
def vocab_parallel_token_kl(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ref_hidden: Tensor,
    ref_lm_head_weight: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    process_group: dist.ProcessGroup,
    direction: Direction = "reverse",
    beta: float = 0.5,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    ref_temperature: float = 1.0,
    ref_low_rank: tuple[Tensor, Tensor] | None = None,
    **options: Unpack[RowKeywords],
) -> Tensor:
    """``linear_token_kl`` where each rank holds the same rows of both models' lm_heads, in rank order.

    The ranks merge 5 statistics a row (maxima, sums of exponentials, terms of the divergence) in two all-reduces, for
    "jsd" two sums more in a third; the backward all-reduces dhidden and dleft. Two passes, 6 GEMMs of V / ranks each;
    "jsd" 8.

    Args:
        lm_head_weight, bias, ref_lm_head_weight, ref_bias: this rank's slice of the vocabulary; slices may differ in
            size. hidden, ref_hidden, labels, left of low_rank: the same on every rank.
        process_group: the ranks of the vocabulary. Every rank makes the call, forward and backward.
        the other options: see ``linear_token_kl``.

    Returns:
        The shape of labels, nats per token, the same on every rank; gradients as ``vocab_parallel_logprob``'s.

    Raises:
        TypeError, ValueError: as ``linear_token_kl``; a rank without rows.
    """
    _, vocabulary = _place(lm_head_weight, process_group)
    options = complete_options("vocab_parallel_token_kl", options, RowKeywords)
    of_ref = {"logit_scale": ref_logit_scale, "softcap": ref_softcap, "temperature": ref_temperature}
    of_ref["low_rank"] = ref_low_rank
    tensors = (hidden, lm_head_weight, ref_hidden, ref_lm_head_weight, labels, bias, ref_bias)
    call, pair, active_N = prepare_pair(*tensors, options, of_ref, direction, beta, vocabulary=vocabulary)
    (kl_N,) = _vocab_parallel_kl(VocabParallelKLArguments(pair.head, pair.ref, direction, pair.beta, process_group))
    return call.restore(kl_N.where(active_N, 0.0))


@dataclass
class VocabParallelKLArguments(HeadPair):
    """head, ref: this rank's slices."""

    group: dist.ProcessGroup


def _forward_kl(pair: VocabParallelKLArguments) -> Forward:
    def merge(state_6N: Tensor, stage: str) -> None:
        # Rows one by one: a list of them as an index is copied to the device, which is waited for.
        rows = 4, 5
        if stage == "stats":
            maxima_2N, rows = state_6N[0:3:2].contiguous(), (1, 3, 4)
            dist.all_reduce(maxima_2N, dist.ReduceOp.MAX, group=pair.group)
            raise_maxima_(state_6N, *maxima_2N, pair.kind)
        partial = torch.stack([state_6N[row] for row in rows])
        dist.all_reduce(partial, group=pair.group)
        for row, sum_N in zip(rows, partial, strict=True):
            state_6N[row] = sum_N

    state_6N = divergence_pass(pair, merge)
    return Forward((pair.divergence(state_6N),), (state_6N,), pair)


def _backward_kl(pair: VocabParallelKLArguments, saved: Tensors, upstream: Tensors, _: None) -> Tensors:
    return _of_all_ranks(recomputed_gradients(pair, *saved, *upstream), pair.head, pair.group)


_vocab_parallel_kl = define_op(
    "vocab_parallel_token_kl", VocabParallelKLArguments, _forward_kl, _backward_kl, None, outputs=1
)
