"""The calls of liger-kernel 0.8's fused linear cross-entropy, on this library's primitives: a switch is an import.

    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss                  before
    from var_kernels.integrations.liger import LigerFusedLinearCrossEntropyLoss             after

Same arguments in the same order, same results. What differs: it runs on CPUs too, dW always accumulates in fp32
(``accum_dtype`` changes nothing), ignored rows cost nothing, the result is fp32 whatever the inputs are, and the
accuracy of a batch without a label is 0, not NaN.
"""

from dataclasses import dataclass, fields
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from var_kernels.ops import linear_logprob, linear_token_loss, linear_weighted_nll

_REDUCTIONS = ("mean", "sum", "none")


class OptionsModule(nn.Module):
    """A module that only has options: the fields under ``@dataclass(eq=False, repr=False)`` are its arguments."""

    def __new__(cls, *_args, **_kwargs):
        module = super().__new__(cls)
        nn.Module.__init__(module)  # before the first attribute is set
        return module


@dataclass
class CrossEntropyOutput:
    """Requested outputs, None elsewhere. z_loss: the part of the loss, without a gradient; token_accuracy: share of
    the rows that are not ignored, for "none" per row; predicted_tokens: (N,) most likely ids, -1 where ignored."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


_TILE_ELEMENTS = 1 << 24


def _weighted_logits(
    hidden_ND: Tensor, lin_weight: Tensor, bias: Tensor | None, class_weight: Tensor, softcap: float | None
) -> Tensor:
    """(N,) sum_v c_v z_v of the capped logits z, in the dtype of c; tiles of 16 M logits, computed again in the
    backward.
    """
    columns = max(1, _TILE_ELEMENTS // max(1, len(hidden_ND)))
    biases = repeat(None) if bias is None else bias.split(columns)
    tiles = zip(lin_weight.split(columns), biases, class_weight.split(columns), strict=False)
    wide_ND = hidden_ND.to(class_weight.dtype)
    return sum(
        checkpoint(_weighted_tile, wide_ND, *tile, softcap, use_reentrant=False, preserve_rng_state=False)
        for tile in tiles
    )


def _weighted_tile(hidden_ND, weight_vd, bias_v, class_weight_v, softcap) -> Tensor:
    z_nv = hidden_ND @ weight_vd.to(hidden_ND.dtype).t()
    if bias_v is not None:
        z_nv = z_nv + bias_v.to(z_nv.dtype)
    if softcap is not None:
        z_nv = softcap * (z_nv / softcap).tanh()
    return z_nv @ class_weight_v


@dataclass(eq=False, repr=False)
class LigerFusedLinearCrossEntropyLoss(OptionsModule):
    """Cross-entropy of a linear layer without its [N, V] output: ``loss(lin_weight, _input, target, bias=None)``.

        nll_n = -(1 - e) c_y log p_y - e / V sum_v c_v log p_v,    e = label_smoothing, c = ce_weight or 1
        z_n = lse_square_scale lse_n^2;   with use_token_scaling both times p_y, a constant (DFT)
        "mean": sum nll_n / sum c_y + sum z_n / count of the rows that are not ignored

    The mean over no row is 0. Peak memory and GEMMs: ``linear_weighted_nll``; with return_z_loss, or ce_weight or
    use_token_scaling beside z-loss, ``linear_logprob``; beside label_smoothing 4 GEMMs more, in tiles of 64 MiB.

    Args:
        ce_weight: (V,) weight of each class, a constant, or None.
        ignore_index, lse_square_scale (z-loss), label_smoothing, reduction, softcap: as the names say; bias: (V,), the
            inputs' dtype or fp32.
        return_z_loss, return_token_accuracy, return_predicted_tokens: return a ``CrossEntropyOutput``.
        accum_dtype: taken and not needed, sums are fp32.

    Raises:
        ValueError: options out of range or of the wrong shape.
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
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}; 1 leaves out the label")

    @property
    def _mixes_classes(self) -> bool:
        """Return whether smoothing is over weighted classes or scaled by p_y: more than ``linear_logprob`` does."""
        return self.label_smoothing != 0 and (self.ce_weight is not None or self.use_token_scaling)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> "Tensor | CrossEntropyOutput":
        head = (_input, lin_weight, target)
        options: Any = {"ignore_index": self.ignore_index, "softcap": self.softcap}
        class_weight = self._class_weight(lin_weight)
        several = self.label_smoothing or self.lse_square_scale
        z_loss = None
        if self.return_z_loss or (several and (class_weight is not None or self.use_token_scaling)):
            loss, z_loss, argmax = self._by_log_probs(head, bias, options, class_weight)
        elif self.use_token_scaling:
            loss, argmax = self._scaled(head, bias, options, class_weight)
        else:
            row_weight = None
            divisor = self._divisor(target, class_weight)
            if class_weight is not None:
                row_weight = self._row_weight(target, class_weight) / divisor.where(divisor != 0, 1.0)
            reduction: Any = "sum" if class_weight is not None and self.reduction == "mean" else self.reduction
            loss, argmax = linear_weighted_nll(
                _input,
                lin_weight,
                target,
                row_weight,
                bias,
                reduction=reduction,
                label_smoothing=self.label_smoothing,
                z_loss=self.lse_square_scale,
                return_argmax=True,
                **options,
            )
            if class_weight is not None:
                loss = loss / (divisor != 0)  # by 1, or as the division by 0 that it is
        if not (self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens):
            return loss
        return CrossEntropyOutput(loss, z_loss if self.return_z_loss else None, *self._metrics(argmax, target))

    def _scaled(self, head, bias, options, class_weight):
        """p_y times the loss of label y alone, one pass where it is summed."""
        hidden, weight, target = head
        row_weight = torch.ones_like(target, dtype=torch.float32)
        if class_weight is not None:
            row_weight = self._row_weight(target, class_weight)
        if self.reduction == "none":
            logp, argmax = linear_logprob(hidden, weight, target, bias, return_argmax=True, **options)
            return -row_weight * logp.detach().exp() * logp, argmax
        total, argmax = linear_token_loss(
            hidden,
            weight,
            target,
            lambda logp, w: -w * logp.detach().exp() * logp,
            (row_weight,),
            bias,
            return_argmax=True,
            **options,
        )
        return total / self._divisor(target, class_weight), argmax

    def _by_log_probs(self, head, bias, options, class_weight):
        """Loss, z-loss, argmax from log-probs and lse: two passes."""
        hidden, weight, target = head
        smoothing = 0.0 if self._mixes_classes else self.label_smoothing
        logp, lse, argmax = linear_logprob(
            hidden, weight, target, bias, return_lse=True, return_argmax=True, label_smoothing=smoothing, **options
        )
        nll, z_loss = -logp, self.lse_square_scale * lse.square()
        if class_weight is not None:
            nll = nll * self._row_weight(target, class_weight)
        if self._mixes_classes:
            others = self._mean_over_classes(head, bias, lse, class_weight)
            nll = (1 - self.label_smoothing) * nll + self.label_smoothing * others
        if self.use_token_scaling:
            label_prob = logp.detach().exp()
            nll, z_loss = nll * label_prob, z_loss * label_prob
        if self.reduction != "none":
            nll, z_loss = nll.sum() / self._divisor(target, class_weight), z_loss.sum() / self._divisor(target, None)
        return nll + z_loss, z_loss.detach(), argmax

    def _mean_over_classes(self, head, bias, lse, class_weight):
        """(N,) -1/V sum_v c_v log p_v, 0 where ignored."""
        hidden, lin_weight, target = head
        if class_weight is None:
            class_weight = lse.new_ones(len(lin_weight))
        kept = target != self.ignore_index
        rows = hidden.where(kept.unsqueeze(-1), 0.0)
        with torch.autocast(rows.device.type, enabled=False):
            weighted = _weighted_logits(rows, lin_weight, bias, class_weight, self.softcap)
        return ((lse * class_weight.sum() - weighted) / len(lin_weight)).where(kept, 0.0)

    def _class_weight(self, lin_weight: Tensor) -> Tensor | None:
        if self.ce_weight is None:
            return None
        if self.ce_weight.shape != lin_weight.shape[:1]:
            raise ValueError(
                f"ce_weight must be ({lin_weight.shape[0]},), one per class, got {tuple(self.ce_weight.shape)}; a "
                "weight for each row of lin_weight"
            )
        return self.ce_weight.detach().to(lin_weight.device, torch.promote_types(lin_weight.dtype, torch.float32))

    def _row_weight(self, target: Tensor, class_weight: Tensor) -> Tensor:
        kept = target != self.ignore_index
        return class_weight[target.where(kept, 0)].where(kept, 0.0)

    def _divisor(self, target: Tensor, class_weight: Tensor | None) -> Tensor:
        """() what "mean" divides by: the rows that are not ignored, or their weights' sum; 1 of no row."""
        if self.reduction != "mean":
            return torch.ones((), device=target.device)
        count = (target != self.ignore_index).sum()
        total = count if class_weight is None else self._row_weight(target, class_weight).sum()
        return total.where(count > 0, 1)

    def _metrics(self, argmax: Tensor, target: Tensor) -> tuple[Tensor | None, Tensor | None]:
        accuracy = None
        if self.return_token_accuracy:
            hits = ((argmax == target) & (target != self.ignore_index)).float()
            count = (target != self.ignore_index).sum().clamp(min=1)
            accuracy = hits if self.reduction == "none" else hits.sum() / count
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
) -> "Tensor | CrossEntropyOutput":
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
    def apply(_input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *options: Any) -> tuple:
        """options: ce_weight to return_predicted_tokens as the module's, then ce_impl, ce_mode, chunk_mem_const."""
        count = len(fields(LigerFusedLinearCrossEntropyLoss))
        for name, value in zip(("ce_impl", "ce_mode"), options[count:], strict=False):
            if value is not None:
                raise ValueError(
                    f"{name} must be None, since it chooses among liger-kernel's own kernels, got {value!r:.60}; leave "
                    "it out"
                )
        found = LigerFusedLinearCrossEntropyLoss(*options[:count])(weight, _input, target, bias)
        if isinstance(found, Tensor):
            return found, None, None, None
        return found.loss, found.z_loss, found.token_accuracy, found.predicted_tokens
