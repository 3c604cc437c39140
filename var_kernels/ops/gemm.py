"""The three GEMMs of the head, with accumulation in the tile's dtype whatever the operands' dtype is.

CUDA: cuBLAS takes 16-bit operands to an fp32 result (``widens``). CPU: torch has no such GEMM. The C++ kernels have one
for bf16, given the instructions; elsewhere operands of the forward GEMM are upcast (exact products, fp32 sums), and
gradient GEMMs run in 16 bit and round each partial result once.
"""

import functools
import warnings

import torch
from torch import Tensor

from var_kernels.kernels import gemm_native
from var_kernels.kernels.compile_time import compile_time
from var_kernels.ops.backend import own_gemm

# Rows of fp32 sums at a time, of a product too deep to be rounded as it is summed.
ROUNDED_ROWS = 1024


def widens(operand: torch.dtype, device: torch.device) -> bool:
    """Whether torch's GEMM takes 16-bit operands to an fp32 result: on CUDA, but for bf16 before Ampere and for fp16
    where sums in fp16 are allowed; on ROCm where such products are right.
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
    return torch.cuda.get_device_capability(index)[0]


# (operands, device, BLAS library) -> verdict.
_ROCM_WIDENS: dict[tuple, bool] = {}


@compile_time
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
    """What is wrong with small products of every layout that the engines use, or None. Operands are small integers, and
    sums of them exact in fp32 in any order, but not in 16 bit.
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
            if not torch.equal(once.cpu(), a @ b) or not torch.equal(twice.cpu(), 2 * (a @ b)):
                return f"{name}: {(once.cpu() - a @ b).abs().max():g} off"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def upcasts(hidden_nd: Tensor, lm_head_weight_vd: Tensor, tile: torch.dtype, backend: str) -> bool:
    """Whether the forward GEMM needs fp32 copies of its operands."""
    if hidden_nd.dtype == tile or widens(hidden_nd.dtype, hidden_nd.device):
        return False
    return not _in_cpp(backend, tile, hidden_nd, lm_head_weight_vd.t())


def _in_cpp(backend: str, out: torch.dtype, left: Tensor, right: Tensor) -> bool:
    gemm = own_gemm(backend)
    return gemm is not None and gemm.supports(out, left, right)


def ends_in_exp(hidden_nd: Tensor, lm_head_weight_vd: Tensor, backend: str) -> bool:
    """Whether the forward GEMM runs ``row_exp`` on its sums (``gemm_native.product_exp``)."""
    gemm = own_gemm(backend)
    return gemm is not None and gemm.supports_exp(hidden_nd, lm_head_weight_vd)


def rounds_sums(operand: torch.dtype, backend: str) -> bool:
    """Whether gradient GEMMs sum in fp32 in place, and round once what they write in this dtype."""
    gemm = own_gemm(backend)
    return gemm is not None and operand == torch.bfloat16 and gemm.available()


def logits_into(out_nv: Tensor, hidden_nd: Tensor, lm_head_weight_vd: Tensor, backend: str, add: bool = False) -> None:
    """out = hidden W^T, or out += with ``add``, in out's dtype; hidden has that dtype where ``upcasts`` asks for it."""
    dtype, weight_dv = out_nv.dtype, lm_head_weight_vd.t()
    if add:
        add_product(out_nv, hidden_nd, weight_dv.to(dtype) if hidden_nd.dtype == dtype else weight_dv, backend)
    elif _in_cpp(backend, dtype, hidden_nd, weight_dv):
        gemm_native.product_into(out_nv, hidden_nd, weight_dv)
    elif hidden_nd.dtype == dtype:
        torch.mm(hidden_nd, weight_dv.to(dtype), out=out_nv)
    else:
        torch.mm(hidden_nd, weight_dv, out_dtype=dtype, out=out_nv)


def low_rank_into(out_nv: Tensor, left_nr: Tensor, right_vr: Tensor) -> None:
    """out = left right^T in out's dtype, whatever the factors' is: few columns, so copies are cheap."""
    dtype = out_nv.dtype
    torch.mm(left_nr.to(dtype), right_vr.to(dtype).t(), out=out_nv)


def product_into(out: Tensor, left: Tensor, right: Tensor, backend: str) -> None:
    """out = left @ right for operands of one dtype, written once: out has that dtype, or a wider one."""
    if _in_cpp(backend, out.dtype, left, right):
        gemm_native.product_into(out, left, right)
    elif out.dtype == torch.bfloat16 and _in_cpp(backend, torch.float32, left, right):
        # Too deep to be rounded as it is summed.
        for start in range(0, out.shape[0], ROUNDED_ROWS):
            out_md, left_md = out[start : start + ROUNDED_ROWS], left[start : start + ROUNDED_ROWS]
            total_md = torch.empty_like(out_md, dtype=torch.float32, memory_format=torch.contiguous_format)
            gemm_native.product_into(total_md, left_md, right)
            out_md.copy_(total_md)
    elif out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif widens(left.dtype, left.device):
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(left, right))


def add_product(total: Tensor, left: Tensor, right: Tensor, backend: str) -> None:
    """total += left @ right; total is in the operands' dtype or a wider one."""
    if total.dtype == torch.float32 and _in_cpp(backend, total.dtype, left, right):
        gemm_native.product_into(total, left, right, add=True)
    elif total.dtype == left.dtype:
        total.addmm_(left, right)
    elif widens(left.dtype, left.device):
        if total.shape[0] == 1:
            # To torch one row is a bias: it goes to cuBLASLt, which is told that every address is aligned.
            total += torch.mm(left, right, out_dtype=total.dtype)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right))
