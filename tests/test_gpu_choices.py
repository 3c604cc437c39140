"""Which engine the default budgets of several GPUs choose, on machines without one: fake tensors, memory made up."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from var_kernels.kernels import gemm_torch as gemm
from var_kernels.kernels.rows import LogitTransform
from var_kernels.ops import head, plan
from var_kernels.ops.head import Head, HeadOptions, Needs

pytest.importorskip("triton", reason="the backend of CUDA tensors")

# MiB, FLOP/s of a large bf16 GEMM and B/s of a copy, as measured by others.
GPUS = {
    "A100-40GB": (40536, 280e12, 1.35e12),
    "A100-80GB": (81251, 280e12, 1.75e12),
    "H100-80GB": (81559, 650e12, 3.0e12),
    "H200": (143771, 780e12, 4.0e12),
    "RTX 4090": (24564, 150e12, 0.9e12),
}
HEADS = ((2304, 256000), (896, 151936), (4096, 128256), (3584, 152064), (2048, 128256), (1152, 262144), (4096, 151936))
N = 8192


@pytest.fixture(params=GPUS)
def gpu(request, monkeypatch):
    mib, rate, bandwidth = GPUS[request.param]
    monkeypatch.setattr(head, "_cuda_memory", lambda index: mib << 20)
    monkeypatch.setattr(gemm, "_cuda_major", lambda index: 9)
    return request.param, rate, bandwidth


def head_of(n, d, v) -> Head:
    with FakeTensorMode():
        hidden, weight = (torch.empty(size, d, dtype=torch.bfloat16, device="cuda") for size in (n, v))
        labels = torch.empty(n, 1, dtype=torch.int64, device="cuda")
    return Head(
        hidden,
        weight,
        None,
        labels,
        HeadOptions(LogitTransform(), 0.0, torch.float32, head.budget_bytes(None, weight), "triton"),
        Needs(hidden=True, lm_head_weight=True),
    )


@pytest.mark.parametrize(("d", "v"), HEADS)
def test_the_choice_costs_little_under_either_guess(gpu, d, v):
    """The fp32 dW of a chunk is read and written under its GEMM, or after it: nobody knows without a GPU. What is
    chosen takes at most 1.2 times as long as the other, in the one case and in the other.
    """
    _, rate, bandwidth = gpu
    call = head_of(N, d, v)
    rows = max(0, plan.one_pass_rows(call))
    one = plan.one_pass_fits(call)
    if rows == 0 or rows >= N:
        assert one == (rows >= N)
        return
    gemm_s, row_kernels_s = 2 * N * d * v / rate, 6 * N * v / bandwidth
    chunks = [min(rows, N - start) for start in range(0, N, rows)]
    moved_s = 8 * v * d / bandwidth
    under = 2 * gemm_s + sum(max(2 * chunk * d * v / rate, moved_s) for chunk in chunks)
    after = 3 * gemm_s + len(chunks) * moved_s
    two = gemm_s * (4 - plan.cached_columns(call) / v)
    for guess in (under, after):
        chosen, other = (guess, two) if one else (two, guess)
        assert chosen + row_kernels_s <= 1.2 * (other + row_kernels_s), f"{'one' if one else 'two'}: {rows} rows"


@pytest.mark.parametrize(
    ("name", "d", "v", "one"),
    [
        ("A100-40GB", 1152, 262144, False),  # chunks of 161 rows
        ("H100-80GB", 2304, 256000, False),  # 441
        ("A100-40GB", 2048, 128256, False),  # 768
        ("RTX 4090", 896, 151936, False),  # 619
        ("A100-40GB", 896, 151936, True),  # 1896
        ("H100-80GB", 896, 151936, False),  # 6032: two passes keep 95 % of the logits and need no fp32 dW
        ("H200", 2304, 256000, True),  # all
        ("H200", 4096, 128256, True),  # all
    ],
)
def test_one_pass_or_two(name, d, v, one, monkeypatch):
    monkeypatch.setattr(head, "_cuda_memory", lambda index: GPUS[name][0] << 20)
    monkeypatch.setattr(gemm, "_cuda_major", lambda index: 9)
    assert plan.one_pass_fits(head_of(N, d, v)) == one


@pytest.mark.parametrize(
    ("name", "d", "v", "one", "stored"),
    [
        ("H200", 2304, 256000, True, False),  # chunks of 2299 rows, which two passes' two more GEMMs do not reach
        ("H200", 4096, 128256, True, True),  # 4590
        ("H100-80GB", 2048, 128256, True, True),  # 2603
        ("H100-80GB", 2304, 256000, False, False),  # 152
        ("A100-40GB", 2048, 128256, False, False),  # 269
        ("RTX 4090", 896, 151936, False, False),  # 213
    ],
)
def test_kl_in_one_pass_or_two(name, d, v, one, stored, monkeypatch):
    """Two passes of KL compute the logits of both heads again: chunks half as long pay. Stored: the gradient in all
    logits beside a chunk, which serves any upstream gradient.
    """
    monkeypatch.setattr(head, "_cuda_memory", lambda index: GPUS[name][0] << 20)
    monkeypatch.setattr(gemm, "_cuda_major", lambda index: 9)
    pair = head.HeadPair(head_of(N, d, v), head_of(N, d, v), "reverse", 0.5)
    assert plan.chunks_fit(pair) == one
    assert plan.stored_fits(pair) == stored


@pytest.mark.parametrize(("d", "v"), HEADS)
def test_the_default_of_two_heads_computes_logits_once(gpu, d, v):
    """A sum holds its fp32 dW, or the gradient in all logits where that is less (2 N V bytes against 4 V D), and a
    chunk of 512 rows.
    """
    pair = head.HeadPair(head_of(N, d, v), head_of(N, d, v), "reverse", 0.5)
    budget = plan.with_default_budget(pair, known=True).budget
    assert budget - max(pair.budget, 512 * v * 8) <= 4 * v * d
    assert plan.way_of_gradients(plan.with_default_budget(pair, known=True), "auto", known=True) != "recomputed"
    if 4 * d < 2 * N:  # values of their own cannot use an fp32 dW
        assert plan.with_default_budget(pair, known=False) is pair


def test_few_rows_are_one_chunk(monkeypatch):
    """A batch of fewer rows than the shortest chunk takes one pass where the budget holds it."""
    monkeypatch.setattr(head, "_cuda_memory", lambda index: GPUS["H200"][0] << 20)
    monkeypatch.setattr(gemm, "_cuda_major", lambda index: 9)
    assert plan.one_pass_fits(head_of(100, 2048, 128256))
    pair = head.HeadPair(head_of(100, 2048, 128256), head_of(100, 2048, 128256), "reverse", 0.5)
    assert plan.chunks_fit(pair)
