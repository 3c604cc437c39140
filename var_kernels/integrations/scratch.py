"""A small causal LM made from nothing: random weights, and a tokenizer trained on the data."""

from collections.abc import Iterable
from dataclasses import dataclass

from var_kernels.integrations.tokenizer import train_tokenizer


@dataclass(frozen=True)
class ScratchSpec:
    """Size of a Llama-shaped model. ``vocab`` bounds the tokenizer's entries; ``heads`` must divide ``hidden``."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    vocab: int = 4096

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"from-scratch: {name} must be at least 1, got {value}")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"from-scratch: hidden must be a multiple of 2 x heads (rotary halves), got hidden={self.hidden}, "
                f"heads={self.heads}"
            )


def make_model(spec: ScratchSpec, vocab_size: int, max_length: int, seed: int):
    """A ``LlamaForCausalLM`` with tied embeddings and random weights: equal seeds, equal weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=spec.hidden,
        intermediate_size=-(-spec.hidden * 8 // 3 // 32) * 32,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_tokenizer(spec: ScratchSpec, texts: Iterable[str]):
    """A byte-level BPE tokenizer of at most ``spec.vocab`` entries, trained on the texts."""
    return train_tokenizer(texts, spec.vocab)
