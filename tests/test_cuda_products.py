"""The products as CUDA makes them, on a CPU: 16-bit operands to fp32 results, straight out of the tiles that the row
kernels leave. torch's op exists on CUDA only; here a stand-in computes it, and refuses what that op refuses.
"""

import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks import gpu_probe
from tests.kl_cases import KLCase, run_case
from tests.op_cases import BF16, Case, check_logprob, check_weighted_nll
from var_kernels import linear_logprob, linear_weighted_nll
from var_kernels.kernels import gemm_torch as gemm
from var_kernels.kernels.rows import LogitTransform, RowCoefficients
from var_kernels.losses.weights import weights_kernel
from var_kernels.ops import engines
from var_kernels.ops.backend import choose_backend, use_backend

FP16, CUDA = torch.float16, torch.device("cuda", 0)
CASES = [
    Case("bf16", dtype=BF16, bias=True),
    Case("ragged chunks", dtype=BF16, tight=True, outputs=("lse", "entropy")),
    Case("softcap and smoothing", dtype=BF16, tight=True, options={"softcap": 5.0, "label_smoothing": 0.1}),
    Case("frozen head", dtype=BF16, frozen=("weight",), tight=True),
    Case("one row", dtype=BF16, shape=(1, 72, 507), ignored=0.0),
    Case("several targets", dtype=BF16, targets=2),
    Case("fp16", dtype=FP16, bias=True, tight=True),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def _check(left, right, out_dtype, out=None):
    """torch's own conditions, and layouts that cuBLAS reads or writes without a copy."""
    assert left.dtype == right.dtype
    assert left.dtype in (BF16, FP16)
    assert out_dtype == torch.float32
    for t in [left, right] + ([] if out is None else [out]):
        assert 1 in t.stride() or 1 in t.shape, f"a copy of {tuple(t.shape)} with strides {t.stride()}"
    if out is not None:
        assert out.dtype == out_dtype
        assert out.shape == (left.shape[0], right.shape[1])


@pytest.fixture(params=["torch", "triton"])
def as_on_cuda(request, monkeypatch, small_tiles):
    """Yields how many products went to fp32."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("Triton runs on the GPU of this machine")
        from tests import triton_interpreter

        triton_interpreter.mend()
    plain_mm, count = torch.mm, SimpleNamespace(products=0)

    def wide_product(left, right):
        count.products += 1
        return plain_mm(left.float(), right.float())

    def mm(left, right, *, out_dtype=None, out=None):
        if out_dtype is None:
            return plain_mm(left, right, out=out)
        _check(left, right, out_dtype, out)
        result = wide_product(left, right)
        return result if out is None else out.copy_(result)

    def addmm(total, left, right, *, out_dtype, out):
        _check(left, right, out_dtype, out)
        assert out is total, "another tensor: torch would copy it first"
        assert total.shape[0] > 1, "one row is taken for a bias"
        return out.add_(wide_product(left, right))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(gemm, "widens", lambda operand, device: operand.itemsize == 2)
    with use_backend(request.param):
        yield count


@cases
def test_logprob(case, as_on_cuda):
    check_logprob(case)
    assert as_on_cuda.products


@cases
def test_one_pass(case, as_on_cuda):
    budget = {"workspace_mb": 0.3} if case.tight else {}  # chunks of rows, and an fp32 dW
    check_weighted_nll(replace(case, tight=False), "one_pass", z_loss=0.01, op=partial(linear_weighted_nll, **budget))
    assert as_on_cuda.products


@pytest.mark.parametrize("factors", [torch.float32, BF16], ids=str)
def test_low_rank(factors, as_on_cuda):
    """A gradient of every factor; fp32 ones are rounded for the products of the gradients alone."""
    case = Case("", dtype=BF16)
    hidden, weight, labels, _ = case.inputs()
    left, right = (t.requires_grad_() for t in case.low_rank(factors))
    linear_logprob(hidden, weight, labels, low_rank=(left, right), workspace_mb=0.1).sum().backward()
    truth = [t.detach().double().requires_grad_() for t in (hidden, weight, left, right)]
    logits = truth[0] @ truth[1].T + truth[2] @ truth[3].T
    kept = labels != -100
    logits.log_softmax(-1)[kept, labels[kept]].sum().backward()
    for got, expected in zip((hidden, weight, left, right), truth, strict=True):
        assert (got.grad.double() - expected.grad).norm() <= 2**-7 * expected.grad.norm()


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_token_kl(direction, engine, as_on_cuda):
    case = KLCase("bf16", Case("", dtype=BF16, tight=True), ref_dtype=BF16, ref_bias=True)
    run_case(case, direction, engine, "cpu")
    assert as_on_cuda.products


@pytest.mark.parametrize("major", [7, 8, 9, 12])
def test_what_torch_widens(major, monkeypatch):
    """As torch 2.11 and 2.13 refuse it: bf16 before compute capability 8.0, fp16 where sums in fp16 are allowed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, 0))
    gemm._cuda_major.cache_clear()
    assert gemm.widens(BF16, CUDA) == (major >= 8)
    assert gemm.widens(FP16, CUDA)
    assert not gemm.widens(FP16, torch.device("cpu"))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_fp16_accumulation=True))
    assert not gemm.widens(FP16, CUDA)
    gemm._cuda_major.cache_clear()


@pytest.mark.parametrize("operand", [BF16, FP16], ids=str)
def test_a_compiled_call_takes_it_for_a_constant(operand):
    """Traced, a cached function would warn, and no graph holds torch's setting of sums in fp16."""
    compiled = torch.compile(lambda x: x * gemm.widens(operand, CUDA), fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(torch.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_fake_tensors_need_no_gpu():
    with FakeTensorMode():
        assert gemm.widens(BF16, CUDA)
        hidden, weight = (torch.empty(*shape, 72, dtype=BF16, device="cuda") for shape in ((4, 6), (507,)))
        labels = torch.empty(4, 6, dtype=torch.int64, device="cuda")
        assert linear_logprob(hidden, weight, labels, num_active=24).shape == (4, 6)


def test_weights_of_fake_tensors_are_launched_nowhere():
    """Triton reads addresses, which they have none of."""
    pytest.importorskip("triton", reason="triton is not installed")
    with FakeTensorMode():
        rewards, labels = torch.empty(4, device="cuda"), torch.empty(4, 6, dtype=torch.int64, device="cuda")
        assert weights_kernel(rewards, "batch", None) is None
        assert weights_kernel(rewards, "batch", None, labels) is None


def test_the_probe_of_a_gpu_is_right(as_on_cuda, monkeypatch):
    """Every part of it, one pass in several chunks; a part that fails or is wrong is named, and ends it only where all
    the rest stands on it.
    """
    if choose_backend(torch.device("cpu"), torch.float32)[0] != "triton":
        pytest.skip("the fused forward runs on Triton only")
    monkeypatch.setattr(gpu_probe, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_probe, "N", 240)
    monkeypatch.setattr("var_kernels.kernels.rows_triton.BLOCK_COLUMNS", 4096)  # fewer steps of the interpreter
    said, chunks = [], []
    plan = engines.one_pass_plan
    monkeypatch.setattr(engines, "one_pass_plan", lambda *a: (chunks.append(plan(*a).rows), plan(*a))[1])
    assert gpu_probe.run(say=said.append) == 0
    assert [line.split(":")[1].split(",")[0] for line in said] == [" right"] * len(gpu_probe.PARTS), said
    assert len(chunks) == 1
    assert 32 <= chunks[0] < 160

    def fails():
        raise RuntimeError("no such luck")

    right, wrong = (lambda: {"fp32 loss": 0.0}), (lambda: {"fp32 loss": 0.0, "bf16 dweight": float("nan")})
    for parts, status, lines in (
        ((right, right, fails, wrong), 0, (" right", " right", " FAILED", " WRONG")),
        ((right, fails, right, right), gpu_probe.BROKEN, (" right", " FAILED")),
        ((wrong, right), 0, (" WRONG", " right")),
    ):
        said.clear()
        assert gpu_probe.run(dict(zip("abcd", parts, strict=False)), said.append) == status
        assert tuple(line.split(":")[1].split(",")[0] for line in said) == lines


@pytest.fixture
def on_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(gemm, "_ROCM_WIDENS", {})


def _stand_ins(wrong):
    """torch.mm and torch.addmm of CUDA on a CPU, with ``wrong`` applied to each product."""
    plain = torch.mm

    def mm(left, right, *, out_dtype, out):
        return out.copy_(wrong(plain(left.float(), right.float())))

    def addmm(total, left, right, *, out_dtype, out):
        return out.add_(wrong(plain(left.float(), right.float())))

    return mm, addmm


@pytest.mark.parametrize("operand", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (lambda t: t, None),
        (lambda t: t.to(BF16).float(), "logits: "),  # sums that were rounded
        (lambda t: t.index_fill(1, torch.tensor([t.shape[1] - 1]), 0.0), "logits: "),  # a last column that is not there
        (lambda t: t * (t.shape != (96, 128)), "dweight: "),  # one layout alone
    ],
    ids=["right", "rounded", "tail", "one layout"],
)
def test_a_wrong_product_is_noticed(wrong, fault, operand, monkeypatch):
    mm, addmm = _stand_ins(wrong)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    found = gemm.wide_products_fault(operand, torch.device("cpu"))
    assert (found or "").startswith(fault or "")
    assert (found is None) == (fault is None)


def test_a_library_that_refuses_is_noticed(monkeypatch):
    def refuses(*args, **options):
        raise RuntimeError("gemm input type at::BFloat16 and output type float is not supported for ROCm")

    monkeypatch.setattr(torch, "mm", refuses)
    assert "not supported for ROCm" in gemm.wide_products_fault(BF16, torch.device("cpu"))


@pytest.mark.parametrize("operand", [BF16, FP16], ids=str)
def test_what_rocm_widens(operand, on_rocm, monkeypatch):
    """CK never; other libraries what a check at the first use says, once for each."""
    library, checked = SimpleNamespace(now=torch._C._BlasBackend.Ck), []
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda: library.now)
    monkeypatch.setattr(gemm, "wide_products_fault", lambda *about: checked.append(about))
    assert not gemm.widens(operand, CUDA)
    assert not checked
    library.now = torch._C._BlasBackend.Cublas
    assert gemm.widens(operand, CUDA)
    assert gemm.widens(operand, CUDA)
    assert checked == [(operand, CUDA)]
    monkeypatch.setattr(gemm, "wide_products_fault", lambda *about: checked.append(about) or "dhidden: 3 off")
    assert gemm.widens(operand, CUDA)  # the verdict on this library stays
    library.now = torch._C._BlasBackend.Cublaslt
    with pytest.warns(UserWarning, match=r"wrong on device 0 with .*Cublaslt \(dhidden: 3 off\): operands are upcast"):
        assert not gemm.widens(operand, CUDA)
    assert not gemm.widens(operand, CUDA)
    assert len(checked) == 2


@pytest.mark.parametrize("where", ["capture", "fake tensors", "compile"])
def test_nothing_is_checked_where_nobody_may_wait(where, on_rocm, monkeypatch):
    """Under capture and tracing the library is trusted, and checked at the next call."""
    checked = []
    monkeypatch.setattr(gemm, "wide_products_fault", lambda *about: checked.append(about))
    if where == "capture":
        with monkeypatch.context() as capturing:
            capturing.setattr(torch.cuda, "is_available", lambda: True)
            capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            assert gemm.widens(BF16, CUDA)
    elif where == "fake tensors":
        with FakeTensorMode():
            assert gemm.widens(BF16, CUDA)
    else:

        def traced(x):
            return x + 1 if gemm.widens(BF16, CUDA) else x - 1

        compiled = torch.compile(traced, fullgraph=True, backend="eager")
        assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    assert not checked
    assert gemm.widens(BF16, CUDA)
    assert checked == [(BF16, CUDA)]


def test_a_launch_takes_plain_floats(monkeypatch):
    """A softcap from numpy works in the interpreter, but not in a launch on a GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    from var_kernels.kernels import rows_triton

    given = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **named: given.update(named)

    monkeypatch.setattr(rows_triton, "_row_grad_kernel", Kernel())
    tile, labels, ones = torch.zeros(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2)
    transform = LogitTransform(softcap=np.float32(5))
    rows_triton.row_grad(
        tile, labels, torch.ones(2, 2), RowCoefficients(ones, ones[:, None]), 0, None, transform, torch.float32
    )
    assert {type(given[name]) for name in ("scale", "cap", "inner", "cap_slope")} == {float}
