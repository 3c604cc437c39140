"""The HF model under its wrappers, its lm_head with whatever holds the weight, what it is given and what it returns.

A weight may be packed (bitsandbytes' 4 bit, torchao's and other tensors with ``dequantize()``): it is dequantised
whole, inside the head's forward, for the time of the loss: V x D in the model's dtype. Layers that also round their
input (8-bit activations) compute something else than W h and are refused: each head is compared once with its
dequantised weight. So is a head in floating point whose forward someone replaced.

It may be sharded: a DTensor, rows of the vocabulary on each rank. transformers' tp_plan hands the head plain hidden
states, the same on every rank; torch's ``parallelize_module`` makes a DTensor of them first, and expects one back.

And it may lie under a PEFT adapter, whose term ``capture`` adds. PEFT is not imported: its layers are told by their
names.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.hf.forwards import known_arguments, own_forward

_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")  # torch.compile; DDP and DeepSpeed; FSDP1
_DEQUANTISE = (
    "Keep the head in floating point (modules_to_not_convert=['lm_head'], llm_int8_skip_modules=['lm_head']) or "
    "dequantise it"
)
_REPLACED = (
    ": {}, in train or eval mode. Change the hidden states before the head or the logits after "
    "it in the model's forward (a scale, a softcap, a bias), or use the model's own loss"
)
_PROBES = 4
# Module -> (its weight and forward then, how far it is from W h)
_errors: WeakKeyDictionary = WeakKeyDictionary()
ADAPTER_REMEDY = (
    "Leave it out of target_modules (exclude_modules=['lm_head']), train it whole with modules_to_save=['lm_head'], or "
    "merge it first (merge_and_unload(), right only where the lm_head is not tied to the embedding)"
)
# Around nn.Linear and around quantised layers; all add the same term.
_LORA_LAYERS = ("tuners.lora.layer.Linear", "tuners.lora.bnb.Linear4bit", "tuners.lora.torchao.TorchaoLoraLinear")


def inner_model(model: nn.Module) -> nn.Module:
    """The HF model under torch.compile, DDP, FSDP1, DeepSpeed and PEFT wrappers: the module that owns the lm_head."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a loaded model (nn.Module), got {type(model).__name__}; load it first: "
            "AutoModelForCausalLM.from_pretrained(...)"
        )
    # Looked up among the children: several wrappers answer for any attribute of what they wrap.
    while wrapped := next((model._modules[name] for name in _WRAPPED if model._modules.get(name) is not None), None):
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise TypeError(
                f"model must be on one device in each process, got nn.DataParallel over {len(model.device_ids)}, whose "
                "copies run in threads; wrap it in DistributedDataParallel (torchrun)"
            )
        model = wrapped
    if callable(getattr(model, "get_base_model", None)):
        return inner_model(model.get_base_model())
    if not callable(getattr(model, "get_output_embeddings", None)):
        raise TypeError(
            "model must be a transformers model with get_output_embeddings(), or a wrapper of one, got "
            f"{type(model).__name__}; load it by AutoModelForCausalLM"
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
            f"{name} must have an output embedding, got None from get_output_embeddings() (a base model or a "
            "classifier); load it by AutoModelForCausalLM, or the class with a language-model head"
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
        raise ValueError(f"{name}: its output embedding must be one nn.Linear, got {kind}. {remedy}")
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


# ---- its weight: packed, sharded -------------------------------------------------------------------------------------


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


def is_dtensor(tensor: Tensor) -> bool:
    if not is_traceable_wrapper_subclass(tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


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


# ---- under an adapter ------------------------------------------------------------------------------------------------


def unwrapped(head: nn.Module) -> nn.Module:
    """The module that makes the logits inside PEFT's wrappers: modules_to_save's active copy, or trainable tokens."""
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        active = head.active_adapters
        saved = not head.disable_adapters and all(adapter in head.modules_to_save for adapter in active)
        return head.modules_to_save[active[0]] if saved else head.original_module
    return head.token_adapter if hasattr(head, "token_adapter") else head


def is_adapter(head: nn.Module) -> bool:
    return hasattr(head, "base_layer")


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
        raise ValueError(f"{name}: a PEFT adapter of the lm_head must be plain LoRA, got {kind}. {ADAPTER_REMEDY}")
    variants = getattr(head, "lora_variant", {})
    for adapter in active_adapters(head):
        right = getattr(head.lora_B[adapter], "_fsdp_wrapped_module", head.lora_B[adapter])
        replaced = [m for m in (head, right) if own_forward(m) not in (None, type(m).forward)]
        if replaced and "_var_kernels_busy" not in vars(head):
            raise ValueError(
                f"{name}: the LoRA adapter {adapter!r} of its lm_head must compute W h + b + B A h, got a "
                f"{type(replaced[0]).__name__} whose forward was replaced ({own_forward(replaced[0]).__qualname__}). "
                f"{ADAPTER_REMEDY}"
            )
        if adapter in variants or getattr(head, "use_dora", {}).get(adapter, False):
            variant = type(variants[adapter]).__name__ if adapter in variants else "DoRA"
            raise ValueError(
                f"{name}: the adapter {adapter!r} of its lm_head must be plain LoRA, W h + B A h, got a {variant} "
                f"(DoRA scales each row of the weight). {ADAPTER_REMEDY}"
            )


def active_adapters(head: nn.Module) -> list[str]:
    """The adapters that take part in a forward pass now."""
    if head.disable_adapters or head.merged:
        return []
    known = head.lora_A if hasattr(head, "lora_A") else head.token_indices
    return [adapter for adapter in head.active_adapters if adapter in known]


# ---- what the model is given and what it returns ---------------------------------------------------------------------


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


def is_encoder_decoder(inner: nn.Module) -> bool:
    return bool(getattr(inner.config, "is_encoder_decoder", False)) and "decoder_input_ids" in known_arguments(inner)


def decoder_inputs(inner: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """Make the decoder inputs that an encoder-decoder makes of labels (B, T): the labels shifted right by one."""
    config, text = inner.config, inner.config.get_text_config()
    if callable(getattr(inner, "prepare_decoder_input_ids_from_labels", None)):
        ids = inner.prepare_decoder_input_ids_from_labels(labels=labels)
    elif callable(getattr(inner, "_shift_right", None)):
        ids = inner._shift_right(labels)
    else:
        shift = getattr(sys.modules[type(inner).__module__], "shift_tokens_right", _shifted_right)
        wanted = [getattr(text, name, None) for name in ("pad_token_id", "decoder_start_token_id")]
        ids = shift(labels, *wanted[: len(inspect.signature(shift).parameters) - 1])
    if config.model_type not in ("encoder-decoder", "pix2struct"):
        return {"decoder_input_ids": ids}
    mask = (ids != config.pad_token_id).to(ids.dtype)  # these hide the padding of decoder inputs that they make
    if config.model_type == "pix2struct":
        mask[:, 0] = 1
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def _shifted_right(labels: Tensor, pad: int, start: int) -> Tensor:
    shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORE_INDEX, pad)


def input_embeddings(inner: nn.Module) -> nn.Module | None:
    """The module that looks up its tokens, or None."""
    try:
        return inner.get_input_embeddings()
    except NotImplementedError:  # a model without any of its own: a picture goes in
        return None


def input_device(inner: nn.Module) -> torch.device:
    """The device of the model's input_ids."""
    embeddings = input_embeddings(inner)
    hook = getattr(embeddings, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:  # offloaded weights rest on another device or on none
        return torch.device(hook.execution_device)
    parameter = next((embeddings or inner).parameters(), None)
    return inner.device if parameter is None else parameter.device


def next_labels(labels: Tensor, hidden: Tensor) -> Tensor:
    """(B, T) int64 on hidden's device: row t of hidden (B, T, D) predicts labels[:, t + 1], the last row nothing."""
    return row_labels(labels, hidden, shift=True)


def row_labels(labels: Tensor, hidden: Tensor, *, shift: bool) -> Tensor:
    """(B, T) int64 on hidden's device: what row t of hidden predicts, labels[:, t + 1], without shift labels[:, t]."""
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must be {tuple(hidden.shape[:-1])}, one per position that the lm_head computes, got "
            f"{tuple(labels.shape)}; pass no logits_to_keep, labels for all inputs (virtual tokens included), and no "
            "adapter_names where adapters have lm_heads of their own"
        )
    rows = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if shift else labels
    return rows.to(hidden.device)
