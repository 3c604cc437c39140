"""The C++ kernels on random sizes, strides, storages and options, each against fp64 arithmetic on the same operands."""

import math
import random

import pytest
import torch

from var_kernels.kernels import gemm_native, rows_native
from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats

pytestmark = pytest.mark.skipif(rows_native.obstacle() is not None, reason=str(rows_native.obstacle()))

# A seed is a case: a failure names it.
SEEDS = range(60)


def strided(choose: random.Random, lines: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Random lines at a random offset, a random distance apart; NaN where nothing should be read."""
    offset, pad = choose.randrange(3), choose.choice((0, 0, 1, 7, 64))
    storage = torch.full((offset + lines * (length + pad) + 1,), math.nan, dtype=dtype)
    view = storage.as_strided((lines, length), (length + pad, 1), offset)
    view.copy_(2 * torch.randn(lines, length, generator=torch.Generator().manual_seed(choose.randrange(1 << 30))))
    return view


def size(choose: random.Random, largest: int) -> int:
    """Small ones, whole tiles and their neighbours, anything."""
    return min(
        largest,
        max(
            1,
            choose.choice(
                (choose.randint(1, 8), 16 * choose.randint(1, 40) + choose.randint(-1, 1), choose.randint(1, largest))
            ),
        ),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_products(seed, monkeypatch):
    if gemm_native.best_level() == 0:
        pytest.skip("no C++ kernels here")
    choose = random.Random(seed)
    monkeypatch.setattr(gemm_native, "LEVEL", choose.choice(gemm_native.levels()))
    m, k, n = size(choose, 300), size(choose, 2200), size(choose, 700)
    left = strided(choose, m, k, torch.bfloat16) if seed % 2 else strided(choose, k, m, torch.bfloat16).t()
    right = strided(choose, k, n, torch.bfloat16) if seed % 3 else strided(choose, n, k, torch.bfloat16).t()
    dtype = choose.choice((torch.float32, torch.bfloat16))
    add = dtype == torch.float32 and choose.random() < 0.5
    out = strided(choose, m, n, dtype)
    truth = left.double() @ right.double() + (out.double() if add else 0.0)
    gemm_native.multiply(out, left, right, add=add)
    # Roundings in a row walk at random.
    spacing = 2.0**-24 * max(16.0, k**0.5) if dtype == torch.float32 else 2.0**-8
    assert (out - truth).abs().max() <= spacing * truth.abs().max()


@pytest.mark.parametrize("seed", SEEDS)
def test_rows(seed, monkeypatch):
    choose = random.Random(1000 + seed)
    monkeypatch.setattr(rows_native, "LEVEL", choose.randint(0, rows_native.best_level()))
    n, v, k = choose.randint(1, 9), size(choose, 2600), choose.randint(1, 3)
    dtype = choose.choice(rows_native.DTYPES)
    logits = strided(choose, n, v, dtype)
    bias = strided(choose, 1, v, choose.choice(rows_native.DTYPES))[0] if choose.random() < 0.5 else None
    softcap = choose.choice((None, None, 5.0))
    transform = LogitTransform(choose.choice((1.0, 0.5)), softcap, choose.choice((1.0, 1.7)))
    start = choose.randrange(5)
    labels = torch.randint(v, (n, k)) + start
    stats = RowStats.empty(n, k, torch.empty(0), entropy=True, mean=True, argmax=True)

    x = logits.double() + (0.0 if bias is None else bias.double())
    x = x * transform.logit_scale
    z = (softcap * (x / softcap).tanh() if softcap else x) / transform.temperature
    z.requires_grad_()
    rows_native.row_stats(logits, labels, stats, start, bias, transform)
    lse = z.logsumexp(1)
    close = dict(rtol=2.0**-17, atol=2.0**-17)
    torch.testing.assert_close(stats.lse_N.double(), lse.detach(), **close)
    torch.testing.assert_close(stats.label_logit_NK.double(), z.detach().gather(1, labels - start), **close)
    top = z.detach().gather(1, (stats.argmax_N - start).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(top, z.detach().amax(1), **close)

    prob, label = torch.randn(n), torch.randn(n, k)
    dz = torch.softmax(z.detach(), 1) * prob.double().unsqueeze(1)
    dz.scatter_add_(1, labels - start, label.double())
    inner = transform.logit_scale / transform.temperature
    dx = dz * inner * (1 - (x / softcap).tanh().square() if softcap else 1.0)
    out = choose.choice([t for t in rows_native.DTYPES if t.itemsize <= dtype.itemsize])
    coefficients = RowCoefficients(prob, label)
    grad = rows_native.row_grad(logits, labels, stats.norms_2N, coefficients, start, bias, transform, out)
    spacing = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[out]
    assert (grad.double() - dx).abs().max() <= spacing * dx.abs().max().clamp(min=2.0**-10)
