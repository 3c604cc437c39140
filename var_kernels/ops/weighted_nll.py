"""``linear_weighted_nll``: token-weighted cross-entropy of the lm_head, gradients made in the forward pass."""

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from var_kernels.kernels.rows import RowCoefficients, RowStats
from var_kernels.ops import checks
from var_kernels.ops.define import Forward, define_op, gradient_shapes
from var_kernels.ops.engines import one_pass
from var_kernels.ops.head import Head, HeadCall, prepare
from var_kernels.ops.logprob import apply_logprob
from var_kernels.ops.plan import takes_one_pass
from var_kernels.ops.signatures import (
    ENGINES,
    REDUCTIONS,
    Engine,
    LogprobKeywords,
    Reduction,
    WeightedNLLKeywords,
    names_options,
)


@overload
def linear_weighted_nll(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    token_weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    return_logp: Literal[False] = False,
    return_argmax: Literal[False] = False,
    **options: Unpack[WeightedNLLKeywords],
) -> Tensor: ...


@overload
def linear_weighted_nll(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    token_weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    return_logp: bool = False,
    return_argmax: bool = False,
    **options: Unpack[WeightedNLLKeywords],
) -> Tensor | tuple[Tensor, ...]: ...


@names_options
def linear_weighted_nll(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    token_weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    reduction: Reduction = "sum",
    num_items: float | Tensor | None = None,
    z_loss: float = 0.0,
    return_logp: bool = False,
    return_argmax: bool = False,
    engine: Engine = "auto",
    **options: Unpack[LogprobKeywords],
) -> Tensor | tuple[Tensor, ...]:
    """Weighted negative log-likelihood of the labels, without the [N, V] logits.

        loss = sum_n w_n (-logp_n + z_loss * lse_n^2)

    with logp and lse as in ``linear_logprob``; "mean" divides by num_items, or by the number of rows with a label. The
    weights are known before the logits, so the gradients are made with them: 3 GEMMs in all ("one_pass"; peak extra
    memory ``workspace_mb``, which also holds an fp32 dW where W is narrower). Where the budget does not hold that, or
    for reduction "none": 4 GEMMs ("two_pass"; ``workspace_mb`` and an fp32 [N, D]). Both give the same numbers.
    Differentiable in ``token_weight`` as well.

    Args:
        hidden, lm_head_weight, labels, bias, workspace_mb, precision and the head's options: see ``linear_logprob``.
        token_weight: the shape of labels, floating point, any sign, finite where the label counts; None: 1. Rows
            of weight 0 cost nothing.
        num_active: as in ``linear_logprob``; rows of weight 0 need not be counted.
        num_items: divisor of "mean" (number of items in the global batch, sum of weights), positive; 0 where no row
            counts.
        engine: "auto", "one_pass" or "two_pass". "auto" takes two passes for fp16, where gradients that are made before
            a GradScaler's factor is known underflow.

    Returns:
        A scalar fp32 (fp64 for fp64 inputs), nats; for "none" the shape of labels. An all-ignored batch gives a
        differentiable 0. If asked for, a tuple with the detached logp (shape of labels, 0 where ignored or of weight 0)
        and argmax (...) int64 (-1 there), in this order.

    Raises:
        TypeError, ValueError: argument, what was expected, what came, the remedy.
    """
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_choice("engine", engine, ENGINES)
    checks.check_number("z_loss", z_loss)
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items divides reduction='mean' only, got reduction={reduction!r}; drop one of them")
    if engine == "one_pass" and reduction == "none":
        raise ValueError("engine='one_pass' needs one scalar loss, got reduction='none'; use engine='auto'")
    options = checks.complete_options("linear_weighted_nll", options, LogprobKeywords)
    asked = {"lse": z_loss != 0, "argmax": return_argmax}
    call = prepare(hidden, lm_head_weight, labels, bias, options, token_weight=token_weight, **asked)
    checks.check_num_items(num_items, call.active_NK)
    if token_weight is None:
        weight_NK = call.active_NK.to(call.head.wide)
    else:
        weight_NK = call.select_targets(token_weight).to(call.head.wide).where(call.active_NK, 0.0)
    if reduction == "mean":
        weight_NK = weight_NK / _divisor(call, labels, options["ignore_index"], num_items)
        weight_NK = weight_NK.where(call.active_NK, 0.0)  # num_items may be 0 then

    if reduction != "none" and takes_one_pass(call.head, engine):
        arguments = WeightedNLLArguments(call.head, weight_NK, call.active_NK, z_loss)
        loss, logp_NK, argmax_N = _weighted_nll(arguments, call.traced)
        logp_NK = logp_NK.where(call.active_NK, 0.0)
    else:
        logp_NK, lse_N, _, argmax_N = apply_logprob(call)
        penalty_N1 = z_loss * lse_N.square().unsqueeze(1) if z_loss else 0.0
        loss_NK = weight_NK * (penalty_N1 - logp_NK)
        loss = call.restore(loss_NK) if reduction == "none" else loss_NK.sum()
    return call.outputs(loss, logp_NK.detach() if return_logp else None, argmax_N=argmax_N)


def _divisor(call: HeadCall, labels: Tensor, ignore_index: int, num_items: float | Tensor | None) -> float | Tensor:
    if num_items is not None:
        return num_items.to(labels.device) if isinstance(num_items, Tensor) else num_items
    counted = labels != ignore_index
    return (counted.any(-1) if call.several else counted).sum().clamp(min=1)


@dataclass
class WeightedNLLArguments:
    head: Head
    weight_NK: Tensor
    active_NK: Tensor
    z_loss: float


def _forward(arguments: WeightedNLLArguments) -> Forward:
    """The sum of weight (-logp + z_loss lse^2), log-probs and argmax for the caller's metrics; finished gradients."""
    head, weight_NK, z_loss = arguments.head, arguments.weight_NK, arguments.z_loss

    def coefficients_of(rows: slice, stats: RowStats) -> RowCoefficients:
        weight_nk = weight_NK[rows]
        dlse_n = 2 * z_loss * weight_nk.sum(1) * stats.lse_N if z_loss else None
        return RowCoefficients.from_upstream(-weight_nk, head.options.label_smoothing, head.v, dlse_n)

    stats, gradients = one_pass(head, coefficients_of)
    logp_NK = stats.logp_NK(head.options.label_smoothing, head.v)
    nll_NK = z_loss * stats.lse_N.square().unsqueeze(1) - logp_NK if z_loss else -logp_NK
    # Targets that do not count have weight 0, but their label stands for another token, perhaps of probability 0.
    nll_NK = nll_NK.where(arguments.active_NK, 0.0)
    return Forward(((weight_NK * nll_NK).sum(), logp_NK, stats.argmax_N), (*gradients, nll_NK))


def _shapes(arguments: WeightedNLLArguments) -> Forward:
    head, labels_NK = arguments.head, arguments.head.labels_NK
    logp_NK = head.hidden_ND.new_empty(labels_NK.shape, dtype=head.wide)
    argmax_N = labels_NK.new_empty(head.n) if head.options.argmax else None
    return Forward((logp_NK.new_empty(()), logp_NK, argmax_N), (*gradient_shapes(head), torch.empty_like(logp_NK)))


_weighted_nll = define_op(
    "weighted_nll", WeightedNLLArguments, _forward, None, _shapes, outputs=3, learns=("weight_NK",)
)
