"""What doctor says of the engines is what the ops then do."""

import pytest
import torch

from tests.products import Products, took_one_pass
from var_kernels import linear_logprob, linear_token_kl, linear_weighted_nll, machine
from var_kernels.cli.explain import explain_engines
from var_kernels.kernels import rows_native, rows_torch
from var_kernels.ops import head, plan
from var_kernels.ops.backend import use_backend
from var_kernels.ops.head import budget_bytes

CPU = torch.device("cpu")
N, D, V = 512, 32, 6000


def problem(dtype):
    hidden, weight = torch.randn(N, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspace_mb", [4, 16, 64])
def test_explanations_are_what_happens(workspace_mb, dtype, monkeypatch):
    monkeypatch.setattr(plan, "_MIN_CACHED_DEPTH", 1)  # part of the logits is cached too
    hidden, weight, labels = problem(dtype)
    with use_backend("torch"):
        said = explain_engines(N, D, V, dtype, CPU, workspace_mb)
        loss = linear_weighted_nll(hidden, weight, labels, None, workspace_mb=workspace_mb)
        assert said["VAR, SFT"].startswith("one pass" if took_one_pass(loss) else "two passes")
        logp = linear_logprob(hidden, weight, labels, workspace_mb=workspace_mb)
        with Products() as products:
            logp.sum().backward()
        slices = sum(m for m, _, k in products.sizes if k == D) // N
        kept = "hold all logits" in said["DPO"]
        assert kept == (not slices)
        if not kept:
            assert f"recomputes {slices} slices" in said["DPO"]
        with torch.no_grad(), products:
            products.clear()
            linear_logprob(hidden, weight, labels, workspace_mb=workspace_mb)
        rows, columns, _ = products.sizes[0]
        assert f"tiles of {rows:,} x {columns:,} logits" in said["scoring"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspace_mb", [2, 8, 64, None])
def test_distillation_takes_the_gemms_that_are_said(workspace_mb, dtype, monkeypatch):
    monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", 1 << 14)  # the temporaries of its usual blocks take 3 MiB
    hidden, weight, _ = problem(dtype)
    with use_backend("torch"):
        said = explain_engines(N, D, V, dtype, CPU, workspace_mb)["distill"]
        with Products() as products:
            options = {"reduction": "sum", "workspace_mb": workspace_mb}
            linear_token_kl(hidden, weight, hidden.detach(), weight.detach(), **options).backward()
    gemms = sum(m * n * k for m, n, k in products.sizes) / (N * D * V)
    assert f"{gemms:.3g} GEMMs" in said
    assert gemms == (6 if workspace_mb == 2 else 4)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(
    ("shape", "held"),
    [
        ((1024, 1024, 32000), "126 MiB hold the gradient in all logits"),
        ((4096, 512, 50257), "226 MiB hold chunks"),
        ((512, 2048, 128256), "375 MiB hold the gradient in all logits"),
        ((2048, 896, 151936), "777 MiB hold chunks"),
        ((4096, 64, 262144), "MiB hold chunks"),  # more than half of the head
    ],
)
def test_distillation_computes_logits_once_by_default(backend, shape, held):
    """In bf16 beside the smaller of an fp32 dW and the gradient in all logits."""
    if backend == "native" and rows_native.obstacle():
        pytest.skip(rows_native.obstacle())
    with use_backend(backend):
        said = explain_engines(*shape, torch.bfloat16, CPU)["distill"]
    assert "4 GEMMs" in said
    assert held in said


@pytest.mark.skipif(rows_native.obstacle() is not None, reason="plain torch needs more than the budget")
@pytest.mark.parametrize("d", [896, 2048, 4096, 1 << 14])
def test_a_deep_head_has_room_for_the_sums_of_a_slice(d):
    """More rows than a block of the C++ GEMM: dW of a slice is summed up in fp32, in addition to a cached tile."""
    assert "6 GEMMs" in explain_engines(2048, d, 128256, torch.bfloat16, CPU, 130)["distill"]


def test_nothing_large_is_allocated():
    said = explain_engines(1 << 20, 1 << 14, 1 << 18, torch.bfloat16, CPU, 4096)
    assert set(said) == {"VAR, SFT", "DPO", "distill", "scoring"}


def test_fp16():
    assert "underflow" in explain_engines(N, D, V, torch.float16, CPU)["VAR, SFT"]


def test_the_default_of_16_bit_holds_the_sums_of_dw_and_chunks_of_512_rows(monkeypatch):
    """Where that is at most 1/32 of the machine's memory; half of the weight elsewhere."""
    weight = torch.empty(151936, 896, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(head, "_cpu_memory", lambda: 32 << 30)
    said = explain_engines(4096, 896, 151936, torch.bfloat16, CPU)["VAR, SFT"]
    assert said.startswith("one pass, 3 GEMMs: "), said
    rows, predicted = int(said.split("chunks of ")[1].split()[0]), int(said.split("; ")[1].split()[0])
    # Plain torch copies operands in addition.
    assert (512 if rows_native.obstacle() is None else 400) <= rows < 560, said
    assert predicted << 20 <= budget_bytes(None, weight) <= 4 * 151936 * 896 + 560 * 151936 * 2 + (16 << 20), said
    monkeypatch.setattr(head, "_cpu_memory", lambda: 16 << 30)
    assert budget_bytes(None, weight) == 129 << 20


def test_the_default_counts_the_memory_that_a_container_leaves(monkeypatch):
    monkeypatch.setattr(machine, "total_memory", lambda: 64 << 30)
    for limit, usable in ((8 << 30, 8 << 30), (1 << 62, 64 << 30), (None, 64 << 30)):
        monkeypatch.setattr(machine, "memory_limit", lambda limit=limit: limit)
        assert machine.usable_memory.__wrapped__() == usable
    monkeypatch.setattr(machine, "total_memory", lambda: None)
    assert machine.usable_memory.__wrapped__() == 0


def test_the_default_of_fp32_follows_the_head():
    """Half of the weight on a CPU, never less than 64 MiB."""
    said = explain_engines(2048, 896, 151936, torch.float32, CPU)  # 519 MiB
    assert said["VAR, SFT"].startswith("one pass, 3 GEMMs: 259 MiB hold chunks of")
    assert "64 MiB hold" in explain_engines(2048, 896, 16000, torch.float32, CPU)["DPO"]
