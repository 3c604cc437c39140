"""The C++ GEMM: bf16 operands to fp32 logits."""

import math

import pytest
import torch

from var_kernels.kernels import gemm_native, rows_native

INF, NAN = math.inf, math.nan


def operands(n, d, v, pad=0):
    """Rows ``pad`` elements further apart than they need be, NaN between them."""
    generator = torch.Generator().manual_seed(n + d)

    def rows(count):
        storage = torch.full((count, d + pad), NAN, dtype=torch.bfloat16)
        storage[:, :d] = torch.randn(count, d, generator=generator)
        return storage[:, :d]

    return rows(n), rows(v)


needs_bf16_dot = pytest.mark.skipif(
    not gemm_native.takes(torch.zeros(1, 2).bfloat16(), torch.zeros(1, 2).bfloat16()),
    reason=rows_native.obstacle() or "this machine has no AVX-512 BF16",
)


# One of everything; ragged rows and columns; more than one panel of D, ragged; two blocks of rows.
@needs_bf16_dot
@pytest.mark.parametrize("shape", [(1, 2, 1), (6, 64, 64), (13, 72, 507), (5, 1026, 130), (775, 34, 70)], ids=str)
@pytest.mark.parametrize("pad", [0, 3])
def test_bf16_logits_are_summed_in_fp32(shape, pad):
    hidden_nd, weight_vd = operands(*shape, pad=pad)
    n, _, v = shape
    storage = torch.full((n + 2, v + 5), 7.0)
    gemm_native.logits_into(storage[1:-1, 2 : v + 2], hidden_nd, weight_vd)
    truth = hidden_nd.double() @ weight_vd.double().T
    assert (storage[1:-1, 2 : v + 2] - truth).abs().max() <= 2.0**-20 * truth.abs().max()
    storage[1:-1, 2 : v + 2] = 7.0
    assert torch.equal(storage, torch.full_like(storage, 7.0)), "written beside the tile"


@needs_bf16_dot
def test_a_logit_does_not_depend_on_its_tile_or_the_threads():
    hidden_nd, weight_vd = operands(50, 1026, 300)
    whole, parts = torch.empty(50, 300), torch.empty(50, 300)
    gemm_native.logits_into(whole, hidden_nd, weight_vd)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for rows in (slice(0, 7), slice(7, 50)):
            for columns in (slice(0, 129), slice(129, 300)):
                gemm_native.logits_into(parts[rows, columns], hidden_nd[rows], weight_vd[columns])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, parts)


@needs_bf16_dot
def test_infinity_and_nan_pass_the_gemm():
    hidden_nd, weight_vd = operands(4, 6, 10)
    hidden_nd[1, 3], hidden_nd[2, 0] = INF, NAN
    logits_nv = torch.empty(4, 10)
    gemm_native.logits_into(logits_nv, hidden_nd, weight_vd)
    assert torch.equal(logits_nv[1], weight_vd[:, 3].float().sign() * INF)
    assert logits_nv[2].isnan().all()
    assert logits_nv[[0, 3]].isfinite().all()


def test_operands_that_the_gemm_does_not_take():
    pairs = torch.zeros(4, 6).bfloat16()
    assert not gemm_native.takes(torch.zeros(4, 5).bfloat16(), torch.zeros(3, 5).bfloat16())
    assert not gemm_native.takes(pairs.half(), pairs.half())
    assert not gemm_native.takes(pairs, torch.zeros(6, 4).bfloat16().t())
