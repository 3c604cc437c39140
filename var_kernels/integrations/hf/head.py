"""Running a loss inside the forward of a model's own lm_head, on the hidden states that the model itself feeds it.

``head.forward`` is swapped on the output-embedding module and ``model(**inputs)`` runs as it is, so that everything
hung on the head (accelerate's offloading, FSDP's and DeepSpeed's gathering) still happens around it. Where the model
expects logits (..., V) it gets a placeholder (..., 1) of zeros; the backward of the results first passes through what
the model made of it.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from var_kernels.integrations.hf.adapters import (
    LowRank,
    check_adapter,
    inside_adapter,
    is_active,
    is_adapter,
    unwrapped,
)
from var_kernels.integrations.hf.parallel import is_dtensor, local_rows
from var_kernels.integrations.hf.quantised import computes_a_product, is_packed, own_forward

_ABSENT = object()
_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")  # torch.compile; DDP and DeepSpeed; FSDP1
_DEQUANTISE = (
    "Keep the head in floating point (modules_to_not_convert=['lm_head'], llm_int8_skip_modules=['lm_head']) or "
    "dequantise it"
)
_REPLACED = (
    ": {}, in train or eval mode. Change the hidden states before the head or the logits after "
    "it in the model's forward (a scale, a softcap, a bias), or use the model's own loss"
)


@dataclass(frozen=True)
class HeadParams:
    """What turns hidden states into logits: z = softcap * tanh(logit_scale * (W h + bias) / softcap), or no tanh; W h +
    right left where the head carries a LoRA adapter.
    """

    lm_head_weight: Tensor  # (V, D), with a group this rank's rows of it
    bias: Tensor | None  # (V,) likewise
    logit_scale: float
    softcap: float | None
    group: Any = None  # the ranks over which tensor parallelism spreads the vocabulary
    low_rank: tuple[Tensor, Tensor] | None = None  # left (B, T, R), a row for each of hidden's, and right (V, R)

    @property
    def logit_options(self) -> dict[str, Any]:
        """The keyword arguments by which the ops take the transform, and the adapter where there is one."""
        options = {"logit_scale": self.logit_scale, "softcap": self.softcap}
        return options if self.low_rank is None else {**options, "low_rank": self.low_rank}


# ---- finding the model and its head ----------------------------------------------------------------------------------


def inner_model(model: nn.Module) -> nn.Module:
    """The HF model under torch.compile, DDP, FSDP1, DeepSpeed and PEFT wrappers: the module that owns the lm_head."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a model, got {type(model).__name__}; load it first: "
            "AutoModelForCausalLM.from_pretrained(...)"
        )
    # Looked up among the children: several wrappers answer for any attribute of what they wrap.
    while wrapped := next((model._modules[name] for name in _WRAPPED if model._modules.get(name) is not None), None):
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise TypeError(
                "model: nn.DataParallel runs copies in threads; wrap it in DistributedDataParallel (torchrun)"
            )
        model = wrapped
    if callable(getattr(model, "get_base_model", None)):
        return inner_model(model.get_base_model())
    if not callable(getattr(model, "get_output_embeddings", None)):
        raise TypeError(
            "model: expected a transformers model with get_output_embeddings(), or a wrapper of one, got "
            f"{type(model).__name__}"
        )
    return model


def find_head(inner: nn.Module) -> nn.Linear:
    """The nn.Linear that makes the logits, or PEFT's LoRA layer around one; of a head in modules_to_save its active
    copy. Others are refused.
    """
    name = type(inner).__name__
    head = inner.get_output_embeddings()
    if head is None:
        head = _only_head_within(inner)
    head = getattr(head, "_orig_mod", head)  # torch.compile
    head = unwrapped(head)
    head = getattr(head, "_fsdp_wrapped_module", head)
    if head is None:
        raise ValueError(
            f"{name} has no output embedding (get_output_embeddings() is None): it is not a causal LM, but a base "
            "model or a classifier; load it by AutoModelForCausalLM, or the class with a language-model head"
        )
    if is_adapter(head):
        check_adapter(head, name)
        _check_linear(head.base_layer, name)
    else:
        _check_linear(head, name)
    return head


def vocabulary_size(head: nn.Linear) -> int:
    return head_sizes(head)[0]


def head_sizes(head: nn.Linear) -> tuple[int, int]:
    """(V, D), also of a sharded or packed weight. PEFT's tied copy of an embedding gives its own sizes turned round."""
    turned = (head.in_features, head.out_features)
    return turned if turned == tuple(head.weight.shape) else turned[::-1]


def _check_linear(head: nn.Module, name: str) -> None:
    if isinstance(head, nn.Embedding) or not isinstance(head, nn.Linear):
        kind, remedy = type(head).__name__, "Use the model's own loss instead"
        if hasattr(head, "in_features") or hasattr(head, "infeatures"):  # torch.ao, HQQ, AWQ; GPTQ
            kind, remedy = f"{type(head).__module__}.{kind}", _DEQUANTISE
        raise ValueError(f"{name}: expected its output embedding to be one nn.Linear, got {kind}. {remedy}")
    if "_var_kernels_busy" in vars(head):
        return  # its forward is ours now; it was looked at before
    packed = is_packed(head.weight)
    # FSDP2 and parametrizations derive a class at run time with nn.Linear's forward.
    replaced = own_forward(head) is not None
    replaced &= getattr(head, "out_additional_features", None) != 0  # Idefics: two weights, of which one is none
    if (packed or replaced) and not computes_a_product(head):
        why = _REPLACED.format(getattr(own_forward(head), "__qualname__", own_forward(head)))
        raise ValueError(
            f"{name}: its lm_head must compute W h + b, got a {type(head).__name__} of {head.weight.dtype} whose "
            f"forward computes something else{f' (a quantised head?). {_DEQUANTISE}' if packed else why}"
        )


def _only_head_within(inner: nn.Module) -> nn.Module | None:
    """The output embedding of a part of the model (BLIP's text decoder) where all parts that have one agree on it."""
    heads = {}
    for module in inner.modules():
        if module is not inner and callable(getattr(module, "get_output_embeddings", None)):
            found = module.get_output_embeddings()
            if found is not None:
                heads[id(found)] = found
    return next(iter(heads.values())) if len(heads) == 1 else None


# ---- running inside the head -----------------------------------------------------------------------------------------


@contextmanager
def swapped(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    """``owner.name = value`` inside the block; afterwards the instance attribute that was there before, or none."""
    before = owner.__dict__.get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def swapped_head(head: nn.Linear, forward: Callable[[Tensor], Any]) -> Iterator[None]:
    """``head(hidden)`` runs ``forward(hidden)`` inside the block, between whatever hooks the head carries."""
    mine = object()
    if head.__dict__.setdefault("_var_kernels_busy", mine) is not mine:  # one step: threads may race
        raise RuntimeError(
            "this lm_head is captured already: a loss run inside the head must not call the model again, nor two "
            "threads (nn.DataParallel's among them) take losses of one model at a time; use DistributedDataParallel"
        )
    try:
        with swapped_forward(head, forward):
            yield
    finally:
        del head._var_kernels_busy


# Runs eagerly in a compiled model, and so does what it puts in place: a swap is nothing that a graph can hold.
@_disable_dynamo
def swapped_forward(module: nn.Module, forward: Callable):
    """``module(...)`` runs ``forward`` inside the block, between whatever hooks the module carries; in other threads,
    which may generate meanwhile, it runs as ever.
    """
    # accelerate's device_map hooks replace .forward and bring the weight to its device before they call _old_forward.
    name = "_old_forward" if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward") else "forward"
    plain, thread = getattr(module, name), threading.get_ident()

    @_disable_dynamo
    def here(*args, **kwargs):
        if not args and "input" in kwargs:  # nn.Linear's own name of it
            args = (kwargs.pop("input"),)
        return (forward if threading.get_ident() == thread else plain)(*args, **kwargs)

    return swapped(module, name, here)


@contextmanager
def head_results(
    inner: nn.Module,
    head: nn.Linear,
    fn: Callable[[Tensor], Any],
    *,
    wide: bool = False,
    spread: bool = False,
    low_rank: bool = False,
    as_logits: bool = False,
) -> Iterator[list[Tensor]]:
    """Inside the block the head computes ``fn(hidden)`` in place of logits; the yielded list gets its result(s).

    The placeholder is (B, T, 1) zeros, or with ``wide`` (B, T, V) on the meta device, which takes no memory. With
    ``spread`` fn knows a head whose vocabulary is spread over ranks, with ``low_rank`` one with a LoRA adapter;
    otherwise these are refused.

    With ``as_logits`` the head returns what fn returns, and may be called several times.

    Pass them on through ``tied``: only then does their backward come after the hooks on the outputs of head and model.
    """
    results: list[Tensor] = []

    def forward(hidden, *_args, adapter_names=None, **_kwargs):
        if adapter_names is not None:
            raise ValueError("adapter_names: an adapter for each row is not understood; use one set_adapter for all")
        if is_active(head) and not low_rank:
            raise ValueError(
                f"{type(inner).__name__}: its lm_head carries a LoRA adapter, which this loss does not know: it must "
                "pass on HeadParams.logit_options (capture(..., low_rank=True)); or merge it, or leave the head out"
            )
        if results:
            raise ValueError(
                f"{type(inner).__name__} calls its lm_head more than once a forward pass, which is not understood"
            )
        if is_dtensor(head.weight) and not spread:
            raise ValueError(
                f"{type(inner).__name__}: the lm_head weight is a DTensor inside its own forward (a tensor-parallel "
                "head), which fused_lm_head, token_logprobs and sequence_logprobs understand, this loss does not: "
                "leave lm_head out of the tensor-parallel plan"
            )
        hidden, restore = local_rows(hidden)

        def compute(hidden: Tensor, factors: LowRank | None) -> Tensor:
            with swapped(head, "_var_kernels_low_rank", factors):
                output = fn(hidden)
            if as_logits:
                return output
            results.extend(output if isinstance(output, tuple) else (output,))
            # One result of each graph node is enough to make the node wait for the placeholder's gradient.
            nodes = {r.grad_fn: r for r in reversed(results) if r.grad_fn is not None}
            return placeholder(head, hidden, wide, *nodes.values())

        if is_adapter(head):
            return restore(inside_adapter(head, hidden, type(inner).__name__, compute, swapped_forward))
        return restore(compute(hidden, None))

    with swapped_head(head, forward):
        yield results


def tied(results: list[Tensor], logits: Tensor | None) -> tuple[Tensor, ...]:
    """The results, unchanged, their backward going first through ``logits`` (what the model made of the placeholder).

    The pre-backward hooks of FSDP and DeepSpeed sit there: they bring back the sharded weight that the results need.
    """
    if isinstance(logits, Tensor) and logits.requires_grad:
        logits = logits.to_local() if is_dtensor(logits) else logits
        return _Tie.apply(logits, *results)
    return tuple(results)


def capture(
    model: nn.Module,
    fn: Callable[[Tensor, HeadParams], Any],
    inputs: Mapping[str, Any],
    *,
    spread: bool = False,
    low_rank: bool = False,
) -> tuple[tuple[Tensor, ...], Any]:
    """Run ``model(**inputs)`` with ``fn(hidden, head_params)`` computed inside the lm_head's forward instead of logits.

    fn's results (a tensor or a tuple of tensors, any shape) come back differentiable, tied to the model's output; no
    (N, V) tensor is made unless fn makes one. hidden (B, T, D) is what the model feeds its head; nothing is shifted.

    Args:
        model: an HF causal LM, or one wrapped by DDP, FSDP, DeepSpeed or PEFT. It is called as ``model(**inputs)``.
        fn: called once, with hidden and the head's weight, bias and calibrated logit transform.
        inputs: keyword arguments of the model, without ``labels``; for an encoder-decoder with decoder_input_ids.
            use_cache is False unless given.
        spread: fn knows a ``HeadParams`` with a group, whose vocabulary is spread over ranks.
        low_rank: fn passes ``**head_params.logit_options`` on to the ops, or adds ``head_params.low_rank`` itself;
            without it a head with an active LoRA adapter is refused.
    Returns:
        (results, output): fn's results as a tuple, and the model's output, its ``logits`` the placeholder.
    Raises:
        ValueError: the model's head is not understood (see ``calibrate``).
    """
    from var_kernels.integrations.hf.calibration import calibrate

    inner = inner_model(model)
    head = find_head(inner)
    transform = calibrate(model, inputs, encoder_decoder=inputs.get("decoder_input_ids") is not None)

    def compute(hidden: Tensor):
        return fn(hidden, transform.params(head, inner))

    with head_results(inner, head, compute, wide=transform.wide, spread=spread, low_rank=low_rank) as results:
        output = model(**without_cache(inner, inputs))
    if not results:
        raise ValueError(
            f"{type(inner).__name__} did not call its output embedding in this forward pass: there is no loss to take"
        )
    return tied(results, logits_of(output)), output


def without_cache(inner: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with use_cache=False where the caller says nothing and the model knows the word."""
    if "use_cache" in inputs or "use_cache" not in inspect.signature(inner.forward).parameters:
        return dict(inputs)
    return {**inputs, "use_cache": False}


def logits_of(output: Any) -> Tensor | None:
    """The logits of a model output, be it a ModelOutput, a dict or a tuple."""
    if isinstance(output, Mapping):
        return output.get("logits")
    if isinstance(output, tuple):
        return next((item for item in output if isinstance(item, Tensor) and item.dim() > 0), None)
    return getattr(output, "logits", None)


def placeholder(head: nn.Linear, hidden: Tensor, wide: bool, *results: Tensor, value: float = 0.0) -> Tensor:
    """What a head returns in place of (B, T, V) logits; wide for a model that writes at single ids of them."""
    width, device = (vocabulary_size(head), torch.device("meta")) if wide else (1, hidden.device)
    return Placeholder.apply((*hidden.shape[:-1], width), value, hidden.dtype, device, *results)


class Placeholder(torch.autograd.Function):
    """One value in place of logits. The results are its ancestors in the graph and get a gradient of zero from it."""

    @staticmethod
    def forward(ctx, shape, value, dtype, device, *results):
        ctx.like = [(r.shape, r.dtype, r.device) for r in results]
        return torch.full(shape, value, dtype=dtype, device=device)

    @staticmethod
    def backward(ctx, _grad):
        return None, None, None, None, *_zeros(ctx.like)


class _Tie(torch.autograd.Function):
    """The results unchanged; their backward gives ``logits`` a gradient of zero besides."""

    @staticmethod
    def forward(ctx, logits, *results):
        ctx.set_materialize_grads(False)
        ctx.like = [(logits.shape, logits.dtype, logits.device)]
        outputs = tuple(r.clone() for r in results)  # models add to their loss in place, which a view forbids
        ctx.mark_non_differentiable(*(out for out, r in zip(outputs, results, strict=True) if not r.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        return *_zeros(ctx.like), *grads


def _zeros(like):
    return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in like)
