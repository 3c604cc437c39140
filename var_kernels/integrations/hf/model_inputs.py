"""Arguments of a model's forward, inputs of a decoder, the device of the ids; the library that code belongs to."""

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from var_kernels.integrations import IGNORE_INDEX

_LIBRARIES = frozenset(("transformers", "torch", "accelerate", "peft", "deepspeed", "var_kernels"))


def known_arguments(inner: nn.Module) -> set[str]:
    """Names of the arguments of its class's forward and those that this one extends: a forward that someone wrapped,
    in a subclass or on the instance, may name none.
    """
    forwards = [vars(cls)["forward"] for cls in type(inner).__mro__ if "forward" in vars(cls) and cls is not nn.Module]
    return {name for forward in forwards for name in inspect.signature(forward).parameters}


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


def of_a_library(function: Any) -> bool:
    """Return whether a function and all wrappers around it are a library's code."""
    while function is not None:
        layer, names = _layer(function)
        called = [names[n] for n in getattr(layer, "__code__", _layer.__code__).co_names if n in names]
        homes = [home_of(function), *(_root(c.__globals__["__name__"]) for c in called if hasattr(c, "__globals__"))]
        if not _LIBRARIES.issuperset(homes):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def home_of(function: Any) -> str:
    """The package whose code the outermost layer of a function is."""
    layer, names = _layer(function)
    return _root(names.get("__name__", type(layer).__module__))


def _layer(function: Any) -> tuple[Any, dict[str, Any]]:
    """(the function under a partial or a bound method, its globals)."""
    layer = function.func if isinstance(function, functools.partial) else getattr(function, "__func__", function)
    return layer, getattr(layer, "__globals__", {})


def _root(module: str) -> str:
    return module.partition(".")[0]
