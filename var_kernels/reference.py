"""Naive twins of every public op: full [N, V] logits, any dtype up to fp64. The oracle of tests and benchmarks,
nothing else.

Each twin computes in ``dtype`` (fp64 unless told otherwise) from the given, already rounded inputs, and is
differentiable.
"""

import math

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
    low_rank: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """z = c(W h + right left + b) with c = scale, then softcap, then temperature: (..., D), (V, D) -> (..., V)."""
    logits = hidden.to(dtype) @ lm_head_weight.to(dtype).T
    if low_rank is not None:
        left, right = low_rank
        logits = logits + left.to(dtype) @ right.to(dtype).T
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
        if not token_weight.requires_grad:  # a weight that is learned has a gradient at 0 too
            loss = loss.where(kept & (token_weight != 0), 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    rows = kept.any(-1) if several else kept
    return loss.sum() / (num_items if num_items is not None else rows.sum().clamp(min=1))


def linear_token_kl_ref(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ref_hidden: Tensor,
    ref_lm_head_weight: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    direction: str = "reverse",
    beta: float = 0.5,
    token_weight: Tensor | None = None,
    reduction: str = "none",
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
    **logit_options,
) -> Tensor:
    """Twin of ``linear_token_kl``: from both models' log-probs; what has probability 0 adds nothing."""
    of_ref = {name[4:]: value for name, value in logit_options.items() if name.startswith("ref_")}
    of_policy = {name: value for name, value in logit_options.items() if not name.startswith("ref_")}
    logp = logits_ref(hidden, lm_head_weight, bias, dtype=dtype, **of_policy).log_softmax(-1)
    logq = logits_ref(ref_hidden, ref_lm_head_weight, ref_bias, dtype=dtype, **of_ref).log_softmax(-1)

    def divergence(a, b):
        return torch.where(a.isneginf(), 0.0, a.exp() * (a - b).masked_fill(a.isneginf(), 0.0)).sum(-1)

    if direction == "jsd":
        lowest = torch.finfo(dtype).min / 2
        logm = torch.logaddexp(logq.clamp(min=lowest) + math.log(beta), logp.clamp(min=lowest) + math.log(1 - beta))
        kl = beta * divergence(logq, logm) + (1 - beta) * divergence(logp, logm)
    else:
        kl = divergence(logp, logq) if direction == "reverse" else divergence(logq, logp)
    if labels is not None:
        kl = kl.where(labels if labels.dtype == torch.bool else labels != ignore_index, 0.0)
    if token_weight is not None:
        kl = kl * token_weight.to(dtype)
        if not token_weight.requires_grad:
            kl = kl.where(token_weight != 0, 0.0)
    return kl.sum() if reduction == "sum" else kl


def var_weights_ref(
    rewards: Tensor,
    ref_logp: Tensor | None = None,
    *,
    lam: float,
    normalizer: str = "self_normalised",
    reference: str | None = None,
    lengths: Tensor | None = None,
    group_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of ``var_weights``: weight (B,), log Z (B,) of each row, ess (); a loop over rows, one process."""
    b = rewards.shape[0]

    def score(i: int, j: int) -> Tensor:  # of response j under prompt i
        pair = (i, j) if normalizer == "cross" else j
        value = (rewards[i, j] if rewards.dim() == 2 else rewards[j]).to(dtype) / lam
        if reference == "sum":
            value = value + ref_logp[pair].to(dtype)
        elif reference == "mean":
            value = value + ref_logp[pair].to(dtype) / lengths[j]
        return value

    weight, log_z = [], []
    for i in range(b):
        grouped = normalizer in ("group", "self_normalised") and group_ids is not None
        peers = [j for j in range(b) if not grouped or group_ids[j] == group_ids[i]]
        peers = [j for j in peers if lengths is None or lengths[j] > 0]
        terms = [score(i, j) for j in peers] or [torch.tensor(-torch.inf, dtype=dtype)]
        total = torch.stack(terms).logsumexp(0)
        if normalizer in ("batch_mean", "self_normalised") and peers:
            total = total - torch.tensor(len(peers), dtype=dtype).log()
        log_z.append(total)
        weight.append((score(i, i) - total).exp() if i in peers else torch.zeros((), dtype=dtype))
    weight_B = torch.stack(weight)
    return weight_B, torch.stack(log_z), weight_B.sum() ** 2 / (weight_B**2).sum()


def var_loss_ref(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    ref_logp: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    token_reduction: str = "sum",
    ignore_index: int = -100,
    weight_options: dict,
    **logit_options,
) -> Tensor:
    """Twin of ``var_loss`` for padded (B, T, D) batches and per-sequence ref_logp."""
    logp = linear_logprob_ref(hidden, lm_head_weight, labels, bias, ignore_index=ignore_index, **logit_options).sum(-1)
    lengths = (labels != ignore_index).sum(-1)
    weight, _, _ = var_weights_ref(rewards, ref_logp, lengths=lengths, **weight_options)
    if token_reduction == "mean":
        logp = logp / lengths.clamp(min=1)
    return -(weight * logp).sum()


def dpo_loss_ref(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta, label_smoothing=0.0) -> Tensor:
    """Twin of ``dpo_loss``: the two-way classification written out with probabilities, (P,)."""
    margin = beta * (policy_chosen.double() - policy_rejected.double() - ref_chosen.double() + ref_rejected.double())
    p_chosen = 1 / (1 + torch.exp(-margin))
    return -(1 - label_smoothing) * torch.log(p_chosen) - label_smoothing * torch.log(1 - p_chosen)
