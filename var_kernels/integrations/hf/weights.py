"""An lm_head's weight, however it is stored: packed, sharded, or under a PEFT adapter.

Packed (bitsandbytes' 4 bit, torchao's and other tensors with ``dequantize()``): it is dequantised whole, inside the
head's forward, for the time of the loss: V x D in the model's dtype. Layers that also round their input (8-bit
activations) compute something else than W h and are refused: each head is compared once with its dequantised weight. So
is a head in floating point whose forward someone replaced.

Sharded: a DTensor, rows of the vocabulary on each rank. transformers' tp_plan hands the head plain hidden states, the
same on every rank; torch's ``parallelize_module`` makes a DTensor of them first, and expects one back.

Adapter (LoRA layers, and single trainable tokens of a tied head):

    logits = W h + b + sum over active adapters of scaling B A dropout(h)

is W h + right left + b with left = scaling A dropout(h) and right = B, which the ops add tile by tile. PEFT is not
imported: its layers are told by their names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from var_kernels.integrations.hf.forwards import own_forward, swapped_forward

_PROBES = 4
# Module -> (its weight and forward then, how far it is from W h)
_errors: WeakKeyDictionary = WeakKeyDictionary()
_REMEDY = (
    "Leave it out of target_modules (exclude_modules=['lm_head']), train it whole with modules_to_save=['lm_head'], or "
    "merge it first (merge_and_unload(), right only where the lm_head is not tied to the embedding)"
)
# Around nn.Linear and around quantised layers; all add the same term.
_LORA_LAYERS = ("tuners.lora.layer.Linear", "tuners.lora.bnb.Linear4bit", "tuners.lora.torchao.TorchaoLoraLinear")


def is_dtensor(tensor: Tensor) -> bool:
    if not is_traceable_wrapper_subclass(tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathers_weights(model: nn.Module) -> bool:
    """Return whether FSDP1, FSDP2 or ZeRO-3 shards the weights over ranks, which are whole only while they are used."""
    fsdp = any(hasattr(type(m), "reshard") or "_fsdp_wrapped_module" in m._modules for m in model.modules())
    return fsdp or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def local_rows(hidden: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(hidden as a plain tensor, whole on every rank, what makes the head's output of a plain tensor).

    Its gradient must be the whole one on every rank, as ``vocab_parallel_logprob`` gives it.
    """
    if not is_dtensor(hidden):
        return hidden, lambda output: output
    from torch.distributed.tensor import DTensor, Replicate

    mesh, everywhere = hidden.device_mesh, [Replicate()] * hidden.device_mesh.ndim
    local = hidden.redistribute(placements=everywhere).to_local(grad_placements=everywhere)
    return local, lambda output: DTensor.from_local(output, mesh, everywhere, run_check=False)


def vocabulary_slice(weight: Any, bias: Any, name: str) -> tuple[Tensor, Tensor | None, Any]:
    """(this rank's rows of the weight, of the bias, the group of the ranks that share the vocabulary).

    Raises:
        ValueError: a DTensor that is sharded in another way.
    """
    from torch.distributed.tensor import Shard

    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if mesh.ndim != 1 or placements != (Shard(0),) or (bias is not None and not is_dtensor(bias)):
        raise ValueError(
            f"{name}: inside its own forward the lm_head weight (and its bias) must be a DTensor sharded by the "
            f"vocabulary over one group of ranks, (Shard(dim=0),), got one placed as {placements}; use the plan "
            "'colwise_gather_output', or leave lm_head out of it"
        )
    return weight.to_local(), None if bias is None else bias.to_local(), mesh.get_group()


def is_packed(weight: Tensor) -> bool:
    return not weight.is_floating_point() or (is_traceable_wrapper_subclass(weight) and not is_dtensor(weight))


def dense_weight(head: nn.Module) -> Tensor | None:
    """(V, D) floating point, the head's own weight where it is that already; None where it cannot be made."""
    weight: Any = head.weight
    if not is_packed(weight):
        return weight
    if getattr(weight, "quant_state", None) is not None:
        dense = _dequantised_4bit(weight.data, weight.quant_state)
    elif is_traceable_wrapper_subclass(weight) and callable(unpack := getattr(type(weight), "dequantize", None)):
        dense = unpack(weight)
    else:
        return None
    return dense.detach() if dense.shape == (head.out_features, head.in_features) else None


def _dequantised_4bit(codes: Tensor, state) -> Tensor:
    from bitsandbytes import functional

    if getattr(state, "packing_format_for_cpu", False):  # by a forward pass in eval mode without gradients
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
    return functional.dequantize_4bit(codes, state)


@torch.no_grad()
def computes_a_product(head: nn.Module) -> bool:
    """Return whether the head's output is W h + b with the dequantised W, to the rounding of its dtype; tried once for
    each weight and forward, in train and eval mode."""
    key, seen = (id(head.weight), own_forward(head)), _errors.get(head)
    if seen is None or seen[0] != key:
        dense = dense_weight(head)
        computable = dense is not None and dense.device.type != "meta" and not is_dtensor(dense)
        _errors[head] = (key, _distance(head, dense) if computable else float("inf"))
    return _errors[head][1] <= 1.0


def _distance(head: nn.Module, dense: Tensor) -> float:
    """rms of the difference over what rounding of the operands to their dtype explains."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_PROBES, dense.shape[1], generator=generator, device="cpu").to(dense.device, dense.dtype)
    bias = 0.0 if head.bias is None else head.bias.double()
    forward = getattr(head, "_old_forward", head.forward)
    training, distances = head.training, []
    # A head that normalises or bends is a product at one size of its input at most.
    scales = (1.0,) if is_packed(head.weight) else (1.0, 1e-2, 1e2)
    kind = dense.device.type
    with torch.random.fork_rng([dense.device] if kind == "cuda" else []), torch.autocast(kind, enabled=False):
        for mode in (False, True):
            head.training = mode
            for scale in scales:
                # bitsandbytes packs its weight anew where nobody wants gradients
                given = (scale * hidden).requires_grad_()
                truth = given.double() @ dense.double().t() + bias
                try:
                    error = forward(given).double() - truth
                except Exception:
                    error = torch.full_like(truth, float("inf"))
                allowed = max(1e-4, 0.5 * torch.finfo(dense.dtype).eps)
                distances.append((error.square().mean().sqrt() / truth.square().mean().sqrt() / allowed).item())
    head.training = training
    return max(distances)


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
            raise ValueError(
                f"{name}: the lm_head under PEFT's trainable tokens must have no bias, which they drop, got one; leave "
                "trainable_token_indices out"
            )
        return
    if not kind.endswith(_LORA_LAYERS) or is_adapter(head.base_layer):
        raise ValueError(f"{name}: a PEFT adapter of the lm_head must be plain LoRA, got {kind}. {_REMEDY}")
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
                f"{name}: the adapter {adapter!r} of its lm_head must be plain LoRA, W h + B A h, got a {variant} "
                f"(DoRA scales each row of the weight). {_REMEDY}"
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
            raise ValueError(f"{name}: an lm_head with LoRA must be whole on each rank, got it sharded. {_REMEDY}")
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
