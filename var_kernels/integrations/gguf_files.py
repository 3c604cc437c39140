"""GGUF files, which transformers reads but trains no further."""

import gc
from pathlib import Path


def convert(file: Path, folder: Path) -> None:
    """Save a GGUF file's model, dequantised to fp32, and its tokenizer as ``save_pretrained`` does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.is_quantized, model.hf_quantizer = False, None  # else it refuses to be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    del model
    gc.collect()
