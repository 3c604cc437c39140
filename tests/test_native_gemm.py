"""The C++ GEMM: bf16 operands of any layout, fp32 sums, each set of instructions that this machine runs."""

import math
import subprocess
import sys

import pytest
import torch

from tests.products import Products
from var_kernels.kernels import gemm_native
from var_kernels.kernels.rows import LogitTransform, RowStats
from var_kernels.ops import linear_weighted_nll, plan

INF, NAN = math.inf, math.nan
BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(gemm_native.best_level() == 0, reason="no C++ kernels here")


@pytest.fixture(params=range(1, len(gemm_native.LEVEL_NAMES)), ids=gemm_native.LEVEL_NAMES[1:])
def level(request, monkeypatch):
    if request.param not in gemm_native.levels():
        pytest.skip(f"this machine has no {gemm_native.LEVEL_NAMES[request.param]}")
    monkeypatch.setattr(gemm_native, "LEVEL", request.param)
    return request.param


def matrix(rows, columns, layout="rows", pad=0):
    """Lines of adjacent elements, ``pad`` further apart than they need be, NaN between them."""
    generator = torch.Generator().manual_seed(rows + 7 * columns + pad)
    lines, length = (rows, columns) if layout == "rows" else (columns, rows)
    storage = torch.full((lines, length + pad), NAN, dtype=BF16)
    storage[:, :length] = torch.randn(lines, length, generator=generator)
    return storage[:, :length] if layout == "rows" else storage[:, :length].t()


def assert_summed_in_fp32(result, left, right, before=0.0):
    truth = left.double() @ right.double() + before
    assert (result - truth).abs().max() <= 2.0**-20 * truth.abs().max().clamp(min=1)


# One of everything; whole tiles; ragged in all three; several panels and blocks of depth; several blocks of rows and
# columns.
SHAPES = [(1, 1, 1), (64, 32, 64), (13, 71, 507), (5, 2101, 130), (300, 34, 600)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layouts", [("rows", "columns"), ("rows", "rows"), ("columns", "rows")], ids="-".join)
@pytest.mark.parametrize("pad", [0, 3])
def test_products_are_summed_in_fp32(level, shape, layouts, pad):
    m, k, n = shape
    left, right = matrix(m, k, layouts[0], pad), matrix(k, n, layouts[1], pad)
    storage = torch.full((m + 2, n + 5), 7.0)
    out = storage[1:-1, 2 : n + 2]
    gemm_native.multiply(out, left, right)
    assert_summed_in_fp32(out, left, right)
    gemm_native.multiply(out, left, right, add=True)
    assert_summed_in_fp32(out, left, right, left.double() @ right.double())
    out.fill_(7.0)
    assert torch.equal(storage, torch.full_like(storage, 7.0)), "written beside the result"


@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 71, 507), (40, 4096, 70)], ids=str)
def test_a_bf16_result_is_the_fp32_one_rounded(level, shape):
    m, k, n = shape
    left, right = matrix(m, k), matrix(k, n, "columns")
    wide, narrow = torch.empty(m, n), torch.full((m + 1, n + 3), 7.0, dtype=BF16)
    gemm_native.multiply(wide, left, right)
    gemm_native.multiply(narrow[:m, :n], left, right)
    # Beyond a block's depth the fp32 result is added up in memory, in another order.
    spacing = 2.0**-8 if k > 2048 else 0.0
    assert ((narrow[:m, :n].float() - wide.to(BF16).float()).abs() <= spacing * wide.abs()).all()
    assert (narrow[m] == 7).all()
    assert (narrow[:, n:] == 7).all()


def test_an_element_does_not_depend_on_its_block_or_the_threads(level):
    left, right = matrix(50, 2500), matrix(2500, 1300)
    whole, parts = torch.empty(50, 1300), torch.empty(50, 1300)
    gemm_native.multiply(whole, left, right)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for rows in (slice(0, 7), slice(7, 50)):
            for columns in (slice(0, 129), slice(129, 1300)):
                gemm_native.multiply(parts[rows, columns], left[rows], right[:, columns])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, parts)


def test_threads_take_turns_at_rows_and_columns(level):
    """More threads than processors, so that some come late: the same bits as one thread's."""
    left, right = matrix(700, 900), matrix(900, 1300)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            for a, b in ((left, right), (right.t(), left.t())):
                results.append(torch.empty(a.shape[0], b.shape[1]))
                gemm_native.multiply(results[-1], a, b)
    finally:
        torch.set_num_threads(before)
    assert_summed_in_fp32(results[0], left, right)
    for wide, tall in zip(results[::2], results[1::2], strict=True):
        assert torch.equal(wide, results[0])
        assert torch.equal(tall, results[1])


def test_infinity_and_nan_pass(level):
    left, right = matrix(4, 6), matrix(6, 10)
    left[1, 3], left[2, 0] = INF, NAN
    out = torch.empty(4, 10)
    gemm_native.multiply(out, left, right)
    assert torch.equal(out[1], right[3].float().sign() * INF)
    assert out[2].isnan().all()
    assert out[[0, 3]].isfinite().all()


def test_nothing_to_sum_and_nothing_to_write(level):
    out = torch.full((3, 5), 7.0)
    gemm_native.multiply(out, torch.empty(3, 0, dtype=BF16), torch.empty(0, 5, dtype=BF16))
    assert torch.equal(out, torch.zeros(3, 5))
    gemm_native.multiply(torch.empty(0, 5), torch.empty(0, 2, dtype=BF16), torch.empty(2, 5, dtype=BF16))


def test_what_it_takes(monkeypatch):
    a, b, fp32 = matrix(4, 6), matrix(6, 3), torch.float32
    assert gemm_native.supports(fp32, a, b)
    assert gemm_native.supports(BF16, a, b)
    assert not gemm_native.supports(torch.float64, a, b)
    assert not gemm_native.supports(fp32, a.half(), b.half())
    assert not gemm_native.supports(fp32, torch.zeros(4, 12, dtype=BF16)[::2, ::2], b)
    assert not gemm_native.supports(BF16, torch.zeros(4, 4097, dtype=BF16), torch.zeros(4097, 3, dtype=BF16))
    monkeypatch.setattr(gemm_native, "LEVEL", 0)
    assert not gemm_native.supports(fp32, a, b)


def test_shapes_that_do_not_fit_are_refused(level):
    with pytest.raises(RuntimeError, match="right: expected 6 rows, got 5"):
        gemm_native.multiply(torch.empty(4, 3), matrix(4, 6), matrix(5, 3))
    with pytest.raises(RuntimeError, match="out: expected 4 x 3"):
        gemm_native.multiply(torch.empty(4, 2), matrix(4, 6), matrix(6, 3))
    with pytest.raises(RuntimeError, match="left: expected rows or columns of adjacent elements"):
        gemm_native.multiply(torch.empty(4, 3), torch.zeros(8, 12, dtype=BF16)[::2, ::2], matrix(6, 3))


OUT_OF_MEMORY = """
import resource, torch
from var_kernels.kernels import gemm_native
from var_kernels.kernels.rows import LogitTransform, RowStats
torch.set_num_threads(1)
gemm_native.levels()
left, right, out = torch.ones(40, 30).bfloat16(), torch.ones(30, 50).bfloat16(), torch.empty(40, 50)
pages, limits = int(open("/proc/self/statm").read().split()[0]), resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 20), limits[1]))
try:
    gemm_native.multiply(out, left, right)
except RuntimeError as error:
    print(str(error).splitlines()[0])
resource.setrlimit(resource.RLIMIT_AS, limits)
gemm_native.multiply(out, left, right)
print(out.eq(30).all().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of the address space is Linux's")
def test_a_thread_without_memory_says_so_and_goes_on_when_there_is_some():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert "out of memory: operands are packed into 4864 KiB a thread" in first
    assert second == "True"


def test_the_head_takes_it_for_all_three_products(level, monkeypatch):
    """fp32 logits of bf16 operands, rows in several spans, dW written once or added up: gradients of the fp64 ones."""
    hidden, weight = matrix(70, 24).requires_grad_(), matrix(507, 24).requires_grad_()
    labels = torch.arange(70) * 7
    monkeypatch.setattr(plan, "MAX_CPU_BACKWARD_ROWS", 32)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = torch.autograd.grad(
        torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum"), exact
    )
    for engine, workspace_mb in (("two_pass", 1), ("one_pass", 0.15), ("one_pass", 1)):
        with Products() as products:
            loss = linear_weighted_nll(
                hidden, weight, labels, None, engine=engine, workspace_mb=workspace_mb, precision="fp32"
            )
            grads = torch.autograd.grad(loss, (hidden, weight))
        assert products.names == {"product_exp", "product_into"}, engine
        assert {n for _, n, _ in products.sizes} >= {24, 507}, engine
        for grad, expected in zip(grads, truth, strict=True):
            assert (grad - expected).square().mean().sqrt() <= 2.0**-8 * expected.square().mean().sqrt()


# ---- a product that ends in exponentials -----------------------------------------------------------------------------


def exponentials(hidden, weight, labels, bias, transform, pivots, *, store=True, starts=(0,)):
    """(statistics, what is stored) of ``product_exp`` over slices of the vocabulary that begin so."""
    stats = RowStats.uninitialised(len(hidden), hidden, mean=False, argmax=False)
    stats.set_pivots(pivots)
    stored = torch.full((len(hidden), len(weight) + 3), NAN, dtype=BF16)
    for start, stop in zip(starts, (*starts[1:], len(weight)), strict=True):
        bias_v = None if bias is None else bias[start:stop]
        out, earlier = stored[:, start:stop] if store else None, stored[:, :start] if store and start else None
        gemm_native.product_exp(hidden, weight[start:stop], labels, stats, start, bias_v, transform, out, earlier)
    return stats, stored


def check_exponentials(stats, stored, hidden, weight, labels, bias, transform):
    """Against fp64 logits, over the pivots that came out."""
    x = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    z = transform.apply(x)
    exact = (z - stats.max_N.double().unsqueeze(1)).exp().scatter(1, labels, 0.0)
    others = exact.sum(1)
    assert ((stats.others_N.double() - others).abs() <= 2.0**-15 * others.clamp(min=1e-30)).all()
    assert others.max() < 1e17 * z.shape[1]
    if stored is not None:
        slope = 1.0 if transform.softcap is None else transform.cap_slope(z)
        truth, got = exact * slope, stored[:, : len(weight)].double()
        # Rounded once, and again where the pivot rose later; a softcap's slope near 0 keeps fewer digits.
        assert ((got - truth).abs() <= 2.0**-6.9 * truth + 2.0**-20 * exact + 1e-30).all()
        assert not got.gather(1, labels).any()
        assert stored[:, len(weight) :].isnan().all(), "written beside the rows"


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 6.0, 1.5)], ids=["plain", "capped"])
@pytest.mark.parametrize("starts", [(0,), (0, 64, 512)], ids=["at once", "in slices"])
@pytest.mark.parametrize("pivots", ["label", "unset", "far too low", "some too low"])
@pytest.mark.parametrize("shape", [(1, 8, 5), (37, 72, 1111), (150, 40, 600)], ids=str)
def test_a_product_ends_in_exponentials(level, shape, pivots, starts, transform):
    n, d, v = shape
    if len(starts) > 1 and v < 600:
        pytest.skip("one slice")
    hidden, weight, bias = matrix(n, d, pad=3), matrix(v, d) * 2, torch.randn(v).bfloat16()
    labels = (torch.arange(n) * 7 % v).unsqueeze(1)
    z = transform.apply(hidden.double() @ weight.double().T + bias.double())
    pivot = {
        "label": z.gather(1, labels).squeeze(1),
        "unset": torch.full((n,), -INF),
        "far too low": z.amin(1) - 200,
        "some too low": z.gather(1, labels).squeeze(1) - 120 * (torch.arange(n) % 3 == 0),
    }[pivots].float()
    for store in (True, False):
        stats, stored = exponentials(hidden, weight, labels, bias, transform, pivot, store=store, starts=starts)
        check_exponentials(stats, stored if store else None, hidden, weight, labels, bias, transform)


def test_exponentials_have_the_same_bits_for_every_number_of_threads(level):
    hidden, weight, labels = matrix(40, 72), matrix(3001, 72), (torch.arange(40) * 70).unsqueeze(1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            stats, stored = exponentials(hidden, weight, labels, None, LogitTransform(), torch.zeros(40) - 60)
            found.append((stats.max_N, stats.others_N, stored[:, :3001].clone()))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))
