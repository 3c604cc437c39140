"""``linear_logprob``: log-probabilities of given tokens from hidden states and the lm_head, differentiable for any
upstream gradient.
"""

from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from var_kernels.kernels.rows import RowStats
from var_kernels.ops.call import HeadCall, prepare
from var_kernels.ops.compiled import OpCall, gradient_shapes, registered
from var_kernels.ops.engines import cached_columns, exp_pass, forward_pass, frozen_gradient, new_cached, vocabulary_pass
from var_kernels.ops.first_order import first_order
from var_kernels.ops.head import Head, accumulation_dtype
from var_kernels.ops.signatures import LogprobKeywords, Precision


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


def linear_logprob(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    low_rank: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    num_active: int | None = None,
    workspace_mb: float | None = None,
    precision: Precision = "fp32",
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
        num_active: at least the number of rows with a label, when the caller knows it: nothing is read from the device
            then, also under torch.compile and CUDA-graph capture, and only that many rows are computed. Too small a
            count is an error (on an accelerator a device-side assertion).
        workspace_mb: MiB for tiles of logits; None: half of lm_head_weight's size and at least 64 on a CPU, 1/32 of the
            memory of an accelerator. 0: no tiles, logits stay in registers (Triton backend, no gradients: a backward
            needs 1 or more there).
        precision: "fp32": logits in fp32 (fp64 for fp64 inputs); "fast": logits rounded to hidden's dtype, log-prob
            errors up to 0.03 in bf16.

    Returns:
        logp, the shape of labels, fp32 (fp64 for fp64), nats, 0 where ignored. If asked for, a tuple with lse (...) and
        entropy (...), nats, 0 for rows without a label, and argmax (...) int64, -1 for those rows; in this order.

    Raises:
        TypeError, ValueError: argument, what was expected, what came, the remedy. On a CPU labels out of range too; an
            accelerator is not read, there such labels give NaN.
    """
    call = prepare(
        hidden,
        lm_head_weight,
        labels,
        bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        label_smoothing=label_smoothing,
        precision=precision,
        workspace_mb=workspace_mb,
        num_active=num_active,
        low_rank=low_rank,
        lse=return_lse,
        entropy=return_entropy,
        argmax=return_argmax,
    )
    logp_NK, lse_N, entropy_N, argmax_N = apply_logprob(call)
    outputs = [call.restore_targets(logp_NK)]
    outputs += [call.restore(t) for t in (lse_N, entropy_N) if t is not None]
    if argmax_N is not None:
        outputs.append(call.restore(argmax_N, fill=-1))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def apply_logprob(call: HeadCall) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """logp (n, K) with 0 for targets that do not count, lse, entropy, argmax (n,) or None, of the active rows."""
    head, options = call.head, call.head.options
    frozen_head = _is_frozen_head(head)
    cached = cached_columns(head, in_place=not call.traced) if head.needs.some and not frozen_head else 0
    if call.traced:
        op_call = OpCall([*head.tensors, head.labels_NK], options, head.needs, sizes=[cached], flags=[frozen_head])
        logp_NK, lse_N, entropy_N, argmax_N, *_ = _logprob_op(op_call)
        lse_N = lse_N if options.lse else None
        entropy_N = entropy_N if options.entropy else None
        argmax_N = argmax_N if options.argmax else None
    else:
        logp_NK, lse_N, entropy_N, argmax_N = LinearLogprobFunction.apply(head, *head.tensors, frozen_head, cached)
    return logp_NK.where(call.active_NK, 0.0), lse_N, entropy_N, argmax_N


def _is_frozen_head(head: Head) -> bool:
    """Only hidden needs a gradient, of one target: one [N, D] product serves every upstream gradient."""
    return head.needs.hidden_alone and head.stores_exp


def _forward(head: Head, frozen_head: bool, cached: int) -> tuple[RowStats, Tensor, Tensor | None]:
    """Statistics, and what is saved for the backward: their part of it; the product of a frozen head, else the cached
    columns.
    """
    if frozen_head:
        stats, gradients = exp_pass(head, None)
        return stats, stats.saved_4N, gradients.dhidden_ND
    exp = head.stores_exp
    cached_NC = new_cached(head, cached) if cached else None
    stats = forward_pass(head, None if cached_NC is None else cached_NC[:, :cached], exp=exp)
    return stats, stats.saved_4N if exp else stats.norms_2N, cached_NC


def _backward(
    head: Head,
    saved: Tensor,
    entropy_N: Tensor | None,
    upstream: tuple[Tensor | None, ...],
    product_or_cached: Tensor | None,
    *,
    frozen_head: bool,
    in_place: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``Head.tensors`` under the upstream gradients of logp, lse and entropy."""
    dlogp_NK, dlse_N, dentropy_N = upstream
    if dlogp_NK is None:
        dlogp_NK = torch.zeros(head.labels_NK.shape, dtype=saved.dtype, device=saved.device)
    coefficients = head.coefficients(dlogp_NK, dlse_N, dentropy_N, entropy_N)
    if frozen_head:
        return frozen_gradient(head, product_or_cached, saved, coefficients), *(None,) * 4
    gradients = vocabulary_pass(head, saved, coefficients, product_or_cached, in_place=in_place)
    return gradients.like(head.tensors).tensors


class LinearLogprobFunction(torch.autograd.Function):
    """(head, ``Head.tensors``, frozen_head, cached) -> logp_NK, lse_N, entropy_N, argmax_N.

    Saves the normalisers and entropy and recomputes logits in the backward, but for ``cached`` columns: exponentials,
    or logits, which the first backward uses up. With a frozen head it saves a product in place of hidden.
    """

    @staticmethod
    def forward(ctx, *args):
        head, *tensors, frozen_head, cached = args
        options = head.options
        ctx.set_materialize_grads(False)
        ctx.head, ctx.frozen_head, ctx.cached_NC = head.without_tensors, frozen_head, None
        stats, saved, product_or_cached = _forward(head, frozen_head, cached)
        lse_N, entropy_N = stats.lse_N, stats.entropy_N if options.entropy else None
        if frozen_head:
            _, *others = tensors
            ctx.save_for_backward(product_or_cached, *others, head.labels_NK, saved, entropy_N, product_or_cached)
        elif head.needs:
            cached_NC = None if product_or_cached is None else product_or_cached[:, :cached]
            exp = head.stores_exp
            ctx.cached_NC = None if exp else cached_NC
            ctx.save_for_backward(*tensors, head.labels_NK, saved, entropy_N, cached_NC if exp else None)
        if stats.argmax_N is not None:
            ctx.mark_non_differentiable(stats.argmax_N)
        return stats.logp_NK(options.label_smoothing, head.v), lse_N if options.lse else None, entropy_N, stats.argmax_N

    @staticmethod
    @first_order
    def backward(ctx, dlogp_NK, dlse_N, dentropy_N, _):
        upstream = dlogp_NK, dlse_N, dentropy_N
        if all(g is None for g in upstream):
            return (None,) * 8
        *tensors, labels_NK, saved, entropy_N, product_or_cached = ctx.saved_tensors
        head = ctx.head.with_tensors(tensors, labels_NK)
        if product_or_cached is None:
            product_or_cached, ctx.cached_NC = ctx.cached_NC, None
        options = {"frozen_head": ctx.frozen_head, "in_place": True}
        return None, *_backward(head, saved, entropy_N, upstream, product_or_cached, **options), None, None


# ---- under torch.compile ---------------------------------------------------------------------------------------------


def _run(call: OpCall) -> list[Tensor | None]:
    """logp (N, K), lse (N,), entropy, argmax (N,) or None, saved statistics, what is saved for the backward."""
    head, options = call.head(call.tensors[5]), call.options
    stats, saved, product_or_cached = _forward(head, call.flags[0], call.sizes[0])
    entropy_N = stats.entropy_N if options.entropy else None
    return [
        stats.logp_NK(options.label_smoothing, head.v),
        stats.lse_N,
        entropy_N,
        stats.argmax_N,
        saved,
        product_or_cached,
    ]


def _shapes(call: OpCall) -> list[Tensor | None]:
    labels_NK, options = call.tensors[5], call.options
    head = call.head(labels_NK)
    wide, product_or_cached = accumulation_dtype(head.operand), None
    if call.flags[0]:
        product_or_cached = head.hidden_ND.new_empty(head.hidden_ND.shape)
    elif call.sizes[0]:
        product_or_cached = new_cached(head, call.sizes[0])
    row_N = head.hidden_ND.new_empty(head.n, dtype=wide)
    return [
        row_N.new_empty(labels_NK.shape),
        row_N,
        torch.empty_like(row_N) if options.entropy else None,
        labels_NK.new_empty(head.n) if options.argmax else None,
        row_N.new_empty(4 if head.stores_exp else 2, head.n),
        product_or_cached,
    ]


def _gradients(call: OpCall, outputs: tuple[Tensor, ...], upstream: list[Tensor | None]) -> list[Tensor]:
    _, _, entropy_N, _, saved, product_or_cached = outputs
    dlogp_NK, dlse_N, dentropy_N, *_ = upstream
    if not call.options.entropy:
        entropy_N = dentropy_N = None
    product_or_cached = product_or_cached if call.flags[0] or call.sizes[0] else None
    tensors = [*call.tensors, saved, entropy_N, product_or_cached, dlogp_NK, dlse_N, dentropy_N]
    return _logprob_backward_op(replace(call, tensors=tensors))


def _run_backward(call: OpCall) -> list[Tensor | None]:
    labels_NK, saved, entropy_N, product_or_cached, dlogp_NK, *upstream = call.tensors[5:]
    frozen_head, upstream = call.flags[0], (dlogp_NK, *upstream)
    if product_or_cached is not None and not frozen_head:
        product_or_cached = product_or_cached[:, : call.sizes[0]]
    options = {"frozen_head": frozen_head, "in_place": False}
    return list(_backward(call.head(labels_NK), saved, entropy_N, upstream, product_or_cached, **options))


_logprob_op = registered("logprob", _run, _shapes, _gradients)
_logprob_backward_op = registered("logprob_backward", _run_backward, gradient_shapes)
