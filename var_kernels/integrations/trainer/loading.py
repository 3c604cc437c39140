"""A causal LM, and a tokenizer, by name or path."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_causal_lm(name: str, dtype: str | torch.dtype = torch.float32) -> PreTrainedModel:
    """As ``AutoModelForCausalLM.from_pretrained``; where ``name`` holds an adapter, its base with the adapter merged.

    transformers would hand out the base with the adapter hung into it and everything frozen: nothing of it learns, and
    the reference without an adapter is not the model that was asked for.
    """
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if getattr(model, "_hf_peft_config_loaded", False):
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=dtype).merge_and_unload().requires_grad_(True)
        model.config._name_or_path = name
    return model


def load_tokenizer(given: PreTrainedTokenizerBase | str | None, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """What was given, what has that name, or what lies where the model came from."""
    if given is not None and not isinstance(given, str):
        return given
    name = given or model.config._name_or_path
    if not name:
        raise ValueError(
            "processing_class: expected a tokenizer, got none, and the model was loaded from nowhere; pass one"
        )
    return AutoTokenizer.from_pretrained(name)
