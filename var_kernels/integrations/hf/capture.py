"""A function of the caller's, computed inside a model's own lm_head, on the hidden states that the model feeds it.

``head.forward`` is swapped on the output-embedding module and ``model(**inputs)`` runs as it is, so that everything
hung on the head (accelerate's offloading, FSDP's and DeepSpeed's gathering) still happens around it. Where the model
expects logits (..., V) it gets a placeholder (..., 1) of zeros; the backward of the results first passes through what
the model made of it.

Under a PEFT adapter (LoRA layers, and single trainable tokens of a tied head)

    logits = W h + b + sum over active adapters of scaling B A dropout(h)

is W h + right left + b with left = scaling A dropout(h) and right = B, which the ops add tile by tile.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from var_kernels.integrations.hf.calibration import HeadParams, LowRank, calibrate
from var_kernels.integrations.hf.forwards import placeholder, swapped, swapped_forward, swapped_head, zeros
from var_kernels.integrations.hf.model import (
    ADAPTER_REMEDY,
    active_adapters,
    find_head,
    inner_model,
    is_adapter,
    is_dtensor,
    local_rows,
    logits_of,
    vocabulary_size,
    without_cache,
)


def capture(
    model: nn.Module,
    fn: Callable[[Tensor, HeadParams], Any],
    inputs: Mapping[str, Any],
    *,
    sharded: bool = False,
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
        sharded: fn knows a ``HeadParams`` with a group, whose vocabulary is sharded over ranks.
        low_rank: fn passes ``**head_params.logit_options`` on to the ops, or adds ``head_params.low_rank`` itself;
            without it a head with an active LoRA adapter is refused.

    Returns:
        (results, output): fn's results as a tuple, and the model's output, its ``logits`` the placeholder.

    Raises:
        ValueError: the model's head is not understood (see ``calibrate``).
    """
    inner = inner_model(model)
    head = find_head(inner)
    transform = calibrate(model, inputs, encoder_decoder=inputs.get("decoder_input_ids") is not None)

    def compute(hidden: Tensor):
        return fn(hidden, transform.params(head, inner))

    with head_results(inner, head, compute, wide=transform.wide, sharded=sharded, low_rank=low_rank) as results:
        output = model(**without_cache(inner, inputs))
    if not results:
        raise ValueError(
            f"{type(inner).__name__} must call its output embedding in this forward pass, and did not; pass inputs "
            "from which it makes logits"
        )
    return tied(results, logits_of(output)), output


@contextmanager
def head_results(
    inner: nn.Module,
    head: nn.Linear,
    fn: Callable[[Tensor], Any],
    *,
    wide: bool = False,
    sharded: bool = False,
    low_rank: bool = False,
    as_logits: bool = False,
) -> Iterator[list[Tensor]]:
    """Inside the block the head computes ``fn(hidden)`` in place of logits; the yielded list gets its result(s).

    The placeholder is (B, T, 1) zeros, or with ``wide`` (B, T, V) on the meta device, which takes no memory. With
    ``sharded`` fn knows a head whose vocabulary is sharded over ranks, with ``low_rank`` one with a LoRA adapter;
    otherwise these are refused.

    With ``as_logits`` the head returns what fn returns, and may be called several times.

    Pass them on through ``tied``: only then does their backward come after the hooks on the outputs of head and model.
    """
    results: list[Tensor] = []

    def forward(hidden, *_args, adapter_names=None, **_kwargs):
        if adapter_names is not None:
            raise ValueError(
                f"adapter_names must be None, one adapter for all rows, got {len(adapter_names)} names; select one by "
                "set_adapter"
            )
        if not low_rank and is_adapter(head) and active_adapters(head):
            raise ValueError(
                f"{type(inner).__name__}: its lm_head must have no active LoRA adapter for this loss, got one; pass "
                "HeadParams.logit_options on to the op (capture(..., low_rank=True)), merge the adapter, or leave the "
                "lm_head out of it"
            )
        if results:
            raise ValueError(
                f"{type(inner).__name__} must call its lm_head once a forward pass, got a second call; use the "
                "model's own loss"
            )
        if is_dtensor(head.weight) and not sharded:
            raise ValueError(
                f"{type(inner).__name__}: the lm_head weight must be whole on each rank for this loss, got a DTensor "
                "(a tensor-parallel head); leave lm_head out of the tensor-parallel plan, or use fused_lm_head, "
                "token_logprobs or sequence_logprobs, which support it"
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
            return placeholder(hidden, *nodes.values(), vocab=vocabulary_size(head) if wide else None)

        if is_adapter(head):
            return restore(inside_adapter(head, hidden, type(inner).__name__, compute))
        return restore(compute(hidden, None))

    with swapped_head(head, forward):
        yield results


def tied(results: list[Tensor], logits: Tensor | None) -> tuple[Tensor, ...]:
    """The results, unchanged, their backward going first through ``logits`` (what the model made of the placeholder).

    The pre-backward hooks of FSDP and DeepSpeed sit there: they bring back the sharded weight that the results need.
    """
    if isinstance(logits, Tensor) and logits.requires_grad:
        local: Any = logits
        return _Tie.apply(local.to_local() if is_dtensor(logits) else logits, *results)
    return tuple(results)


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
        return *zeros(ctx.like), *grads


# ---- under an adapter ------------------------------------------------------------------------------------------------


def inside_adapter(
    head: nn.Module, hidden: Tensor, name: str, compute: Callable[[Tensor, LowRank | None], Tensor]
) -> Tensor:
    """``compute(hidden, low_rank)`` inside the forward of every module whose weight it reads: hooks on these gather
    sharded weights and move inputs.
    """
    if head.disable_adapters and head.merged:
        head.unmerge()  # as PEFT's own forward does
    if hasattr(head, "lora_A"):
        return _inside_lora(head, hidden, name, compute)
    adapters = active_adapters(head)
    if len(adapters) > 1:
        head._check_overlapping_tokens(adapters)

    def at_the_core(hidden: Tensor, *_args, **_kwargs) -> Tensor:
        terms = [_token_term(head, adapter, hidden) for adapter in adapters]
        return compute(hidden, _joined(terms, hidden))

    with swapped_forward(head.base_layer, at_the_core):
        return head.base_layer(hidden)


def _inside_lora(head: nn.Module, hidden: Tensor, name: str, compute: Callable) -> Tensor:
    adapters, terms = active_adapters(head), []

    def with_the_next(hidden: Tensor, remaining: list[str]) -> Tensor:
        if not remaining:
            return compute(hidden, _joined(terms, hidden))
        adapter, *remaining = remaining
        called = head.lora_B[adapter]
        right = getattr(called, "_fsdp_wrapped_module", called)  # PEFT's policy for FSDP1 makes a unit of each factor

        def inside_right(left: Tensor, *_args, **_kwargs) -> Tensor:
            terms.append((left * head.scaling[adapter], right.weight))
            if right.bias is not None:
                ones = torch.full_like(left[..., :1], head.scaling[adapter])
                terms.append((ones, right.bias.unsqueeze(1)))
            return with_the_next(hidden, remaining)

        with swapped_forward(right, inside_right):
            return called(lefts[adapter])

    def at_the_core(hidden: Tensor, *_args, **_kwargs) -> Tensor:
        if is_dtensor(head.base_layer.weight):
            raise ValueError(
                f"{name}: an lm_head with LoRA must be whole on each rank, got it sharded. {ADAPTER_REMEDY}"
            )
        return with_the_next(hidden, adapters)

    lefts, given = {}, hidden
    for adapter in adapters:
        down = head.lora_A[adapter]
        if getattr(head, "cast_input_dtype_enabled", True):
            given = given.to(down.weight.dtype)
        lefts[adapter] = down(head.lora_dropout[adapter](given))
    with swapped_forward(head.base_layer, at_the_core):
        return head.base_layer(hidden)


def _token_term(head: nn.Module, adapter: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Row i of the weight replaced by d_i adds (d_i - W_i) h to logit i: one column each."""
    weight = head.base_layer.weight
    ids = torch.tensor(head.token_indices[adapter], device=weight.device)
    wide = torch.promote_types(weight.dtype, torch.float32)
    change_RD = head.trainable_tokens_delta[adapter].to(weight.device).to(weight.dtype).to(wide) - weight[ids].to(wide)
    right = torch.zeros(len(weight), len(ids), dtype=wide, device=weight.device)
    right[ids, torch.arange(len(ids), device=weight.device)] = 1
    return hidden.to(wide) @ change_RD.t(), right


def _joined(terms: list[tuple[Tensor, Tensor]], hidden: Tensor) -> LowRank | None:
    """One pair of factors, in hidden's dtype or fp32, on hidden's device."""
    if not terms:
        return None
    lefts, rights = zip(*terms, strict=True)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if all(t.dtype == hidden.dtype for t in (*lefts, *rights)):
        dtype = hidden.dtype

    def join(tensors):
        moved = [t.to(hidden.device, dtype) for t in tensors]
        return moved[0] if len(moved) == 1 else torch.cat(moved, -1)

    return join(lefts), join(rights)
