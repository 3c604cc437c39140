"""``linear_token_kl``: the KL divergence between two models' next-token distributions, over the whole vocabulary."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from var_kernels.kernels.rows import LogitTransform
from var_kernels.ops import checks
from var_kernels.ops.backend import choose_backend
from var_kernels.ops.call import HeadCall, prepare
from var_kernels.ops.compiled import (
    OpCall,
    gradient_shapes,
    of_finished,
    packed_transform,
    registered,
    unpacked_transform,
)
from var_kernels.ops.first_order import first_order
from var_kernels.ops.head import Head, HeadOptions, Needs, tile_dtype
from var_kernels.ops.kl_engine import (
    HeadPair,
    kl_chunk_pass,
    kl_forward_pass,
    kl_one_pass_fits,
    kl_vocabulary_pass,
)
from var_kernels.ops.signatures import DIRECTIONS, ENGINES, Direction, Engine, Precision
from var_kernels.ops.weighted_nll import scaled_gradients, underflows

_IGNORED = -100


def linear_token_kl(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ref_hidden: Tensor,
    ref_lm_head_weight: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    direction: Direction = "reverse",
    token_weight: Tensor | None = None,
    reduction: Literal["none", "sum"] = "none",
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    low_rank: tuple[Tensor, Tensor] | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    ref_temperature: float = 1.0,
    ref_low_rank: tuple[Tensor, Tensor] | None = None,
    workspace_mb: float | None = None,
    precision: Precision = "fp32",
    engine: Engine = "auto",
) -> Tensor:
    """KL divergence of each token's distribution over the whole vocabulary, without either model's [N, V] logits.

        p = softmax(z), z = c(W h + b) of the policy;   q = softmax of the reference's, with its own head and options

        "reverse"   KL(p||q) = sum_v p_v (log p_v - log q_v)     dKL/dz_v = p_v (log p_v - log q_v - KL)
        "forward"   KL(q||p) = sum_v q_v (log q_v - log p_v)     dKL/dz_v = p_v - q_v

    "reverse" is the KL(policy || reference) of RLHF, exact where ``kl_k1`` ... ``kl_k3`` estimate it from one token;
    "forward" is distillation from the reference as teacher. Gradients go to the policy's hidden, weight, bias and
    low-rank factors; the reference is a constant, also where its tensors require gradients.

    GEMMs: 2 forward; the backward recomputes both models' logits slice by slice (6 in all), or the gradient is made in
    the forward (4 in all) for reduction "sum", and wherever nothing but ``hidden`` learns, if ``workspace_mb`` holds
    whole rows and an fp32 dW. Peak extra memory: ``workspace_mb``, and in the two-pass backward an fp32 [N, D].

    Args:
        hidden, lm_head_weight, bias: (..., D), (V, D), (V,) of the policy, one dtype, a bias of fp32 beside 16 bit; any
            strides.
        ref_hidden, ref_lm_head_weight, ref_bias: (..., D_ref), (V, D_ref), (V,) of the reference, one dtype, which may
            be another one, as D_ref may be another size. The vocabulary must be the same, id by id.
        labels: (...) which rows count: int64 labels with ``ignore_index``, or bool, True where the row counts; None:
            all. What a label says is not used. Rows that do not count cost nothing.
        direction: "reverse" or "forward", as above.
        token_weight: (...) floating point, any sign, finite where the row counts, multiplies each token's KL; None: 1.
            Differentiable.
        reduction: "none": a KL for each token, for any upstream gradient; "sum": the weighted sum.
        logit_scale, softcap, temperature, low_rank; ref_*: see ``linear_logprob``; nothing is taken over from the
            policy. A policy that is its reference and a LoRA adapter of the head passes low_rank alone.
        workspace_mb: MiB for tiles of both models' logits; None: see ``linear_logprob``.
        precision: see ``linear_logprob``.
        engine: "auto", "one_pass" or "two_pass"; "auto" takes two passes for fp16.

    Returns:
        "none": the shape of labels, nats per token, >= 0 before the weight, 0 where a row does not count. "sum": a
        scalar. fp32 (fp64 if either model is fp64). Where q forbids (-inf) what p allows, KL(p||q) is inf. An
        all-ignored batch gives a differentiable 0.

    Raises:
        TypeError, ValueError: argument, what was expected, what came, the remedy.
    """
    checks.check_choice("direction", direction, DIRECTIONS)
    checks.check_choice("reduction", reduction, ("none", "sum"))
    checks.check_choice("engine", engine, ENGINES)
    if engine == "one_pass" and reduction == "none":
        raise ValueError("engine='one_pass' needs one scalar, got reduction='none'; use engine='auto'")
    labels, ignore_index = _row_labels(hidden, labels, ignore_index)
    _check_reference(hidden, lm_head_weight, ref_hidden, ref_lm_head_weight, ref_bias, ref_low_rank, workspace_mb)
    checks.check_head_options(ref_logit_scale, ref_softcap, ref_temperature, 0.0, precision, workspace_mb)
    policy = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature, "low_rank": low_rank}
    return _token_kl(
        (hidden, lm_head_weight, labels, bias, token_weight),
        (ref_hidden, ref_lm_head_weight, ref_bias, *(ref_low_rank or (None, None))),
        {**policy, "ignore_index": ignore_index, "precision": precision, "workspace_mb": workspace_mb},
        LogitTransform(float(ref_logit_scale), ref_softcap, float(ref_temperature)),
        direction == "reverse",
        reduction,
        engine,
    )


def _token_kl(policy, reference, options: dict, transform: LogitTransform, reverse: bool, reduction: str, engine: str):
    token_weight = policy[4]
    call = prepare(*policy, label_smoothing=0.0, **options)
    head = call.head
    no_labels_NK = head.labels_NK[:, :0]
    policy = Head.of(head.tensors, no_labels_NK, head.options, head.needs)
    ref_options = _reference_options(call, reference, transform)
    ref = Head.of(_reference_rows(call, reference), no_labels_NK, ref_options, Needs())
    pair = HeadPair(policy, ref, reverse)
    active_N = call.active_NK.squeeze(1)
    weight_N = active_N.to(pair.math)
    if token_weight is not None:
        weight_N = call.select_targets(token_weight).squeeze(1).to(pair.math).where(active_N, 0.0)
    one_pass = head.needs.some and engine != "two_pass" and (engine == "one_pass" or _one_pass_serves(pair))
    if reduction == "sum" and one_pass:
        if call.traced:
            return _weighted_kl_op(_op_call(pair, [weight_N, active_N]))[0]
        return LinearWeightedKLFunction.apply(pair, *pair.tensors, weight_N, active_N)
    frozen_head = one_pass and head.needs.hidden_alone
    if call.traced:
        kl_N = _token_kl_op(_op_call(pair, [], frozen_head))[0]
    else:
        kl_N = LinearTokenKLFunction.apply(pair, *pair.tensors, frozen_head)
    kl_N = kl_N.where(active_N, 0.0)
    kl_N = kl_N if token_weight is None else kl_N * weight_N
    return kl_N.sum() if reduction == "sum" else call.restore(kl_N)


def _one_pass_serves(pair: HeadPair) -> bool:
    return not underflows(pair.policy.operand) and kl_one_pass_fits(pair)


def _row_labels(hidden: Tensor, labels: Tensor | None, ignore_index: int) -> tuple[Tensor, int]:
    """Labels that say which rows count, and what stands for those that do not."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a torch.Tensor, got {type(hidden).__name__}")
    if labels is None:
        return torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device), _IGNORED
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor or None (every row), got {type(labels).__name__}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(hidden.shape[:-1])}, one entry a row of hidden, got {tuple(labels.shape)}; "
            "align them with hidden, nothing is shifted here"
        )
    if labels.dtype == torch.bool:
        return torch.full(labels.shape, _IGNORED, device=labels.device).masked_fill_(labels, 0), _IGNORED
    return labels, ignore_index


def _check_reference(
    hidden, lm_head_weight, ref_hidden, ref_lm_head_weight, ref_bias, ref_low_rank, workspace_mb
) -> None:
    if not isinstance(lm_head_weight, Tensor):
        raise TypeError(f"lm_head_weight must be a torch.Tensor, got {type(lm_head_weight).__name__}")
    given = {"ref_hidden": ref_hidden, "ref_lm_head_weight": ref_lm_head_weight}
    if ref_bias is not None:
        given["ref_bias"] = ref_bias
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}; the reference model's own")
        checks.check_whole(name, value)
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device} but hidden is on {hidden.device}; move both to one device")
    if ref_lm_head_weight.dim() != 2 or ref_lm_head_weight.shape[0] != lm_head_weight.shape[0]:
        raise ValueError(
            f"ref_lm_head_weight must have shape ({lm_head_weight.shape[0]}, D_ref), the vocabulary of lm_head_weight, "
            f"got {tuple(ref_lm_head_weight.shape)}; both models need one tokenizer (drop padding rows: W[:v])"
        )
    v, d_ref = ref_lm_head_weight.shape
    if ref_hidden.shape != (*hidden.shape[:-1], d_ref):
        raise ValueError(
            f"ref_hidden must have shape {(*hidden.shape[:-1], d_ref)}, the rows of hidden and the width of "
            f"ref_lm_head_weight, got {tuple(ref_hidden.shape)}"
        )
    if ref_bias is not None and ref_bias.shape != (v,):
        raise ValueError(f"ref_bias must have shape ({v},), got {tuple(ref_bias.shape)}")
    checks.check_low_rank(ref_low_rank, ref_hidden, ref_lm_head_weight, workspace_mb, "ref_")
    if not _autocasts(hidden):
        checks.check_dtypes(ref_hidden, ref_lm_head_weight, ref_bias, "ref_")
        if ref_low_rank is not None:
            checks.check_low_rank_dtypes(*ref_low_rank, ref_hidden, "ref_")


def _autocasts(hidden: Tensor) -> bool:
    return hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type)


def _reference_dtype(ref_hidden: Tensor) -> torch.dtype:
    autocast = _autocasts(ref_hidden) and ref_hidden.dtype != torch.float64
    return torch.get_autocast_dtype(ref_hidden.device.type) if autocast else ref_hidden.dtype


def _reference_rows(call: HeadCall, reference) -> tuple[Tensor | None, ...]:
    """The reference's five of ``Head.tensors``: constants, of the active rows, in autocast's dtype under autocast."""
    hidden, lm_head_weight, bias, left, right = (None if t is None else t.detach() for t in reference)
    if _autocasts(hidden):
        dtype = _reference_dtype(hidden)
        hidden, lm_head_weight = hidden.to(dtype), lm_head_weight.to(dtype)
        bias, left, right = (None if t is None else t.to(dtype) for t in (bias, left, right))

    def active_rows(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        values_NX = values.reshape(call.leading.numel(), values.shape[-1])
        if call.rows is not None:
            values_NX = values_NX.index_select(0, call.rows)
        return values_NX.where(call.active_NK.any(1, keepdim=True), 0.0) if call.masked else values_NX

    return active_rows(hidden), lm_head_weight, bias, active_rows(left), right


def _reference_options(call: HeadCall, reference, transform: LogitTransform) -> HeadOptions:
    tile = tile_dtype(_reference_dtype(reference[0]), call.head.options.precision)
    backend, _ = choose_backend(reference[0].device, tile)
    return replace(call.head.options, transform=transform, backend=backend)


def _forward(pair: HeadPair, frozen_head: bool) -> tuple[Tensor, Tensor]:
    """KL (N,), and what is saved for the backward: dKL/dhidden of a frozen head, else both normalisers (4, N)."""
    if frozen_head:
        kl_N, gradients = kl_chunk_pass(pair, pair.zeros(pair.n).fill_(1.0))
        return kl_N, gradients.dhidden_ND
    return kl_forward_pass(pair)


def _of_frozen_head(dkl_N: Tensor, dkl_dhidden_ND: Tensor) -> Tensor:
    return (dkl_N.unsqueeze(1) * dkl_dhidden_ND).to(dkl_dhidden_ND.dtype)


class LinearTokenKLFunction(torch.autograd.Function):
    """(pair, ``HeadPair.tensors``, frozen_head) -> kl_N.

    Saves both normalisers and recomputes logits in the backward; with a frozen head it saves dKL/dhidden instead.
    """

    @staticmethod
    def forward(ctx, *args):
        pair, *tensors, ctx.frozen_head = args
        ctx.pair = pair.with_tensors((None,) * 10)
        kl_N, saved = _forward(pair, ctx.frozen_head)
        if ctx.frozen_head:
            ctx.save_for_backward(saved)
        elif pair.policy.needs:
            ctx.save_for_backward(*tensors, saved, kl_N)
        return kl_N

    @staticmethod
    @first_order
    def backward(ctx, dkl_N):
        if ctx.frozen_head:
            return None, _of_frozen_head(dkl_N, ctx.saved_tensors[0]), *(None,) * 10
        *tensors, norms_4N, kl_N = ctx.saved_tensors
        gradients = kl_vocabulary_pass(ctx.pair.with_tensors(tensors), norms_4N, kl_N, dkl_N)
        return None, *gradients.tensors, *(None,) * 6


class LinearWeightedKLFunction(torch.autograd.Function):
    """The sum of weight_N kl_N. Saves finished gradients; the backward gives them as they are or scales copies."""

    @staticmethod
    def forward(ctx, *args):
        pair, *_, weight_N, active_N = args
        kl_N, gradients = kl_chunk_pass(pair, weight_N)
        kl_N = kl_N.where(active_N, 0.0)
        ctx.save_for_backward(*gradients.tensors, kl_N)
        return (weight_N * kl_N).sum()

    @staticmethod
    @first_order
    def backward(ctx, dloss):
        *gradients, kl_N = ctx.saved_tensors
        weight_grad = dloss * kl_N if ctx.needs_input_grad[11] else None
        return None, *scaled_gradients(gradients, dloss), *(None,) * 5, weight_grad, None


# ---- under torch.compile ---------------------------------------------------------------------------------------------


def _op_call(pair: HeadPair, others: list[Tensor], frozen_head: bool = False) -> OpCall:
    policy, ref_options = pair.policy, pair.ref.options
    numbers, words = packed_transform(ref_options.transform), [ref_options.backend]
    tensors, flags = [*pair.tensors, *others], [pair.reverse, frozen_head]
    return OpCall(tensors, policy.options, policy.needs, numbers, flags=flags, words=words)


def _pair_of(call: OpCall) -> HeadPair:
    transform = unpacked_transform(call.numbers)
    ref_options = replace(call.options, transform=transform, backend=call.words[0])
    no_labels_NK = call.tensors[0].new_empty(call.tensors[0].shape[0], 0, dtype=torch.int64)
    ref = Head.of(call.tensors[5:10], no_labels_NK, ref_options, Needs())
    return HeadPair(call.head(no_labels_NK), ref, call.flags[0])


def _run(call: OpCall) -> list[Tensor | None]:
    """KL (N,), what is saved for the backward."""
    return list(_forward(_pair_of(call), call.flags[1]))


def _shapes(call: OpCall) -> list[Tensor | None]:
    pair, hidden_ND = _pair_of(call), call.tensors[0]
    saved = hidden_ND.new_empty(hidden_ND.shape) if call.flags[1] else pair.zeros(4, pair.n)
    return [pair.zeros(pair.n), saved]


def _gradients(call: OpCall, outputs: tuple[Tensor, ...], upstream: list[Tensor | None]) -> list[Tensor]:
    (kl_N, saved), dkl_N = outputs, upstream[0]
    if call.flags[1]:
        return [_of_frozen_head(dkl_N, saved)]
    return _token_kl_backward_op(replace(call, tensors=[*call.tensors, saved, kl_N, dkl_N]))


def _run_backward(call: OpCall) -> list[Tensor | None]:
    return list(kl_vocabulary_pass(_pair_of(call), *call.tensors[10:]).tensors)


def _run_weighted(call: OpCall) -> list[Tensor | None]:
    """The weighted sum (), KL (N,), gradients of the policy's five."""
    *_, weight_N, active_N = call.tensors
    kl_N, gradients = kl_chunk_pass(_pair_of(call), weight_N)
    kl_N = kl_N.where(active_N, 0.0)
    return [(weight_N * kl_N).sum(), kl_N, *gradients.tensors]


def _shapes_weighted(call: OpCall) -> list[Tensor | None]:
    pair = _pair_of(call)
    return [pair.zeros(), pair.zeros(pair.n), *gradient_shapes(call)]


def _gradients_weighted(call: OpCall, outputs: tuple[Tensor, ...], upstream: list[Tensor | None]) -> list[Tensor]:
    dloss, (kl_N, *gradients) = upstream[0], outputs[1:]
    return [*of_finished(gradients, dloss), *[None] * 5, dloss * kl_N]


_token_kl_op = registered("token_kl", _run, _shapes, _gradients)
_token_kl_backward_op = registered("token_kl_backward", _run_backward, gradient_shapes)
_weighted_kl_op = registered("weighted_kl", _run_weighted, _shapes_weighted, _gradients_weighted)
