"""A small causal LM made from nothing: random weights, and a tokenizer trained on the data."""

from collections.abc import Iterable
from dataclasses import dataclass

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


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
                raise ValueError(f"from-scratch: {name} must be at least 1, got {value}; leave it out for the default")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"from-scratch: hidden must be a multiple of 2 x heads (rotary halves), got hidden={self.hidden}, "
                f"heads={self.heads}; change one"
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


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Train a byte-level BPE tokenizer of at most ``vocab_size`` entries: a ``PreTrainedTokenizerFast``.
    Any text can be encoded: no unknown token is needed.

    Raises:
        ValueError: vocab_size below the 259 entries that bytes and special tokens take.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [BOS, EOS, PAD]
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + len(special)} (all bytes and {special}), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
