"""The call of cut-cross-entropy, on this library's primitives: a switch is an import.

    from cut_cross_entropy import linear_cross_entropy                   before
    from var_kernels.integrations.cce import linear_cross_entropy        after

Same arguments by name, same results, no filtering of small gradients: ``filter_eps``, ``filter_e_grad``,
``filter_c_grad``, ``accum_e_fp32``, ``accum_c_fp32`` and ``impl`` are taken and change nothing, every gradient is whole
and summed in fp32. What differs: it runs on CPUs, the result is fp32 whatever the inputs are, and the mean over no row
is 0 where it is NaN there: a micro-batch or a rank without a label does not spoil the step.

Positions are those of the newest release, which has a bias and ``return_lse``. Older ones (25.1.1, on PyPI) order their
arguments differently: what is not of its place's type is refused by name, so that no value is read as another option.
"""

import enum
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from var_kernels.integrations.liger import OptionsModule
from var_kernels.ops import linear_logprob, linear_weighted_nll

_FILTERS = ("auto", "high")


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str = "cce",
    vocab_parallel_options: None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of softcap(e c^T + bias) and targets; the logits are never made. Memory: ``linear_weighted_nll``,
    with return_lse ``linear_logprob``.

    Args:
        e: (..., D).
        c: (V, D).
        targets: (...) int64.
        bias: (V,).
        shift: s: row t is scored by targets[t + s], the last s rows by nothing; True is 1.
        reduction: "mean" (over the rows that are not ignored), "sum", "none".
        return_lse: also return log sum_v exp of each row's logits, nats, 0 where ignored, differentiable.

    Returns:
        () or, for "none", the shape of targets, fp32, nats; with shift s columns fewer. With return_lse a tuple with
        lse in the shape of "none".

    Raises:
        ValueError: shift out of range, vocab_parallel_options (see ``var_kernels.ops.vocab_parallel_logprob``).
        TypeError: an option that is not of its type, as where arguments are given in another release's order.
    """
    if vocab_parallel_options is not None:
        raise ValueError(
            f"vocab_parallel_options must be None, got {type(vocab_parallel_options).__name__}; for a vocabulary "
            "sharded over ranks use var_kernels.ops.vocab_parallel_logprob"
        )
    flags = {"accum_e_fp32": accum_e_fp32, "accum_c_fp32": accum_c_fp32}
    flags |= {"filter_e_grad": filter_e_grad, "filter_c_grad": filter_c_grad, "return_lse": return_lse}
    _check_places(flags, bias, ignore_index, softcap, reduction, shift, filter_eps, impl)
    steps = int(shift)
    if not 0 <= steps < targets.shape[-1]:
        raise ValueError(
            f"shift must be from 0 to {targets.shape[-1] - 1}, got {shift}; True or 1 predicts the next token"
        )
    if steps:
        e, targets = e[..., :-steps, :], targets[..., steps:]
    head: Any = {"ignore_index": ignore_index, "softcap": softcap}
    if not return_lse:
        head["reduction"] = reduction
        return linear_weighted_nll(e, c, targets, None, bias, **head)
    logp, lse = linear_logprob(e, c, targets, bias, return_lse=True, **head)
    if reduction == "none":
        return -logp, lse
    count = (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1
    return -logp.sum() / count, lse


def _check_places(flags, bias, ignore_index, softcap, reduction, shift, filter_eps, impl) -> None:
    """Types tell the orders of cut-cross-entropy's releases apart."""
    if isinstance(reduction, str) and reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of 'mean', 'sum', 'none', got {reduction!r}")
    number = isinstance(filter_eps, float | int) and not isinstance(filter_eps, bool)
    fits = {
        "bias must be a tensor or None": (bias, bias is None or isinstance(bias, Tensor)),
        "ignore_index must be an int": (ignore_index, type(ignore_index) is int),
        "reduction must be a str": (reduction, isinstance(reduction, str)),
        "softcap must be a number or None": (softcap, softcap is None or type(softcap) in (float, int)),
        "shift must be a bool or an int": (shift, isinstance(shift, int)),
        "filter_eps must be a number, 'auto', 'high' or None": (
            filter_eps,
            filter_eps is None or number or filter_eps in _FILTERS,
        ),
        "impl must be a name": (impl, isinstance(impl, str | enum.Enum)),
        **{f"{name} must be a bool": (value, isinstance(value, bool)) for name, value in flags.items()},
    }
    for expected, (value, holds) in fits.items():
        if not holds:
            raise TypeError(
                f"{expected}, got {type(value).__name__} {value!r:.60}; releases of cut-cross-entropy order their "
                "arguments differently, so name them"
            )


@dataclass(eq=False, repr=False)
class LinearCrossEntropy(OptionsModule):
    """``linear_cross_entropy`` as a module: options first, then ``loss(e, c, targets, bias=None)``."""

    ignore_index: int = -100
    softcap: float | None = None
    reduction: str = "mean"
    shift: bool | int = 0
    filter_eps: float | str | None = "auto"
    accum_e_fp32: bool = False
    accum_c_fp32: bool = False
    filter_e_grad: bool = True
    filter_c_grad: bool = True
    impl: str = "cce"
    return_lse: bool = False

    def __post_init__(self):
        flags = ("accum_e_fp32", "accum_c_fp32", "filter_e_grad", "filter_c_grad", "return_lse")
        places = (self.ignore_index, self.softcap, self.reduction, self.shift, self.filter_eps, self.impl)
        _check_places({name: getattr(self, name) for name in flags}, None, *places)

    def forward(
        self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        places = (self.ignore_index, self.softcap, self.reduction, self.shift, self.return_lse)
        return linear_cross_entropy(e, c, targets, bias, *places)
