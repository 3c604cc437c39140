"""Rows of an odd vocabulary in Triton: loads and stores reach the padded end, and what lies there changes nothing."""

import pytest
import torch

from tests.conftest import TARGETS
from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats, aligned

pytest.importorskip("triton", reason="triton is not installed")
from var_kernels.kernels import rows_triton

N, V = 5, 507
on_triton = pytest.mark.parametrize("target", [p for p in TARGETS if "triton" in p.id], indirect=True)


def tile(dtype, device, behind: float):
    """Rows of V logits, and ``behind`` them."""
    logits = torch.full((N, aligned(V)), behind, dtype=dtype, device=device)[:, :V]
    logits.copy_(torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * 3)
    return logits


def results(logits, stored):
    """Of the three kernels: statistics, exponentials, gradient."""
    device, transform = logits.device, LogitTransform(0.5, 5.0)
    labels = torch.tensor([[0], [V - 1], [7], [100], [300]], device=device)
    stats = RowStats.empty(N, 1, logits, entropy=True, mean=True, argmax=True)
    rows_triton.row_stats(logits, labels, stats, 0, None, transform)
    exp = RowStats.uninitialised(N, logits, mean=True, argmax=True)
    exp.set_pivots(torch.full((N,), -2.0, device=device))
    for ended in (exp.sumexp_N, exp.logp_N):  # by the label kernels, after row_exp
        ended.zero_()
    rows_triton.row_exp(logits, labels, exp, 0, None, transform, stored, None)
    coefficients = RowCoefficients(torch.ones(N, device=device), torch.ones(N, 1, device=device))
    gradient = rows_triton.row_grad(logits, labels, stats.norms_2N, coefficients, 0, None, transform, stored.dtype)
    found = [t for s in (stats, exp) for t in vars(s).values() if t is not None]
    return [*found, stored.clone(), gradient.clone()]


@on_triton
@pytest.mark.parametrize("block", [64, 4096])
@pytest.mark.parametrize(("dtype", "out"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_what_lies_behind_a_row_changes_nothing(dtype, out, block, target, monkeypatch):
    monkeypatch.setattr(rows_triton, "BLOCK_COLUMNS", block)
    monkeypatch.setattr(rows_triton, "EXP_BLOCK_COLUMNS", block)
    with monkeypatch.context() as plain:
        plain.setattr(rows_triton, "_padded", lambda tile: False)
        expected = results(tile(dtype, target.device, 0.0), tile(out, target.device, 0.0))
    for behind in (torch.nan, torch.inf, 1e30):
        logits, stored = tile(dtype, target.device, behind), tile(out, target.device, behind)
        assert rows_triton._padded(logits)
        for got, truth in zip(results(logits, stored), expected, strict=True):
            assert torch.equal(got, truth)
        assert not stored.as_strided((N, aligned(V) - V), stored.stride(), V).any()


def test_rows_without_memory_behind_them_end_where_they_end():
    whole = torch.zeros(N, aligned(V))
    assert rows_triton._padded(whole[:, :V])
    assert rows_triton._padded(whole[1:, 64:V])
    assert not rows_triton._padded(whole[:, 1:V])  # not where 16 bytes begin
    assert not rows_triton._padded(torch.zeros(N, V))
    assert not rows_triton._padded(torch.zeros((N - 1) * aligned(V) + V).as_strided((N, V), (aligned(V), 1)))
    assert not rows_triton._padded(whole[:, :496])  # a multiple of 16 needs none
