"""A causal LM, and a tokenizer, by name or path."""

import os
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file


def check_folder(option: str, name: str) -> None:
    """Refuse a path that leads nowhere; names on the hub have one slash at most."""
    if os.sep in name and not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{option} must be an existing folder or a name on the hub, got {name}; check the path")


def load_causal_lm(name: str, dtype: str | torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a causal LM; where ``name`` holds an adapter, its base with the adapter merged.

    transformers would hand out the base with the adapter hung into it and everything frozen: nothing of it learns, and
    the reference without an adapter is not the model that was asked for. An adapter of the lm_head or of the embedding
    unties the two, which it makes different; its base may be the folder of an adapter again.

    Raises:
        ValueError: an adapter that cannot be merged, a base that is quantised, a GGUF file.
    """
    if Path(name).suffix == ".gguf" or (any(Path(name).glob("*.gguf")) and not (Path(name) / "config.json").exists()):
        raise ValueError(
            f"model: {name} must be a folder with config.json and weights, got GGUF; save it dequantised by "
            "var_kernels.integrations.gguf_files.convert(file, folder) and pass that folder"
        )
    if find_adapter_config_file(name) is None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(name)
    if config.is_prompt_learning:
        raise ValueError(
            f"model: the adapter in {name} must be one of weights, got {config.peft_type.value}, which adds tokens and "
            "cannot be merged; pass a LoRA adapter, or a whole model"
        )
    base = load_causal_lm(config.base_model_name_or_path, dtype)
    if getattr(base, "hf_quantizer", None) is not None:
        raise ValueError(
            f"model: the base of the adapter in {name} must not be quantised, since merging would round the adapter to "
            "its grid, got a quantised one; load the base in a wider dtype, or dequantize() it, merge the adapter with "
            "peft and save the result"
        )
    _resize(base, name)
    adapted = PeftModel.from_pretrained(base, name)
    _untie(base)
    try:
        model = adapted.merge_and_unload().requires_grad_(True)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"model: the adapter in {name} must be one that peft can merge into its base, got: {error!s:.300} Train "
            "without what this names, or load it with peft (is_trainable=True) and pass the model itself"
        ) from error
    model.config._name_or_path = model.name_or_path = name  # the base of an adapter that is trained on it
    return model


def _resize(base: PreTrainedModel, name: str) -> None:
    """Give the base the vocabulary of the adapter, whose file then holds the new rows."""
    from peft.utils import load_peft_weights

    held = {key: weight.shape[0] for key, weight in load_peft_weights(name, device="cpu").items() if weight.dim() == 2}
    held = {key: rows for key, rows in held.items() if key.endswith((*_EMBEDDINGS, *_HEADS))}
    rows, words = max(held.values(), default=None), base.get_input_embeddings().weight
    if rows in (None, words.shape[0]):
        return
    tied = base.get_output_embeddings().weight is words
    if not (tied or all(any(key.endswith(names) for key in held) for names in (_EMBEDDINGS, _HEADS))):
        raise ValueError(
            f"model: the adapter in {name} must hold embedding and lm_head, since it was trained with {rows} tokens, "
            f"its base has {words.shape[0]}, got one of the two; save the adapter with both in modules_to_save, or "
            "resize and save the base before training"
        )
    base.resize_token_embeddings(rows, mean_resizing=False)


# What PEFT writes of an embedding, or an lm_head, that is whole in the adapter's file.
_LAYERS = ("", ".base_layer", ".modules_to_save")
_EMBEDDINGS = tuple(f"{m}{x}.weight" for m in ("embed_tokens", "wte", "embed_in", "word_embeddings") for x in _LAYERS)
_HEADS = tuple(f"{module}{x}.weight" for module in ("lm_head", "embed_out") for x in _LAYERS)


def _untie(model: nn.Module) -> None:
    """Give a tied lm_head a weight of its own where an adapter changes it, or the embedding, in another way than the
    other: merged, both changes would go into the one matrix."""
    layers = [model.get_output_embeddings(), model.get_input_embeddings()]
    cores = [layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers]
    head, words = cores
    merged = [layer for layer, core in zip(layers, cores, strict=True) if layer is not core]
    by_tokens = all(type(layer).__name__ == "TrainableTokensLayer" for layer in merged)  # tied by PEFT itself
    if getattr(head, "weight", None) is not getattr(words, "weight", None) or by_tokens:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def load_tokenizer(given: PreTrainedTokenizerBase | str | None, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that was given, the one of that name, or the one that lies where the model came from."""
    if given is not None and not isinstance(given, str):
        return given
    name = given or model.config._name_or_path
    if not name:
        raise ValueError(
            "processing_class must be a tokenizer, got none, with a model that has no name or path; pass one"
        )
    return AutoTokenizer.from_pretrained(name)


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up rows: the padding token, else the end token, else 0."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
