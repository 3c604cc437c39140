"""``linear_logprob``: log-probabilities of given tokens from hidden states and the lm_head, differentiable for any
upstream gradient.
"""

from typing import Any

import torch
from torch import Tensor

from var_kernels.ops import compiled, frozen
from var_kernels.ops.call import HeadCall, prepare
from var_kernels.ops.engines import forward_pass, kept_columns, vocabulary_pass
from var_kernels.ops.first_order import first_order
from var_kernels.ops.head import Head, Needs


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
    precision: str = "fp32",
) -> Any:
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
        bias: (V,), hidden's dtype; -inf forbids a token (under a softcap it is only lowered to -softcap).
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
    """logp (n, K) with 0 for targets that do not count, lse, entropy, argmax (n,) or None, of the kept rows."""
    head = (*call.tensors, call.labels_NK)
    options = call.options
    if call.traced:
        others = (options.entropy, options.argmax)
        logp_NK, lse_N, entropy_N, argmax_N = compiled.logprob(*head, *compiled.flat_options(options), *others)
        lse_N = lse_N if options.lse else None
        entropy_N = entropy_N if options.entropy else None
        argmax_N = argmax_N if options.argmax else None
    else:
        logp_NK, lse_N, entropy_N, argmax_N = LinearLogprobFunction.apply(*head, options, call.needs)
    return logp_NK.where(call.kept_NK, 0.0), lse_N, entropy_N, argmax_N


class LinearLogprobFunction(torch.autograd.Function):
    """(the five of ``HeadCall.tensors``, labels_NK, options, needs) -> logp_NK, lse_N, entropy_N, argmax_N.

    Saves lse and entropy and recomputes logits in the backward, but for those that the budget holds: the first
    backward uses them up. With a frozen head it saves dlogp/dhidden instead.
    """

    @staticmethod
    def forward(ctx, *args):
        *tensors, labels_NK, options, needs = args
        ctx.set_materialize_grads(False)
        head = Head.of(tensors, labels_NK, options)
        ctx.needs, ctx.options = needs, options
        ctx.frozen_head = _is_frozen_head(head, needs)
        ctx.kept_NC = None
        if ctx.frozen_head:
            stats, gradients = frozen.frozen_head_pass(head, lambda rows, _: head.coefficients(_ones(head, rows)))
            ctx.save_for_backward(gradients.dhidden_ND)
        else:
            kept = kept_columns(head) if needs else 0
            ctx.kept_NC = head.new_tile(head.n, kept).view(head.n, kept) if kept else None
            stats = forward_pass(head, ctx.kept_NC)
        lse_N, entropy_N = stats.lse_N, stats.entropy_N if options.entropy else None
        if needs and not ctx.frozen_head:
            ctx.save_for_backward(*tensors, labels_NK, lse_N, entropy_N)
        if stats.argmax_N is not None:
            ctx.mark_non_differentiable(stats.argmax_N)
        return stats.logp_NK(options.label_smoothing, head.v), lse_N if options.lse else None, entropy_N, stats.argmax_N

    @staticmethod
    @first_order
    def backward(ctx, dlogp_NK, dlse_N, dentropy_N, _):
        no_others = (None,) * 3
        if dlogp_NK is None and dlse_N is None and dentropy_N is None:
            return (*(None,) * 5, *no_others)
        if ctx.frozen_head:
            (dlogp_dhidden_ND,) = ctx.saved_tensors
            return ((dlogp_NK * dlogp_dhidden_ND).to(dlogp_dhidden_ND.dtype), *(None,) * 4, *no_others)
        *tensors, labels_NK, lse_N, entropy_N = ctx.saved_tensors
        head = Head.of(tensors, labels_NK, ctx.options)
        if dlogp_NK is None:
            dlogp_NK = torch.zeros(labels_NK.shape, dtype=lse_N.dtype, device=lse_N.device)
        coefficients = head.coefficients(dlogp_NK, dlse_N, dentropy_N, entropy_N)
        kept_NC, ctx.kept_NC = ctx.kept_NC, None
        gradients = vocabulary_pass(head, ctx.needs, lse_N, coefficients, kept_NC).cast(head.operand, head.factor)
        return (*gradients.tensors, *no_others)


def _ones(head: Head, rows: slice) -> Tensor:
    dtype = torch.float64 if head.operand == torch.float64 else torch.float32
    return torch.ones(rows.stop - rows.start, 1, dtype=dtype, device=head.hidden_ND.device)


def _is_frozen_head(head: Head, needs: Needs) -> bool:
    """Only hidden needs a gradient, and only through logp of one target: one [N, D] product serves every upstream
    gradient.
    """
    return frozen.serves(head, needs) and not head.options.lse
