"""Anchored SFT (ASFT): DFT, held near a reference by a KL divergence over the whole vocabulary."""

from typing import Any

from torch import Tensor

from var_kernels.losses.checks import check_range
from var_kernels.losses.token import dft_loss, token_objective
from var_kernels.ops import linear_token_kl, linear_token_loss
from var_kernels.ops.checks import check_are_tensors

_OF_THE_REFERENCE = ("ref_logit_scale", "ref_softcap", "ref_temperature", "ref_low_rank")


def linear_asft_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ref_hidden: Tensor,
    ref_lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    kl_coef: float = 0.1,
    token_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """ASFT: DFT's loss of a token, and kl_coef times KL(reference || policy) there, without either model's logits.

        loss = sum_t w_t [-sg(p_t) lp_t + kl_coef KL(q_t || p_t)]          q the reference's distribution

    DFT alone drifts: nothing holds the tokens whose probability it lets fall. Both terms are of class B, one pass each.

    Args:
        hidden, lm_head_weight, bias: (..., D), (V, D), (V,) of the policy.
        ref_hidden, ref_lm_head_weight, ref_bias: (..., D_ref), (V, D_ref), (V,) of the reference; constants.
        labels: (...) int64, aligned with hidden.
        kl_coef: >= 0. 0: DFT.
        token_weight: (...) a constant for each token, such as 1 / the tokens of the batch; None: 1.
        options: of both ops (softcap, workspace_mb, ...), and ``linear_token_kl``'s for the reference (ref_softcap).

    Returns:
        A scalar, nats, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: kl_coef out of range, and what the two ops refuse.

    Source: ASFT, arXiv 2509.23753; direction, coefficient and mean over the tokens as in the authors' code.
    """
    check_range("kl_coef", kl_coef, closed=True, remedy="it weighs the distance from the reference")
    check_are_tensors(hidden=hidden, labels=labels, **({} if token_weight is None else {"token_weight": token_weight}))
    weight = hidden.new_ones(labels.shape) if token_weight is None else token_weight.detach()
    of_policy = {name: value for name, value in options.items() if name not in _OF_THE_REFERENCE}
    sft = linear_token_loss(hidden, lm_head_weight, labels, token_objective(dft_loss), (weight,), bias, **of_policy)
    if kl_coef == 0:
        return sft
    heads = (hidden, lm_head_weight, ref_hidden, ref_lm_head_weight, labels, bias, ref_bias)
    kl = linear_token_kl(*heads, direction="forward", token_weight=weight, reduction="sum", **options)
    return sft + kl_coef * kl
