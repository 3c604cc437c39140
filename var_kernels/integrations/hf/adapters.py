"""An lm_head under a PEFT adapter: LoRA layers, and single trainable tokens of a tied head.

    logits = W h + b + sum over active adapters of scaling B A dropout(h)

is W h + right left + b with left = scaling A dropout(h) and right = B, which the ops add tile by tile. PEFT is not
imported: its layers are told by their names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from var_kernels.integrations.hf.parallel import is_dtensor
from var_kernels.integrations.hf.quantised import own_forward
from var_kernels.integrations.hf.swap import swapped_forward

_REMEDY = (
    "Leave it out of target_modules (exclude_modules=['lm_head']), train it whole with modules_to_save=['lm_head'], or "
    "merge it first (merge_and_unload(), right only where the lm_head is not tied to the embedding)"
)


# Around nn.Linear and around quantised layers; all add the same term.
_LORA_LAYERS = (
    "tuners.lora.layer.Linear",
    "tuners.lora.bnb.Linear4bit",
    "tuners.lora.torchao.TorchaoLoraLinear",
)


@dataclass(frozen=True)
class LowRank:
    """The term right left that active adapters add to the raw logits; a bias is a column of right, ones in left."""

    left: Tensor  # (B, T, R)
    right: Tensor  # (V, R)


def unwrapped(head: nn.Module) -> nn.Module:
    """The module that makes the logits inside PEFT's wrappers: modules_to_save's active copy, or trainable tokens."""
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        active = head.active_adapters
        saved = not head.disable_adapters and all(adapter in head.modules_to_save for adapter in active)
        return head.modules_to_save[active[0]] if saved else head.original_module
    return head.token_adapter if hasattr(head, "token_adapter") else head


def is_adapter(head: nn.Module) -> bool:
    return hasattr(head, "base_layer")


def is_active(head: nn.Module) -> bool:
    """Return whether an adapter adds to the base layer's logits now."""
    return is_adapter(head) and bool(_active(head))


def check_adapter(head: nn.Module, name: str) -> None:
    """Refuse adapters that are no low-rank term; what is merged or switched off does not matter."""
    # FSDP2 derives a class at run time; what counts is the one whose forward it runs.
    known = next(c for c in type(head).__mro__ if "forward" in vars(c))
    kind = f"{known.__module__}.{known.__name__}"
    if kind.endswith("trainable_tokens.layer.TrainableTokensLayer"):
        if head.base_layer.bias is not None:
            raise ValueError(f"{name}: PEFT's trainable tokens drop the bias of its lm_head. Train no single tokens")
        return
    if not kind.endswith(_LORA_LAYERS) or is_adapter(head.base_layer):
        raise ValueError(f"{name}: the lm_head carries a PEFT adapter ({kind}) that is no plain LoRA. {_REMEDY}")
    variants = getattr(head, "lora_variant", {})
    for adapter in _active(head):
        right = getattr(head.lora_B[adapter], "_fsdp_wrapped_module", head.lora_B[adapter])
        replaced = [m for m in (head, right) if own_forward(m) not in (None, type(m).forward)]
        if replaced and "_var_kernels_busy" not in vars(head):
            raise ValueError(
                f"{name}: the LoRA adapter {adapter!r} of its lm_head must compute W h + b + B A h, got a "
                f"{type(replaced[0]).__name__} whose forward was replaced ({own_forward(replaced[0]).__qualname__}). "
                f"{_REMEDY}"
            )
        if adapter in variants or getattr(head, "use_dora", {}).get(adapter, False):
            variant = type(variants[adapter]).__name__ if adapter in variants else "DoRA"
            raise ValueError(
                f"{name}: the adapter {adapter!r} of its lm_head is a {variant}, whose logits are not W h + B A h "
                f"(DoRA scales each row of the weight). Use plain LoRA on the lm_head. {_REMEDY}"
            )


def _active(head: nn.Module) -> list[str]:
    """The adapters that take part in a forward pass now."""
    if head.disable_adapters or head.merged:
        return []
    known = head.lora_A if hasattr(head, "lora_A") else head.token_indices
    return [adapter for adapter in head.active_adapters if adapter in known]


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
    adapters = _active(head)
    if len(adapters) > 1:
        head._check_overlapping_tokens(adapters)

    def at_the_core(hidden: Tensor, *_args, **_kwargs) -> Tensor:
        terms = [_token_term(head, adapter, hidden) for adapter in adapters]
        return compute(hidden, _joined(terms, hidden))

    with swapped_forward(head.base_layer, at_the_core):
        return head.base_layer(hidden)


def _inside_lora(head: nn.Module, hidden: Tensor, name: str, compute: Callable) -> Tensor:
    adapters, terms = _active(head), []

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
            raise ValueError(f"{name}: LoRA on an lm_head that is sharded over ranks is not supported. {_REMEDY}")
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

    return LowRank(join(lefts), join(rights))
