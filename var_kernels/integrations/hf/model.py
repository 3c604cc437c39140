"""The HF model under its wrappers, its lm_head, what it is given and what it returns."""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.hf.forwards import known_arguments, own_forward
from var_kernels.integrations.hf.weights import check_adapter, computes_a_product, is_adapter, is_packed, unwrapped

_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")  # torch.compile; DDP and DeepSpeed; FSDP1
_DEQUANTISE = (
    "Keep the head in floating point (modules_to_not_convert=['lm_head'], llm_int8_skip_modules=['lm_head']) or "
    "dequantise it"
)
_REPLACED = (
    ": {}, in train or eval mode. Change the hidden states before the head or the logits after "
    "it in the model's forward (a scale, a softcap, a bias), or use the model's own loss"
)


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
