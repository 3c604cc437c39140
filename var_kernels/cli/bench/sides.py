"""The losses that are compared: each maps hidden (N, D), weight (V, D) and labels (N,) to the mean cross-entropy.

Other libraries are called as their published versions want it: liger-kernel 0.8.5, cut-cross-entropy 25.1.1,
quack-kernels 0.6.5, trl 1.16.0, torch 2.13.
"""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from var_kernels import linear_logprob, linear_weighted_nll

OURS, OURS_ANY, PLAIN = "var_kernels", "var_kernels, any loss", "transformers"


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss of SFT and VAR: gradients are known in the forward pass."""
    return linear_weighted_nll(hidden, weight, labels, None, reduction="mean")


def ours_any(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probs under any upstream gradient: DPO, PPO, GRPO and a user's own."""
    return -linear_logprob(hidden, weight, labels).sum() / (labels != -100).sum()


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss as transformers computes it: all logits, upcast."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="mean")


def _cce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = {} if hidden.is_cuda else {"impl": "torch_compile"}
    return linear_cross_entropy(hidden, weight, labels, reduction="mean", **impl)


def _quack(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    # tuned=False: no search over kernels where the scaled-exp pipeline does not apply.
    return chunked_linear_cross_entropy(hidden, weight, labels, reduction="mean", tuned=False)


def _trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # The function under TRL's add_fused_lm_head, with that function's chunk and selection of rows.
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    kept = labels != -100
    return -ChunkedLogProbFunction.apply(hidden[kept], weight, None, labels[kept], 1.0, 32768, None, 1.0, ())[0].mean()


# Name -> (loss, the module that it needs, whether it needs a GPU)
_OTHERS: dict[str, tuple[Callable, str, bool]] = {
    "Liger": (_liger, "liger_kernel.transformers.functional", True),
    "CCE": (_cce, "cut_cross_entropy", False),
    "QuACK": (_quack, "quack.linear_cross_entropy", True),
    "TRL's fused head": (_trl, "trl.kernels.chunked_logprob", True),
}


def find_sides(device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """(name -> loss of all that can run here, name -> reason why another cannot)."""
    sides: dict[str, Callable] = {OURS: ours, PLAIN: plain, OURS_ANY: ours_any}
    missing = {}
    if hasattr(F, "linear_cross_entropy"):
        sides["F.linear_cross_entropy"] = F.linear_cross_entropy
    else:
        missing["F.linear_cross_entropy"] = f"not in torch {torch.__version__}"
    for name, (loss, module, needs_gpu) in _OTHERS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing[name] = "not installed"
            continue
        except Exception as error:  # some fail with a TypeError or a missing symbol
            missing[name] = f"does not import: {type(error).__name__}"
            continue
        if needs_gpu and device.type != "cuda":
            missing[name] = "needs a GPU"
        else:
            sides[name] = loss
    sides["torch.compile"] = torch.compile(plain)  # last: how long it compiles is not known before
    return sides, missing
