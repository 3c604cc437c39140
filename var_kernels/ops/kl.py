"""``linear_token_kl``: the divergence between two models' next-token distributions, over the whole vocabulary."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from var_kernels.ops import checks
from var_kernels.ops.define import Forward, define_op, gradient_shapes
from var_kernels.ops.engines import new_cached
from var_kernels.ops.head import HeadCall, HeadPair, Tensors, model_head, prepare
from var_kernels.ops.kl_engine import (
    divergence_pass,
    gradient_chunk_pass,
    recomputed_gradients,
    stored_gradient_pass,
    stored_gradients,
)
from var_kernels.ops.plan import way_of_gradients, with_default_budget
from var_kernels.ops.signatures import DIRECTIONS, ENGINES, Direction, Engine, RowKeywords, names_options

_IGNORED = -100


@names_options
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
    beta: float = 0.5,
    token_weight: Tensor | None = None,
    reduction: Literal["none", "sum"] = "none",
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    ref_temperature: float = 1.0,
    ref_low_rank: tuple[Tensor, Tensor] | None = None,
    ref_grad: bool = False,
    engine: Engine = "auto",
    **options: Unpack[RowKeywords],
) -> Tensor:
    """Divergence of each token's distributions over the whole vocabulary, without either model's [N, V] logits.

        p = softmax(z), z = c(W h + b) of the policy;   q = softmax of the reference's, with its own head and options

        "reverse"   KL(p||q) = sum_v p_v (log p_v - log q_v)     dKL/dz_v = p_v (log p_v - log q_v - KL)
        "forward"   KL(q||p) = sum_v q_v (log q_v - log p_v)     dKL/dz_v = p_v - q_v
        "jsd"       beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p
                                                   d/dz_v = (1 - beta) p_v (log p_v - log m_v - KL(p||m))

    "reverse" is the KL(policy || reference) of RLHF, exact where ``kl_k1`` ... ``kl_k3`` estimate it from one token;
    "forward" is distillation from the reference as teacher; "jsd" the generalised Jensen-Shannon divergence of GKD:
    divided by beta it goes to "forward" as beta goes to 0, divided by 1 - beta to "reverse" as beta goes to 1.
    Gradients go to the policy's hidden, weight, bias and low-rank factors; the reference is a constant, also where its
    tensors require gradients, unless ``ref_grad``.

    GEMMs: 2 forward; 4 in all where ``workspace_mb`` holds the gradient in all logits in the operands' dtype, where
    nothing but ``hidden`` learns, and for reduction "sum" where it holds an fp32 dW; else the backward recomputes both
    models' logits slice by slice (6 in all). Peak extra memory: ``workspace_mb``, and in the backward an fp32 [N, D].

    Args:
        hidden, lm_head_weight, bias: (..., D), (V, D), (V,) of the policy, one dtype, a bias of fp32 beside 16 bit; any
            strides.
        ref_hidden, ref_lm_head_weight, ref_bias: (..., D_ref), (V, D_ref), (V,) of the reference, one dtype, which may
            be another one, as D_ref may be another size. The vocabulary must be the same, id by id.
        labels: (...) which rows count: int64 labels with ``ignore_index``, or bool, True where the row counts; None:
            all. What a label says is not used. Rows that do not count cost nothing.
        direction: "reverse", "forward" or "jsd", as above.
        beta: the teacher's share of the mixture of "jsd", between 0 and 1, neither.
        token_weight: (...) floating point, any sign, finite where the row counts, multiplies each token's KL; None: 1.
            Differentiable.
        reduction: "none": a KL for each token, for any upstream gradient; "sum": the weighted sum.
        logit_scale, softcap, temperature, low_rank; ref_*: see ``linear_logprob``; nothing is taken over from the
            policy. A policy that is its reference and a LoRA adapter of the head passes low_rank alone.
        workspace_mb: MiB for tiles of both models' logits; None: half of lm_head_weight's size and at least 64 on a
            CPU, 1/32 of the memory of an accelerator. Where a head of 16 bit learns, the gradient in all logits more,
            2 N V bytes, or where an fp32 dW (4 V D bytes) is less and the reduction "sum", that and on a CPU twice the
            tiles.
        num_active, precision: see ``linear_logprob``.
        ref_grad: gradients go to the reference's tensors too. A second call with the roles exchanged makes them, so
            that each of the two takes the GEMMs above.
        engine: "auto", "one_pass" or "two_pass"; "auto" takes two passes for fp16.

    Returns:
        "none": the shape of labels, nats per token, >= 0 before the weight, 0 where a row does not count. "sum": a
        scalar. fp32 (fp64 if either model is fp64). Where q forbids (-inf) what p allows, KL(p||q) is inf and
        the policy's gradient NaN; KL(q||p) and the mixture's are finite, and vice versa. With ``ref_grad`` the
        reference's gradient of KL(p||q), q - p in its logits, is finite there too. An all-ignored batch gives a
        differentiable 0.

    Raises:
        TypeError, ValueError: argument, what was expected, what came, the remedy.
    """
    checks.check_choice("reduction", reduction, ("none", "sum"))
    checks.check_choice("engine", engine, ENGINES)
    if engine == "one_pass" and reduction == "none":
        raise ValueError("engine='one_pass' needs one scalar, got reduction='none'; use engine='auto'")
    options = checks.complete_options("linear_token_kl", options, RowKeywords)
    given = (ref_logit_scale, ref_softcap, ref_temperature, ref_low_rank)
    of_ref: dict[str, Any] = dict(zip(_OF_A_MODEL, given, strict=True))
    if ref_grad and torch.is_grad_enabled():
        own = {name: value for name, value in options.items() if name in _OF_A_MODEL}
        policy = (hidden, lm_head_weight, bias, own)
        reference = (ref_hidden, ref_lm_head_weight, ref_bias, of_ref)
        shared: dict[str, Any] = {"labels": labels, "reduction": reduction, "engine": engine}
        shared |= {name: options[name] for name in ("ignore_index", "num_active", "workspace_mb", "precision")}
        kl = _one_sided(policy, reference, direction=direction, beta=beta, token_weight=token_weight, **shared)
        weight = None if token_weight is None else token_weight.detach()
        exchanged = {"direction": _EXCHANGED[direction], "beta": 1 - beta, "token_weight": weight}
        return _GradientsOfBoth.apply(kl, _one_sided(reference, policy, **exchanged, **shared))
    tensors = (hidden, lm_head_weight, ref_hidden, ref_lm_head_weight, labels, bias, ref_bias)
    call, pair, active_N = prepare_pair(*tensors, options, of_ref, direction, beta, token_weight=token_weight)
    known = reduction == "sum"
    if options["workspace_mb"] is None:
        pair = with_default_budget(pair, known)
    weight_N = active_N.to(pair.math)
    if token_weight is not None:
        weight_N = call.select_targets(token_weight).squeeze(1).to(pair.math).where(active_N, 0.0)
    way = way_of_gradients(pair, engine, known)
    given = pair.head, pair.ref, direction, pair.beta
    if way == "known":
        return _weighted_kl(WeightedKLArguments(*given, weight_N, active_N), call.traced)[0]
    (kl_N,) = _unweighted_kl(TokenKLArguments(*given, way), call.traced)
    kl_N = kl_N.where(active_N, 0.0)
    kl_N = kl_N if token_weight is None else kl_N * weight_N
    return kl_N.sum() if reduction == "sum" else call.restore(kl_N)


_OF_A_MODEL = ("logit_scale", "softcap", "temperature", "low_rank")
# The divergence of which the reference is the policy, and the value the same; of "jsd" with 1 - beta.
_EXCHANGED = {"reverse": "forward", "forward": "reverse", "jsd": "jsd"}


def _one_sided(policy, reference, **options) -> Tensor:
    """``linear_token_kl`` of two models: (hidden, lm_head_weight, bias, options) each."""
    (hidden, lm_head_weight, bias, own), (ref_hidden, ref_lm_head_weight, ref_bias, others) = policy, reference
    of_ref = {f"ref_{name}": value for name, value in others.items()}
    tensors = {"lm_head_weight": lm_head_weight, "ref_hidden": ref_hidden, "ref_lm_head_weight": ref_lm_head_weight}
    return linear_token_kl(hidden, bias=bias, ref_bias=ref_bias, **tensors, **own, **of_ref, **options)


class _GradientsOfBoth(torch.autograd.Function):
    """One of two equal values, with the gradients of both. (Adding one less itself would make NaN of inf.)"""

    @staticmethod
    def forward(ctx, value, equal):
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream, upstream


def prepare_pair(
    hidden,
    lm_head_weight,
    ref_hidden,
    ref_lm_head_weight,
    labels,
    bias,
    ref_bias,
    options,
    of_ref,
    direction,
    beta,
    **checked,
) -> tuple[HeadCall, HeadPair, Tensor]:
    """The call over the active rows, both models' heads, and which of these rows count (N,). options: of the policy;
    of_ref: of the reference alone; checked: ``token_weight`` and ``vocabulary`` of ``prepare``.
    """  # fmt: skip
    checks.check_choice("direction", direction, DIRECTIONS)
    checks.check_number("beta", beta)
    if not 0.0 < beta < 1.0:
        limits = "its limits are direction='forward' (0) and 'reverse' (1)"
        raise ValueError(f"beta must lie between 0 and 1, got {beta}; {limits}")
    labels, options["ignore_index"] = _row_labels(hidden, labels, options["ignore_index"])
    of_ref = {**options, **of_ref}
    call = prepare(hidden, lm_head_weight, labels, bias, options, **checked)
    _check_reference(hidden, lm_head_weight, ref_hidden, ref_lm_head_weight, ref_bias, of_ref)
    head = replace(call.head, labels_NK=call.head.labels_NK[:, :0])
    tensors = ref_hidden, ref_lm_head_weight, ref_bias, *(of_ref["low_rank"] or (None, None))
    constants = [None if t is None else t.detach() for t in tensors]
    active_N1 = call.active_NK.any(1, keepdim=True) if call.masked else None
    ref = model_head(constants, of_ref, head.labels_NK, call.rows, active_N1, "ref_")
    return call, HeadPair(head, ref, direction, float(beta)), call.active_NK.squeeze(1)


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


def _check_reference(hidden, lm_head_weight, ref_hidden, ref_lm_head_weight, ref_bias, options) -> None:
    checks.check_head_options(options, "ref_")
    checks.check_model(ref_hidden, ref_lm_head_weight, ref_bias, prefix="ref_")
    (v, d_ref), leading = ref_lm_head_weight.shape, hidden.shape[:-1]
    if ref_hidden.device != hidden.device:
        raise checks.misplaced("ref_hidden", ref_hidden, "hidden", hidden)
    if v != lm_head_weight.shape[0]:
        raise ValueError(
            f"ref_lm_head_weight must have shape ({lm_head_weight.shape[0]}, D_ref), the vocabulary of lm_head_weight, "
            f"got {(v, d_ref)}; both models need one tokenizer (drop padding rows: W[:v])"
        )
    if ref_hidden.shape[:-1] != leading:
        raise ValueError(
            f"ref_hidden must have shape {(*leading, d_ref)}, the rows of hidden and the width of ref_lm_head_weight, "
            f"got {tuple(ref_hidden.shape)}"
        )
    if options["low_rank"] is not None:
        checks.check_low_rank(options["low_rank"], ref_hidden, ref_lm_head_weight, options["workspace_mb"], "ref_")


@dataclass
class TokenKLArguments(HeadPair):
    """way: what the forward saves; "frozen": the gradient in hidden, which the backward scales; "stored": that in all
    logits; "recomputed": the statistics alone.
    """

    way: str


def _forward(pair: TokenKLArguments) -> Forward:
    """Divergences (N,)."""
    if pair.way == "frozen":
        kl_N, gradients = gradient_chunk_pass(pair, pair.ones())
        return Forward((kl_N,), gradients[:1], None)
    if pair.way == "stored":
        kl_N, stored_NV = stored_gradient_pass(pair)
        return Forward((kl_N,), (stored_NV,), pair)
    state_6N = divergence_pass(pair)
    return Forward((pair.divergence(state_6N),), (state_6N,), pair)


def _shapes(pair: TokenKLArguments) -> Forward:
    head, way = pair.head, pair.way
    if way == "frozen":
        saved = head.hidden_ND.new_empty(head.hidden_ND.shape)
    else:
        saved = new_cached(head, head.v, head.operand) if way == "stored" else pair.empty_state()
    return Forward((pair.ones(),), (saved,))


def _backward(pair: TokenKLArguments | None, saved: Tensors, upstream: Tensors, _: None) -> Tensors:
    (stored,), (dkl_N,) = saved, upstream
    if pair is None or pair.way == "frozen":
        return (dkl_N.unsqueeze(1) * stored).to(stored.dtype), *(None,) * 4
    gradients = stored_gradients if pair.way == "stored" else recomputed_gradients
    return gradients(pair, stored, dkl_N).like(pair.head.tensors)


@dataclass
class WeightedKLArguments(HeadPair):
    weight_N: Tensor
    active_N: Tensor


def _forward_weighted(pair: WeightedKLArguments) -> Forward:
    """The sum of weight_N kl_N, with finished gradients."""
    kl_N, gradients = gradient_chunk_pass(pair, pair.weight_N)
    kl_N = kl_N.where(pair.active_N, 0.0)
    return Forward(((pair.weight_N * kl_N).sum(),), (*gradients, kl_N))


def _shapes_weighted(pair: WeightedKLArguments) -> Forward:
    weight_N = pair.weight_N
    return Forward((weight_N.new_empty(()),), (*gradient_shapes(pair.head), torch.empty_like(weight_N)))


_unweighted_kl = define_op("token_kl", TokenKLArguments, _forward, _backward, _shapes, outputs=1)
_weighted_kl = define_op(
    "weighted_kl", WeightedKLArguments, _forward_weighted, None, _shapes_weighted, outputs=1, learns=("weight_N",)
)
