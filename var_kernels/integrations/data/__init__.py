"""Training data: rows of text with rewards, read, checked and tokenised. docs/data.md describes the forms."""

from var_kernels.integrations.data.encode import EncodedRows, encode_examples, encode_prompts, end_tokens
from var_kernels.integrations.data.forms import DataError, Example, Problem, merge_prompts, parse_row
from var_kernels.integrations.data.read import is_local, load_examples

__all__ = [
    "DataError", "EncodedRows", "Example", "Problem", "encode_examples", "encode_prompts", "end_tokens", "is_local",
    "load_examples", "merge_prompts", "parse_row",
]  # fmt: skip
