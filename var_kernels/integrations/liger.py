"""The calls of liger-kernel 0.8's fused linear cross-entropy, on this library's primitives: a switch is an import.

    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss                  before
    from var_kernels.integrations.liger import LigerFusedLinearCrossEntropyLoss             after

Same arguments in the same order, same results. What differs: it runs on CPUs too, dW always accumulates in fp32
(``accum_dtype`` changes nothing), ignored rows cost nothing, and the result is fp32 whatever the inputs are.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from var_kernels.integrations.options_module import OptionsModule
from var_kernels.ops import linear_logprob, linear_token_loss, linear_weighted_nll

_REDUCTIONS = ("mean", "sum", "none")


@dataclass
class CrossEntropyOutput:
    """What was asked for; None elsewhere. token_accuracy: share of the rows that are not ignored, for "none" per row;
    predicted_tokens: (N,) most likely ids, -1 where ignored."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


@dataclass(eq=False, repr=False)
class LigerFusedLinearCrossEntropyLoss(OptionsModule):
    """Cross-entropy of a linear layer without its [N, V] output: ``loss(lin_weight, _input, target, bias=None)``.

        loss_n = -ce_weight[y_n] log p_{y_n} + lse_square_scale lse_n^2
        "mean" divides by the number of rows that are not ignored (with ce_weight by the sum of their weights)

    Args:
        ce_weight: (V,) weight of each class, or None. Not together with label_smoothing, lse_square_scale or
            use_token_scaling.
        ignore_index, lse_square_scale (z-loss), label_smoothing, reduction, softcap: as the names say.
        return_z_loss, return_token_accuracy, return_predicted_tokens: return a ``CrossEntropyOutput``.
        accum_dtype: taken and not needed, sums are fp32.
        use_token_scaling: each token's loss times its own probability, detached (DFT).

    Raises:
        ValueError: options that do not go together here, out of range, or of the wrong shape.
    """

    ce_weight: Tensor | None = None
    ignore_index: int = -100
    lse_square_scale: float = 0.0
    label_smoothing: float = 0.0
    reduction: str = "mean"
    softcap: float | None = None
    return_z_loss: bool = False
    accum_dtype: torch.dtype | None = None
    use_token_scaling: bool = False
    return_token_accuracy: bool = False
    return_predicted_tokens: bool = False

    def __post_init__(self):
        if self.reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {self.reduction!r}")
        first = "ce_weight" if self.ce_weight is not None else "use_token_scaling" if self.use_token_scaling else None
        for name in ("label_smoothing", "lse_square_scale", "use_token_scaling"):
            value = getattr(self, name)
            if first is not None and value and name != first:
                raise ValueError(f"{name} must be off together with {first}, got {value}; drop one of them")

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None):
        head = (_input, lin_weight, target)
        options = {"ignore_index": self.ignore_index, "softcap": self.softcap}
        asks = self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens
        if self.return_z_loss:
            loss, z_loss, argmax = self._with_z_loss(head, bias, options)
        elif self.use_token_scaling and self.reduction == "none":
            logp, argmax = linear_logprob(*head, bias, return_argmax=True, **options)
            loss, z_loss = -logp.detach().exp() * logp, None
        elif self.use_token_scaling:
            divisor = self._count(target) if self.reduction == "mean" else 1
            scaled, argmax = linear_token_loss(
                *head, lambda logp: -logp.detach().exp() * logp, (), bias, return_argmax=True, **options
            )
            loss, z_loss = scaled / divisor, None
        else:
            weight, num_items = self._class_weights(lin_weight, target)
            loss, argmax = linear_weighted_nll(
                *head,
                weight,
                bias,
                reduction=self.reduction,
                num_items=num_items,
                label_smoothing=self.label_smoothing,
                z_loss=self.lse_square_scale,
                return_argmax=True,
                **options,
            )
            z_loss = None
        if not asks:
            return loss
        return CrossEntropyOutput(loss, z_loss, *self._metrics(argmax, target))

    def _with_z_loss(self, head, bias, options):
        """The two parts apart: two passes."""
        if self.use_token_scaling or self.ce_weight is not None:
            raise ValueError("return_z_loss must be False with ce_weight or use_token_scaling; ask for the loss alone")
        logp, lse, argmax = linear_logprob(
            *head, bias, return_lse=True, return_argmax=True, label_smoothing=self.label_smoothing, **options
        )
        z_loss = self.lse_square_scale * lse.square()
        loss = z_loss - logp
        if self.reduction != "none":
            divisor = self._count(head[2]) if self.reduction == "mean" else 1
            loss, z_loss = loss.sum() / divisor, z_loss.sum() / divisor
        return loss, z_loss, argmax

    def _count(self, target: Tensor) -> Tensor:
        return (target != self.ignore_index).sum().clamp(min=1)

    def _class_weights(self, lin_weight: Tensor, target: Tensor):
        """Each row's weight, and what "mean" divides by."""
        if self.ce_weight is None:
            return None, None
        if self.ce_weight.shape != lin_weight.shape[:1]:
            raise ValueError(
                f"ce_weight must be ({lin_weight.shape[0]},), one per class, got {tuple(self.ce_weight.shape)}"
            )
        kept = target != self.ignore_index
        weight = self.ce_weight.to(target.device, torch.promote_types(lin_weight.dtype, torch.float32))[
            target.where(kept, 0)
        ].where(kept, 0.0)
        return weight, weight.sum() if self.reduction == "mean" else None

    def _metrics(self, argmax: Tensor, target: Tensor) -> tuple[Tensor | None, Tensor | None]:
        accuracy = None
        if self.return_token_accuracy:
            hits = ((argmax == target) & (target != self.ignore_index)).float()
            accuracy = hits if self.reduction == "none" else hits.sum() / self._count(target)
        return accuracy, argmax if self.return_predicted_tokens else None


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
):
    """``LigerFusedLinearCrossEntropyLoss`` as a function, in liger-kernel's own argument order; chunk_mem_const is
    taken and not needed: a memory budget takes its place.
    """
    options = (ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss)
    others = (accum_dtype, use_token_scaling, return_token_accuracy, return_predicted_tokens)
    loss = LigerFusedLinearCrossEntropyLoss(*options, *others)
    return loss(weight, input, target, bias)


class LigerFusedLinearCrossEntropyFunction:
    """``LigerFusedLinearCrossEntropyFunction.apply(_input, weight, target, ...)`` by position, as liger-kernel's:
    (loss, z_loss, token_accuracy, predicted_tokens), None where not asked for.
    """

    @staticmethod
    def apply(_input, weight, target, bias=None, *options):
        """options: ce_weight to return_predicted_tokens as the module's, then ce_impl, ce_mode, chunk_mem_const."""
        count = len(fields(LigerFusedLinearCrossEntropyLoss))
        for name, value in zip(("ce_impl", "ce_mode"), options[count:], strict=False):
            if value is not None:
                raise ValueError(f"{name}: expected None, it chooses among liger-kernel's own kernels; leave it out")
        found = LigerFusedLinearCrossEntropyLoss(*options[:count])(weight, _input, target, bias)
        if isinstance(found, Tensor):
            return found, None, None, None
        return found.loss, found.z_loss, found.token_accuracy, found.predicted_tokens
