"""VAR's weights by kernel: whether one runs, and the call."""

import importlib

import torch
from torch import Tensor

from var_kernels.ops.backend import triton_obstacle, uses_triton


def takes_weights_kernel(device: torch.device, num_sequences: int) -> bool:
    """On a GPU, for a batch that the kernel holds; on a CPU where the interpreted backend is forced, for tests."""
    if device.type == "meta" or triton_obstacle(device, torch.float32) or torch.compiler.is_compiling():
        return False
    return uses_triton(device) and 0 < num_sequences <= _kernels().MAX_SEQUENCES


def weights_by_kernel(
    rewards: Tensor, ref_logp: Tensor | None, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """weight (B,), log Z, ess (), weights over the tokens or None: see ``kernels/weights_triton.py``."""
    return _kernels().var_weights(rewards, ref_logp, **options)


def _kernels():
    return importlib.import_module("var_kernels.kernels.weights_triton")
