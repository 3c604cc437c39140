"""The primitives as ``torch.library`` ops, for torch.compile: opaque to the compiler, shapes and gradients registered.

Under the compiler an autograd.Function is traced through, so the public functions take this way when they are being
compiled. Rows that do not count are masked, not left out: their number would have to be read from the device.
"""

import torch
from torch import Tensor

from var_kernels.kernels.rows import LogitTransform
from var_kernels.ops.backend import choose_backend
from var_kernels.ops.engines import forward_pass, one_pass, one_pass_fits, vocabulary_pass
from var_kernels.ops.head import Gradients, Head, HeadOptions, Needs, tile_dtype
from var_kernels.ops.workspace import UNKNOWN, budget_bytes


def _head(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    labels: Tensor,
    scales: list[float],
    precision: str,
    budget: int,
    entropy: bool = False,
    argmax: bool = False,
) -> Head:
    """scales: logit_scale, softcap (0: none), temperature, label_smoothing."""
    logit_scale, softcap, temperature, label_smoothing = scales
    backend, _ = choose_backend(hidden.device, tile_dtype(hidden.dtype, precision))
    transform = LogitTransform(logit_scale, softcap or None, temperature)
    budget = budget_bytes(None, lm_head_weight) if budget == UNKNOWN else budget
    options = HeadOptions(transform, label_smoothing, precision, budget, backend, entropy=entropy, argmax=argmax)
    return Head(hidden, lm_head_weight, bias, labels, options, left, right)


def flat_options(options: HeadOptions) -> tuple[list[float], str, int]:
    """(scales, precision, budget), as the ops take them."""
    transform = options.transform
    scales = [transform.logit_scale, transform.softcap or 0.0, transform.temperature, options.label_smoothing]
    return scales, options.precision, options.budget


def underflows(operand: torch.dtype) -> bool:
    """fp16 loses gradients that are made before a GradScaler's factor is known: p_v / num_items is below 6e-8."""
    return operand == torch.float16


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _none(like: Tensor) -> Tensor:
    """An op returns tensors; an empty one stands for None."""
    return like.new_empty(0)


# ---- log-probs -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("var_kernels::logprob", mutates_args=())
def logprob(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    labels: Tensor,
    scales: list[float],
    precision: str,
    budget: int,
    entropy: bool,
    argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp (N, K), lse (N,), entropy (N,) or (0,), argmax (N,) or (0,)."""
    head = _head(hidden, lm_head_weight, bias, left, right, labels, scales, precision, budget, entropy, argmax)
    stats = forward_pass(head)
    lse = stats.lse_N
    return (
        stats.logp_NK(head.options.label_smoothing, head.v),
        lse,
        stats.entropy_N if entropy else _none(lse),
        stats.argmax_N if argmax else _none(labels),
    )


@logprob.register_fake
def _(hidden, lm_head_weight, bias, left, right, labels, scales, precision, budget, entropy, argmax):
    n, wide = hidden.shape[0], _wide(hidden)
    return (
        hidden.new_empty(labels.shape, dtype=wide),
        hidden.new_empty(n, dtype=wide),
        hidden.new_empty(n if entropy else 0, dtype=wide),
        labels.new_empty(n if argmax else 0),
    )


@torch.library.custom_op("var_kernels::logprob_backward", mutates_args=())
def logprob_backward(
    dlogp: Tensor,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor,
    scales: list[float],
    precision: str,
    budget: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dhidden, dlm_head_weight, dbias, dleft, dright; an empty tensor where not needed."""
    head = _head(hidden, lm_head_weight, bias, left, right, labels, scales, precision, budget)
    coefficients = head.coefficients(dlogp.contiguous(), dlse, dentropy, entropy if dentropy is not None else None)
    return _outputs(vocabulary_pass(head, Needs(*needs), lse, coefficients).cast(head.operand, head.factor), hidden)


def _outputs(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(_none(like) if g is None else g for g in gradients.tensors)


def _fake_gradients(hidden, lm_head_weight, left, right, needs):
    shapes = [hidden.shape, lm_head_weight.shape, lm_head_weight.shape[:1]]
    shapes += [() if factor is None else factor.shape for factor in (left, right)]
    dtypes = [hidden.dtype] * 3 + [hidden.dtype if factor is None else factor.dtype for factor in (left, right)]
    return tuple(
        hidden.new_empty(shape, dtype=dtype) if needed else hidden.new_empty(0)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    )


@logprob_backward.register_fake
def _(
    dlogp,
    dlse,
    dentropy,
    hidden,
    lm_head_weight,
    bias,
    left,
    right,
    labels,
    lse,
    entropy,
    scales,
    precision,
    budget,
    needs,
):
    return _fake_gradients(hidden, lm_head_weight, left, right, needs)


def _logprob_context(ctx, inputs, output):
    *tensors, ctx.scales, ctx.precision, ctx.budget, _, _ = inputs
    _, lse, entropy, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, lse, entropy)


def _logprob_backward(ctx, dlogp, dlse, dentropy, _):
    if dlogp is None and dlse is None and dentropy is None:
        return (None,) * 11
    *tensors, labels, lse, entropy = ctx.saved_tensors
    if dlogp is None:
        dlogp = torch.zeros(labels.shape, dtype=lse.dtype, device=lse.device)
    needs = list(ctx.needs_input_grad[:5])
    gradients = logprob_backward(
        dlogp,
        dlse,
        dentropy,
        *tensors,
        labels,
        lse,
        entropy,
        ctx.scales,
        ctx.precision,
        ctx.budget,
        needs,
    )
    return (*(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *(None,) * 6)


logprob.register_autograd(_logprob_backward, setup_context=_logprob_context)


# ---- the weighted loss -----------------------------------------------------------------------------------------------


@torch.library.custom_op("var_kernels::weighted_nll", mutates_args=())
def weighted_nll(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    token_weight: Tensor,
    labels: Tensor,
    kept: Tensor,
    scales: list[float],
    z_loss: float,
    precision: str,
    budget: int,
    engine: str,
    needs: list[bool],
    argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), logp (N, K), argmax (N,) or (0,), nll (N, K), dhidden, dlm_head_weight, dbias, dleft, dright."""
    head = _head(hidden, lm_head_weight, bias, left, right, labels, scales, precision, budget, argmax=argmax)
    wanted = Needs(*needs)

    def coefficients_of(rows, stats):
        weight = token_weight[rows]
        return head.coefficients(-weight, 2 * z_loss * weight.sum(1) * stats.lse_N if z_loss else None)

    fits = not underflows(head.operand) and one_pass_fits(head, wanted)
    if wanted and (engine == "one_pass" or (engine == "auto" and fits)):
        stats, gradients = one_pass(head, wanted, coefficients_of)
    else:
        stats, gradients = forward_pass(head), Gradients()
        if wanted:
            every = slice(0, head.n)
            gradients = vocabulary_pass(head, wanted, stats.lse_N, coefficients_of(every, stats))
    logp = stats.logp_NK(head.options.label_smoothing, head.v)
    nll = z_loss * stats.lse_N.square().unsqueeze(1) - logp if z_loss else -logp
    nll = nll.where(kept, 0.0)
    return (
        (token_weight * nll).sum(),
        logp,
        stats.argmax_N if argmax else _none(labels),
        nll,
        *_outputs(gradients.cast(head.operand, head.factor), hidden),
    )


@weighted_nll.register_fake
def _(
    hidden,
    lm_head_weight,
    bias,
    left,
    right,
    token_weight,
    labels,
    kept,
    scales,
    z_loss,
    precision,
    budget,
    engine,
    needs,
    argmax,
):
    wide = _wide(hidden)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(labels.shape, dtype=wide),
        labels.new_empty(hidden.shape[0] if argmax else 0),
        hidden.new_empty(labels.shape, dtype=wide),
        *_fake_gradients(hidden, lm_head_weight, left, right, needs),
    )


def _weighted_nll_context(ctx, inputs, output):
    ctx.needs = inputs[13]
    ctx.save_for_backward(*output[3:])


def _weighted_nll_backward(ctx, dloss, *_):
    nll, *gradients = ctx.saved_tensors
    scaled = [(g * dloss).to(g.dtype) if needed else None for g, needed in zip(gradients, ctx.needs, strict=True)]
    return (*scaled, dloss * nll, *(None,) * 9)


weighted_nll.register_autograd(_weighted_nll_backward, setup_context=_weighted_nll_context)
