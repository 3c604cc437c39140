"""Sizes of lm_heads: a table of well-known models, or a configuration that can be read."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from var_kernels.cli.options import no_such_model

if TYPE_CHECKING:
    import torch


class HeadSize(NamedTuple):
    name: str
    hidden: int
    vocab: int
    dtype: "torch.dtype | None" = None  # of the checkpoint, where its configuration says it


# (hidden size, vocabulary) as published in each model's config.json.
KNOWN = {
    "GPT-2": (768, 50257),
    "Pythia-1B": (2048, 50304),
    "SmolLM2-135M": (576, 49152),
    "SmolLM2-360M": (960, 49152),
    "SmolLM2-1.7B": (2048, 49152),
    "SmolLM3-3B": (2048, 128256),
    "TinyLlama-1.1B": (2048, 32000),
    "Llama-2-7B": (4096, 32000),
    "Llama-3.2-1B": (2048, 128256),
    "Llama-3.2-3B": (3072, 128256),
    "Llama-3.1-8B": (4096, 128256),
    "Llama-3.1-70B": (8192, 128256),
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Qwen2.5-14B": (5120, 152064),
    "Qwen2.5-72B": (8192, 152064),
    "Qwen3-0.6B": (1024, 151936),
    "Qwen3-1.7B": (2048, 151936),
    "Qwen3-4B": (2560, 151936),
    "Qwen3-8B": (4096, 151936),
    "Qwen3-32B": (5120, 151936),
    "Gemma-2-2B": (2304, 256000),
    "Gemma-2-9B": (3584, 256000),
    "Gemma-3-270M": (640, 262144),
    "Gemma-3-1B": (1152, 262144),
    "Gemma-3-4B": (2560, 262208),
    "Gemma-3-27B": (5376, 262208),
    "Mistral-7B-v0.3": (4096, 32768),
    "Mistral-Nemo-12B": (5120, 131072),
    "Mixtral-8x7B": (4096, 32000),
    "Phi-3-mini": (3072, 32064),
    "Phi-4": (5120, 100352),
    "Phi-4-mini": (3072, 200064),
    "OLMo-2-7B": (4096, 100352),
    "GPT-OSS-20B": (2880, 201088),
    "DeepSeek-V3": (7168, 129280),
}


def find_head_size(model: str) -> HeadSize:
    """The head of a model: a name in the table, whatever its case; a config.json, a folder with one, a name on the hub.

    Raises:
        ValueError: neither; the message names the nearest names of the table.
    """
    known = {name.lower(): name for name in KNOWN}
    if model.lower() in known:
        name = known[model.lower()]
        return HeadSize(name, *KNOWN[name])
    if "/" not in model and not Path(model).exists():
        near = difflib.get_close_matches(model.lower(), known, n=3, cutoff=0.3)
        raise ValueError(
            "--model must be a known model, a config.json, a folder with one or a name on the hub (with a slash), got "
            f"{model!r}; known are {', '.join([known[name] for name in near] or KNOWN)}"
        )
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise no_such_model("model", model, error) from error
    dtype = getattr(config, "dtype", None)
    name = Path(model).parent.name if Path(model).is_file() else Path(model).name
    return HeadSize(name, config.hidden_size, config.vocab_size, dtype if isinstance(dtype, torch.dtype) else None)
