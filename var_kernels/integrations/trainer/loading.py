"""A causal LM by its name or path."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


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
