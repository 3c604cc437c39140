"""bf16 operands to fp32 logits in C++ (csrc/gemm.cpp), which torch's own GEMMs on a CPU do not do."""

import functools

import torch
from torch import Tensor

from . import rows_native


@functools.cache
def _has_bf16_dot() -> bool:
    return rows_native.obstacle() is None and torch.ops.var_kernels_native.has_bf16_dot()


def takes(hidden_nd: Tensor, lm_head_weight_vd: Tensor) -> bool:
    """Whether this machine multiplies such operands: bf16 in pairs along D, rows of adjacent elements."""
    operands = (hidden_nd, lm_head_weight_vd)
    return (
        all(t.device.type == "cpu" and t.dtype == torch.bfloat16 and t.stride(1) == 1 for t in operands)
        and hidden_nd.shape[1] % 2 == 0
        and _has_bf16_dot()
    )


def logits_into(out_nv: Tensor, hidden_nd: Tensor, lm_head_weight_vd: Tensor) -> None:
    """out = hidden W^T: exact products, fp32 sums in an order that depends on D alone."""
    torch.ops.var_kernels_native.logits_into(out_nv, hidden_nd, lm_head_weight_vd)
