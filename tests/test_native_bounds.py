"""The C++ kernels read and write nothing beside their tensors: every tensor ends where an unmapped page begins."""

import subprocess
import sys

import pytest

from var_kernels.kernels import rows_native

pytestmark = pytest.mark.skipif(rows_native.obstacle() is not None, reason=str(rows_native.obstacle()))

SCRIPT = """
import ctypes, mmap
import torch
from var_kernels.kernels import gemm_native, rows_native
from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats

libc, kept = ctypes.CDLL(None, use_errno=True), []

def guarded(t):
    size = t.numel() * t.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert libc.mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    kept.append(region)
    copy = torch.frombuffer(region, dtype=t.dtype, count=t.numel(), offset=pages - size).view(t.shape)
    return copy.copy_(t)

n, k = 2, 1
small = lambda: guarded(torch.ones(n))
for level in range(rows_native.best_level() + 1):
    rows_native.LEVEL = level
    for columns in (1, 3, 17, 63, 507, 1025):
        for dtype in rows_native.DTYPES:
            logits, bias = guarded(torch.randn(n, columns).to(dtype)), guarded(torch.randn(columns).to(dtype))
            labels = guarded(torch.full((n, k), columns - 1))
            stats = RowStats.empty(n, k, logits, entropy=True, mean=True, argmax=True)
            stats.others_N, stats.top_N = torch.zeros(n), torch.zeros(n)
            stats = RowStats(**{name: None if t is None else guarded(t) for name, t in vars(stats).items()})
            coefficients = RowCoefficients(small(), guarded(torch.ones(n, k)), small(), small())
            for bias_v in (None, bias):
                rows_native.row_stats(logits, labels, stats, 0, bias_v, LogitTransform())
                if dtype != torch.float16:
                    out = guarded(torch.ones(n, columns).to(dtype))
                    rows_native.row_exp(logits, labels, stats, 0, bias_v, LogitTransform(), out, guarded(out.clone()))
            rows_native.row_grad(logits, labels, stats.norms_2N, coefficients, 0, bias, LogitTransform(), dtype)
for level in gemm_native.levels():
    gemm_native.LEVEL = level
    for n, d, v in ((1, 1, 1), (7, 30, 65), (5, 515, 130), (33, 2049, 17)):
        for transposed in (False, True):
            shapes = ((d, n), (d, v)) if transposed else ((n, d), (v, d))
            left, right = (guarded(torch.randn(shape).bfloat16()) for shape in shapes)
            operands = (left.t(), right) if transposed else (left, right.t())
            for dtype in (torch.float32, torch.bfloat16):
                gemm_native.multiply(guarded(torch.zeros(n, v, dtype=dtype)), *operands)
print("inside", len(kept))
if BEYOND:
    rows_native.exp(guarded(torch.zeros(5)).as_strided((5000,), (1,)))
"""


@pytest.mark.parametrize("beyond", [False, True], ids=["inside", "the guard works"])
def test_nothing_beside_the_tensors_is_touched(beyond):
    done = subprocess.run(
        [sys.executable, "-c", f"BEYOND = {beyond}\n{SCRIPT}"], capture_output=True, text=True, check=False
    )
    assert "inside" in done.stdout, done.stderr[-500:] or f"killed by signal {-done.returncode}"
    assert (done.returncode == 0) is not beyond
