"""Fused losses of causal language models, from the hidden states before the lm_head, without [N, V] logits.

Dimension key, the same in every file: B sequences, T tokens per sequence, N rows (tokens that may carry loss), D
hidden size, V vocabulary, K target ids per row, P pairs. Whole tensors carry capital suffixes (``hidden_ND``), tiles
small ones (``logits_nv``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "var_kernels.ops": ("linear_logprob", "linear_token_kl", "linear_token_loss", "linear_weighted_nll"),
    "var_kernels.losses": (
        *("LOSSES", "VARLoss", "VARWeights", "dpo_loss", "linear_loss", "sft_loss", "var_loss", "var_weights"),
    ),
}
_PUBLIC = {name: module for module, names in _HOME.items() for name in names}
__all__ = [  # noqa: RUF022
    "linear_logprob", "linear_weighted_nll", "linear_token_loss", "linear_token_kl", "linear_loss", "LOSSES",
    "var_weights", "VARWeights", "var_loss", "VARLoss", "sft_loss", "dpo_loss", "__version__",
]  # fmt: skip

if TYPE_CHECKING:
    from var_kernels.losses import (
        LOSSES,
        VARLoss,
        VARWeights,
        dpo_loss,
        linear_loss,
        sft_loss,
        var_loss,
        var_weights,
    )
    from var_kernels.ops import linear_logprob, linear_token_kl, linear_token_loss, linear_weighted_nll


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'var_kernels' has no attribute {name!r}; public names: {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted(__all__)
