"""The three GEMMs of the head, with accumulation in the tile's dtype whatever the operands' dtype is.

CUDA: cuBLAS takes 16-bit operands to an fp32 result. CPU: no such GEMM, so operands of the forward GEMM are upcast
    (exact products,
fp32 sums), while gradient GEMMs run in 16 bit and round each partial result once.
"""

import torch
from torch import Tensor


def upcasts(operand: torch.dtype, tile: torch.dtype, device: torch.device) -> bool:
    """Whether the forward GEMM needs fp32 copies of its operands."""
    return operand != tile and device.type != "cuda"


def logits_into(out_nv: Tensor, hidden_nd: Tensor, lm_head_weight_vd: Tensor) -> None:
    """out = hidden W^T, in out's dtype; hidden may already be upcast."""
    dtype, weight_dv = out_nv.dtype, lm_head_weight_vd.t()
    if hidden_nd.dtype == weight_dv.dtype == dtype:
        torch.mm(hidden_nd, weight_dv, out=out_nv)
    elif upcasts(weight_dv.dtype, dtype, out_nv.device):
        torch.mm(hidden_nd.to(dtype), weight_dv.to(dtype), out=out_nv)
    else:
        torch.mm(hidden_nd, weight_dv, out_dtype=dtype, out=out_nv)


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
