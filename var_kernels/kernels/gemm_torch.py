"""The head's matrix products by torch's GEMMs, with accumulation in the tile's dtype whatever the operands' dtype is.

CUDA: cuBLAS takes 16-bit operands to an fp32 result (``widens``). CPU: torch has no such GEMM: operands of the logits'
are upcast (exact products, fp32 sums), and those of gradients run in 16 bit and round each partial result once. The
C++ kernels have one for bf16 (``gemm_native``, which has the same functions).
"""

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .compile_time import compile_time


@compile_time
def widens(operand: torch.dtype, device: torch.device) -> bool:
    """Return whether torch's GEMM makes an fp32 result of 16-bit operands: on CUDA, but for bf16 before Ampere and for
    fp16 where sums in fp16 are allowed; on ROCm where such products are right.
    """
    if device.type != "cuda":
        return False
    if operand == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        return False
    if torch.version.hip is not None:
        return _rocm_widens(operand, device.index or 0)
    return operand == torch.float16 or _cuda_major(device.index or 0) >= 8


@functools.cache
def _cuda_major(index: int) -> int:
    if not torch.cuda.is_available():  # a fake tensor's device
        return 8
    return torch.cuda.get_device_capability(index)[0]


# (operands, device, BLAS library) -> verdict.
_ROCM_WIDENS: dict[tuple, bool] = {}


def _rocm_widens(operand: torch.dtype, index: int) -> bool:
    """CK has no such GEMM, and hipBLASLt has had wrong ones: small products are checked at the first use. Where the
    device may not be waited for, under capture or tracing, an unchecked library is trusted.
    """
    library = torch.backends.cuda.preferred_blas_library()
    if library == torch._C._BlasBackend.Ck:
        return False
    key = (operand, index, library)
    if key not in _ROCM_WIDENS:
        if _may_not_wait():
            return True
        why = wide_products_fault(operand, torch.device("cuda", index))
        if why:
            warnings.warn(
                f"torch's GEMM of {operand} operands to an fp32 result is wrong on device {index} with {library} "
                f"({why}): operands are upcast, which takes time and memory; "
                "torch.backends.cuda.preferred_blas_library chooses another library",
                stacklevel=2,
            )
        _ROCM_WIDENS[key] = why is None
    return _ROCM_WIDENS[key]


def _may_not_wait() -> bool:
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    traced = torch._guards.TracingContext.try_get() is not None or torch.compiler.is_compiling()
    return fake is not None or traced or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def wide_products_fault(operand: torch.dtype, device: torch.device) -> str | None:
    """The fault of small products in the layouts that the engines use, or None. Operands are small integers, whose
    sums are exact in fp32 in any order, but not in 16 bit.
    """
    n, d, v = 48, 128, 96
    counted = torch.arange(n * v + d * (n + v), dtype=torch.int64) * 7919 % 17 - 8
    dlogits_nv, hidden_nd, weight_vd = counted.float().split([n * v, n * d, v * d])
    plain = dlogits_nv.view(n, v), hidden_nd.view(n, d), weight_vd.view(v, d)
    dlogits_nv, hidden_nd, weight_vd = (t.to(device, operand) for t in plain)
    # As the row kernels leave it: in rows of the fp32 tile's stride.
    dlogits_nv = torch.cat([dlogits_nv, dlogits_nv], 1)[:, :v]
    try:
        for name, (left, right), (a, b) in (
            ("logits", (hidden_nd, weight_vd.t()), (plain[1], plain[2].t())),
            ("dhidden", (dlogits_nv, weight_vd), (plain[0], plain[2])),
            ("dweight", (dlogits_nv.t(), hidden_nd), (plain[0].t(), plain[1])),
        ):
            once = torch.empty(left.shape[0], right.shape[1], device=device)
            torch.mm(left, right, out_dtype=torch.float32, out=once)
            twice = once.clone()
            torch.addmm(twice, left, right, out_dtype=torch.float32, out=twice)
            # Read on the host: once a device and dtype, before the first product.
            if not torch.equal(once.cpu(), a @ b) or not torch.equal(twice.cpu(), 2 * (a @ b)):
                return f"{name}: {(once.cpu() - a @ b).abs().max():g} off"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


class Traits(NamedTuple):
    """Needs and abilities of the products of a head's operands.

    upcasts: the logits' GEMM needs copies of its operands in the tile's dtype. ends_in_exp: it runs ``row_exp`` on its
        sums. partial_bytes: of an element of a gradient's partial result; rounding_bytes: of sums in addition to
        gradients in the operands' dtype.
    """

    upcasts: bool
    ends_in_exp: bool
    partial_bytes: int
    rounding_bytes: int


def traits(hidden_nd: Tensor, lm_head_weight_vd: Tensor, tile: torch.dtype) -> Traits:
    operand = hidden_nd.dtype
    if operand.itemsize != 2 or widens(operand, hidden_nd.device):
        return Traits(False, False, 0, 0)
    # A partial result in 16 bit, and the fp32 copy that torch makes to add it.
    return Traits(operand != tile, False, 2 + 4, 0)


def logits_into(out_nv: Tensor, hidden_nd: Tensor, lm_head_weight_vd: Tensor, add: bool = False) -> None:
    """out = hidden W^T, or out += with ``add``, in out's dtype; hidden has that dtype with ``upcasts``."""
    dtype, weight_dv = out_nv.dtype, lm_head_weight_vd.t()
    if hidden_nd.dtype == dtype:
        weight_dv = weight_dv.to(dtype)
    if add:
        add_product(out_nv, hidden_nd, weight_dv)
    elif hidden_nd.dtype == dtype:
        torch.mm(hidden_nd, weight_dv, out=out_nv)
    else:
        torch.mm(hidden_nd, weight_dv, out_dtype=dtype, out=out_nv)


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right for operands of one dtype, written once: out has that dtype, or a wider one."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif widens(left.dtype, left.device):
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(left, right))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; total is in the operands' dtype or a wider one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif widens(left.dtype, left.device):
        if total.shape[0] == 1:
            # To torch one row is a bias: it goes to cuBLASLt, which is told that every address is aligned.
            total += torch.mm(left, right, out_dtype=total.dtype)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right))
