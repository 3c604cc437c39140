"""Naive twins of every public op: full [N, V] logits, any dtype up to fp64. The oracle of tests and benchmarks,
nothing else.

Each twin computes in ``dtype`` (fp64 unless told otherwise) from the given, already rounded inputs, and is
differentiable.
"""

import torch
from torch import Tensor


def logits_ref(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """z = c(W h + b) with c = scale, then softcap, then temperature: (..., D), (V, D) -> (..., V)."""
    logits = hidden.to(dtype) @ lm_head_weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def linear_logprob_ref(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    **logit_options,
):
    """Twin of ``linear_logprob``: logp of the labels' shape, then lse, entropy and argmax as asked for, each (...)."""
    logits = logits_ref(hidden, lm_head_weight, bias, **logit_options)
    lse = logits.logsumexp(-1)
    several = labels.dim() == hidden.dim()
    ids = labels if several else labels.unsqueeze(-1)
    kept = ids != ignore_index
    label_logit = logits.gather(-1, ids.where(kept, 0))
    if label_smoothing:
        label_logit = (1 - label_smoothing) * label_logit + label_smoothing * logits.mean(-1, keepdim=True)
    logp = (label_logit - lse.unsqueeze(-1)).where(kept, 0.0)
    row_kept = kept.any(-1)
    outputs = [logp if several else logp.squeeze(-1)]
    if return_lse:
        outputs.append(lse.where(row_kept, 0.0))
    if return_entropy:
        logp_all = logits - lse.unsqueeze(-1)
        summand = torch.where(logp_all.isneginf(), 0.0, logp_all.exp() * logp_all.masked_fill(logp_all.isneginf(), 0.0))
        outputs.append((-summand.sum(-1)).where(row_kept, 0.0))
    if return_argmax:
        outputs.append(logits.argmax(-1).where(row_kept, -1))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def linear_weighted_nll_ref(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    token_weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    reduction: str = "sum",
    num_items: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **logit_options,
) -> Tensor:
    """Twin of ``linear_weighted_nll``: sum over kept targets of token_weight * (-logp + z_loss * lse^2), reduced."""
    logp, lse = linear_logprob_ref(
        hidden,
        lm_head_weight,
        labels,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        return_lse=True,
        **logit_options,
    )
    kept = labels != ignore_index
    several = labels.dim() == hidden.dim()
    loss = (-logp + z_loss * (lse.unsqueeze(-1) if several else lse).square()).where(kept, 0.0)
    if token_weight is not None:
        loss = loss * token_weight.to(loss.dtype)
        loss = loss.where(kept & (token_weight != 0), 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    rows = kept.any(-1) if several else kept
    return loss.sum() / (num_items if num_items is not None else rows.sum().clamp(min=1))
