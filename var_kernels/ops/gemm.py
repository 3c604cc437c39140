"""The three GEMMs of the head, with accumulation in the tile's dtype whatever the operands' dtype is.

CUDA: cuBLAS takes 16-bit operands to an fp32 result. CPU: torch has no such GEMM. The C++ kernels have one for bf16,
given the instructions; elsewhere operands of the forward GEMM are upcast (exact products, fp32 sums). Gradient GEMMs
run in 16 bit there and round each partial result once.
"""

import torch
from torch import Tensor

from var_kernels.kernels import gemm_native


def upcasts(hidden_nd: Tensor, lm_head_weight_vd: Tensor, tile: torch.dtype, backend: str) -> bool:
    """Whether the forward GEMM needs fp32 copies of its operands."""
    if hidden_nd.dtype == tile or hidden_nd.device.type == "cuda":
        return False
    return backend != "native" or not gemm_native.takes(hidden_nd, lm_head_weight_vd)


def partial_bytes(operand: torch.dtype, device: torch.device) -> int:
    """Bytes an element of a partial result in 16 bit, and of the fp32 copy that torch makes to add it."""
    return 2 + 4 if operand.itemsize == 2 and device.type != "cuda" else 0


def logits_into(out_nv: Tensor, hidden_nd: Tensor, lm_head_weight_vd: Tensor) -> None:
    """out = hidden W^T, in out's dtype; hidden comes in that dtype where ``upcasts`` asks for it."""
    dtype = out_nv.dtype
    if hidden_nd.dtype == dtype:
        torch.mm(hidden_nd, lm_head_weight_vd.to(dtype).t(), out=out_nv)
    elif out_nv.device.type == "cuda":
        torch.mm(hidden_nd, lm_head_weight_vd.t(), out_dtype=dtype, out=out_nv)
    else:
        gemm_native.logits_into(out_nv, hidden_nd, lm_head_weight_vd)


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right for operands of one dtype, written once: out has that dtype, or a wider one."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif out.device.type == "cuda":
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(left, right))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; total is in the operands' dtype or a wider one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right))
