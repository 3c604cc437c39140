"""``linear_logprob``: log-probabilities of given tokens from hidden states and the lm_head, differentiable for any
upstream gradient.
"""

from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from var_kernels.kernels.rows import RowCoefficients
from var_kernels.ops.checks import complete_options
from var_kernels.ops.define import Forward, define_op
from var_kernels.ops.engines import exp_pass, forward_pass, frozen_gradient, new_cached, vocabulary_pass
from var_kernels.ops.head import HIDDEN_ALONE, Head, HeadCall, Tensors, prepare
from var_kernels.ops.plan import cached_columns
from var_kernels.ops.signatures import LogprobKeywords, names_options


@overload
def linear_logprob(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    return_entropy: Literal[False] = False,
    return_argmax: Literal[False] = False,
    **options: Unpack[LogprobKeywords],
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    **options: Unpack[LogprobKeywords],
) -> Tensor | tuple[Tensor, ...]: ...


@names_options
def linear_logprob(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    **options: Unpack[LogprobKeywords],
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each label under the lm_head, without the [N, V] logits.

        x = W h [+ right left] + b;   z = c(x): times logit_scale, softcap * tanh(. / softcap), divided by temperature
        logp = z_y - lse,   lse = log sum_v exp z_v,   entropy = lse - sum_v p_v z_v
        with label_smoothing e:  logp = (1 - e) log p_y + e * mean_v log p_v

    Every output but argmax is differentiable, for any upstream gradient, as often as wanted (first order). GEMMs: one
    forward; a backward recomputes the logits slice by slice (4 in all) but for those that ``workspace_mb`` holds until
    then (3 where it holds all), or needs only one [N, D] product that the forward saved, when nothing but ``hidden``
    learns (2). Peak extra memory: ``workspace_mb``, which a call may hold until its backward, and there an fp32 [N, D].

    Args:
        hidden: (..., D), floating point; states before the lm_head. Any strides.
        lm_head_weight: (V, D), hidden's dtype. A slice ``W[:v]`` restricts the vocabulary.
        labels: (...) or (..., K) int64 in [0, V) or ``ignore_index``; aligned with hidden, nothing is shifted. Rows
            without a label cost nothing.
        bias: (V,), hidden's dtype, or fp32 beside 16 bit; -inf forbids a token (under a softcap it is only lowered to
            -softcap).
        low_rank: (left (..., R), right (V, R)), hidden's dtype, or fp32 beside 16 bit: a second product, added to the
            logits tile by tile, as a LoRA adapter of the head is: left = scaling * dropout(hidden) A^T, right = B. Peak
            memory besides: their gradients in fp32. No (V, D) matrix is merged.
        temperature: one for all rows. Rows of several (sampled at different ones): a call for each, with the labels of
            the others ignored, which costs nothing; hidden divided by it is rounded again in 16 bit.
        num_active: at least the number of rows with a label, when the caller knows it: nothing is read from the device
            then, also under torch.compile and CUDA-graph capture, and only that many rows are computed. Too small a
            count is an error (on an accelerator a device-side assertion).
        workspace_mb: MiB for tiles of logits; None: 1/32 of an accelerator's memory; on a CPU half of lm_head_weight's
            size and at least 64, or in 16 bit what one pass takes, (4 D + 1024) V bytes, if that is at most 1/32 of the
            memory. 0: no tiles, logits stay in registers (Triton backend, no gradients: a backward needs 1 or more
            there).
        precision: "fp32": logits in fp32 (fp64 for fp64 inputs); "fast": logits rounded to hidden's dtype, log-prob
            errors up to 0.03 in bf16.

    Returns:
        logp, the shape of labels, fp32 (fp64 for fp64), nats, 0 where ignored. If asked for, a tuple with lse (...) and
        entropy (...), nats, 0 for rows without a label, and argmax (...) int64, -1 for those rows; in this order.

    Raises:
        TypeError, ValueError: argument, what was expected, what came, the remedy. On a CPU labels out of range too; an
            accelerator is not read, there such labels give NaN.
    """
    options = complete_options("linear_logprob", options, LogprobKeywords)
    asked = {"lse": return_lse, "entropy": return_entropy, "argmax": return_argmax}
    call = prepare(hidden, lm_head_weight, labels, bias, options, **asked)
    logp_NK, lse_N, entropy_N, argmax_N = apply_logprob(call)
    return call.outputs(call.restore(logp_NK), lse_N, entropy_N, argmax_N=argmax_N)


@dataclass
class LogprobArguments:
    """frozen_head: the backward scales one product that the forward saves. cached: leading columns whose exponentials,
    or logits, are kept for the backward, which overwrites logits where it may (``in_place``).
    """

    head: Head
    frozen_head: bool
    cached: int
    in_place: bool


def apply_logprob(call: HeadCall) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """logp (n, K) with 0 for targets that do not count, lse, entropy, argmax (n,) or None, of the active rows."""
    head, in_place = call.head, not call.traced
    # Only hidden needs a gradient, of one target: one [N, D] product serves every upstream gradient.
    frozen_head = head.needs == HIDDEN_ALONE and head.stores_exp
    cached = cached_columns(head, in_place=in_place) if any(head.needs) and not frozen_head else 0
    logp_NK, *others = _logprob(LogprobArguments(head, frozen_head, cached, in_place), call.traced)
    return logp_NK.where(call.active_NK, 0.0), *others


def _forward(arguments: LogprobArguments) -> Forward:
    head, options, cached = arguments.head, arguments.head.options, arguments.cached
    exp, cached_NC = head.stores_exp, None
    if arguments.frozen_head:
        stats, gradients = exp_pass(head, None)
    else:
        cached_NC = new_cached(head, cached) if cached else None  # rows end in zeros
        stats = forward_pass(head, cached_NC[:, :cached] if cached else None, exp=exp)
    entropy_N = stats.entropy_N if options.entropy else None
    lse_N = stats.lse_N if options.lse else None
    outputs = stats.logp_NK(options.label_smoothing, head.v), lse_N, entropy_N, stats.argmax_N
    if arguments.frozen_head:
        product_ND = gradients.dhidden_ND
        reads = replace(arguments, head=replace(head, hidden_ND=product_ND))  # of hidden's shape and dtype
        return Forward(outputs, (torch.stack(stats.of_label), None, product_ND), reads)
    if exp:
        return Forward(outputs, (torch.stack(stats.of_label), None, cached_NC), arguments)
    return Forward(outputs, (stats.norms_2N, entropy_N, None), arguments, once=cached_NC)


def _shapes(arguments: LogprobArguments) -> Forward:
    head, options, cached = arguments.head, arguments.head.options, None
    if arguments.frozen_head:
        cached = head.hidden_ND.new_empty(head.hidden_ND.shape)
    elif arguments.cached:
        cached = new_cached(head, arguments.cached)
    wide = head.wide

    def new(*shape: int, asked: bool = True, dtype: torch.dtype = wide) -> Tensor | None:
        return head.hidden_ND.new_empty(shape, dtype=dtype) if asked else None

    lse_N, argmax_N = new(head.n, asked=options.lse), new(head.n, asked=options.argmax, dtype=torch.int64)
    outputs = new(*head.labels_NK.shape), lse_N, new(head.n, asked=options.entropy), argmax_N
    if head.stores_exp:
        return Forward(outputs, (new(4, head.n), None, cached))
    return Forward(outputs, (new(2, head.n), new(head.n, asked=options.entropy), None), once=cached)


def _backward(arguments: LogprobArguments, saved: Tensors, upstream: Tensors, once: Tensor | None) -> Tensors:
    head, (statistics, entropy_N, cached) = arguments.head, saved
    coefficients = coefficients_of(head, upstream, statistics, entropy_N)
    if arguments.frozen_head:
        return frozen_gradient(head, cached, statistics, coefficients), *(None,) * 4
    cached = once if cached is None else cached
    cached_NC = None if cached is None else cached[:, : arguments.cached]
    gradients = vocabulary_pass(head, statistics, coefficients, cached_NC, in_place=arguments.in_place)
    return gradients.like(head.tensors)


def coefficients_of(head: Head, upstream: Tensors, like: Tensor, entropy_N: Tensor | None) -> RowCoefficients:
    """From the gradients of logp, lse, entropy and argmax."""
    dlogp_NK, dlse_N, dentropy_N, _ = upstream
    if dlogp_NK is None:
        dlogp_NK = like.new_zeros(head.labels_NK.shape)
    smoothing = head.options.label_smoothing
    return RowCoefficients.from_upstream(dlogp_NK, smoothing, head.v, dlse_N, dentropy_N, entropy_N)


_logprob = define_op("logprob", LogprobArguments, _forward, _backward, _shapes, outputs=4)
