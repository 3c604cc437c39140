"""Supervised fine-tuning, the baseline of every other loss here: VAR with all weights 1."""

import torch
from torch import Tensor


def sft_loss(policy_logp: Tensor, lengths: Tensor | None = None, *, token_reduction: str = "sum") -> Tensor:
    """Negative log-likelihood of each sequence: -s ("sum") or -s / len ("mean").

    From log-probs that are there already. To train by SFT alone, ``linear_weighted_nll(hidden, lm_head_weight, labels,
    None)`` does the same in one pass (class A: the gradient per token, -1, is known beforehand).

    Args:
        policy_logp: (B,) summed log-probs under the policy, nats; differentiated.
        lengths: (B,) integers, tokens per sequence; for "mean".
        token_reduction: "sum" or "mean" over the sequence's tokens.

    Returns:
        (B,), nats per sequence ("sum") or per token ("mean"), fp32 (fp64 for fp64); the caller reduces over sequences.

    Raises:
        ValueError: unknown reduction, "mean" without lengths, shapes that differ.

    Source: maximum likelihood.
    """
    if token_reduction not in ("sum", "mean"):
        raise ValueError(f"token_reduction must be 'sum' or 'mean', got {token_reduction!r}")
    nll_B = -policy_logp.to(torch.promote_types(policy_logp.dtype, torch.float32))
    if token_reduction == "sum":
        return nll_B
    if lengths is None or lengths.shape != policy_logp.shape:
        got = None if lengths is None else tuple(lengths.shape)
        raise ValueError(
            f"lengths must be {tuple(policy_logp.shape)}, one per sequence, for token_reduction='mean', got {got}; "
            "count the labels of each sequence (sequence_lengths)"
        )
    return nll_B / lengths.clamp(min=1)
