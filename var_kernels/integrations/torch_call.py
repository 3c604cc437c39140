"""The call of ``torch.nn.functional.linear_cross_entropy`` (torch 2.13), on this library's primitives.

    from torch.nn.functional import linear_cross_entropy                          before
    from var_kernels.integrations.torch_call import linear_cross_entropy          after

Same arguments by name, same results; the logits are never made whatever ``options`` says (its chunks are not needed: a
memory budget takes their place). What differs: the result is fp32 (fp64 for fp64) whatever the inputs are, a bias may
be fp32 beside 16-bit matrices, and the mean over no row (an empty batch, or one whose targets are all ignored) is 0
where torch says NaN: gradients are 0 in both, but a NaN of one micro-batch or rank would be that of the whole step.
"""

from torch import Tensor

from var_kernels.integrations.liger import LigerFusedLinearCrossEntropyLoss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object | None = None,
) -> Tensor:
    """Cross-entropy of input linear_weight^T + linear_bias and class ids. Memory: ``linear_weighted_nll``.

    Args:
        input: (D,) or (N, D).
        linear_weight: (V, D).
        target: () or (N,) int64.
        linear_bias: (V,).
        weight: (V,) weight of each class; "mean" divides by the sum of the targets' weights.
        ignore_index: None is -100.

    Returns:
        () or, for reduction "none", the shape of target; nats.

    Raises:
        ValueError: class probabilities as target, a linear_weight of more than two dimensions: what cross-entropy over
            whole logits is needed for.
    """
    if linear_weight.dim() != 2:
        raise ValueError(f"linear_weight must be (V, D), got {tuple(linear_weight.shape)}; use torch's own function")
    if target.is_floating_point():
        raise ValueError(
            f"target must be class ids, int64, got {target.dtype} (class probabilities); use torch's own function"
        )
    loss = LigerFusedLinearCrossEntropyLoss(
        ce_weight=weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )(linear_weight, input.reshape(-1, input.shape[-1]), target.reshape(-1), linear_bias)
    return loss.view(target.shape) if reduction == "none" else loss
