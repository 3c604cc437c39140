"""The C++ row kernels alone: their exponential, every instruction set of this machine, odd widths, strides, threads."""

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tests.products import Products
from tests.tolerance import assert_gradient, assert_result
from var_kernels.kernels import rows_native, rows_torch
from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats
from var_kernels.ops import linear_logprob
from var_kernels.ops.backend import choose_backend, use_backend

pytestmark = pytest.mark.skipif(rows_native.obstacle() is not None, reason=str(rows_native.obstacle()))

# The worst of every second float was 1.0095.
EXP_ULP = 1.02
INF, NAN = math.inf, math.nan
CPU = torch.device("cpu")
ALL = {"entropy": True, "mean": True, "argmax": True}
TRANSFORMS = [
    LogitTransform(),
    LogitTransform(logit_scale=0.25, temperature=0.7),
    LogitTransform(logit_scale=0.5, softcap=3.0, temperature=1.5),
]


@pytest.fixture(params=range(len(rows_native.LEVEL_NAMES)), ids=rows_native.LEVEL_NAMES)
def level(request, monkeypatch):
    """Every instruction set, as far as this machine has it."""
    if request.param > rows_native.best_level():
        pytest.skip(f"this machine has no {rows_native.LEVEL_NAMES[request.param]}")
    monkeypatch.setattr(rows_native, "LEVEL", request.param)
    return request.param


# ---- the exponential -------------------------------------------------------------------------------------------------


def exp_error(x):
    """|exp - truth| in units of the last place of the truth."""
    truth = x.double().exp()
    ulp = torch.ldexp(torch.ones_like(truth), truth.clamp(2.0**-126, 2.0**127.5).frexp().exponent - 24)
    return (rows_native.exp(x).double() - truth).abs() / ulp


def floats(first, last, step):
    """Every step-th float from one bit pattern to another."""
    return torch.arange(first, last, step).to(torch.int32).view(torch.float32)


def test_exp_is_at_most_1_02_ulp_off_wherever_its_result_is_normal(level):
    # -126 ln 2 and 128 ln 2 are the last arguments: 87.33654 and 88.72283.
    lowest = torch.tensor(87.33654).view(torch.int32).item()
    highest = torch.tensor(88.72283).view(torch.int32).item()
    assert exp_error(floats(0, highest + 1, 997)).max() <= EXP_ULP
    assert exp_error(-floats(0, lowest + 1, 997)).max() <= EXP_ULP
    # Where rows spend their time, and the borders of the reduction's intervals.
    assert exp_error(-torch.linspace(0, 30, 1_000_000)).max() <= EXP_ULP
    borders = (torch.arange(-125, 128, dtype=torch.float64) + 0.5).mul(math.log(2)).float()
    around = (borders.view(torch.int32).unsqueeze(1) + torch.arange(-40, 41, dtype=torch.int32)).view(torch.float32)
    assert exp_error(around.flatten()).max() <= EXP_ULP


def test_exp_beyond_the_normal_results(level):
    below = torch.tensor([-87.33655, -88.0, -103.9, -1e4, -3.4e38, -INF])
    assert torch.equal(rows_native.exp(below), torch.zeros(6))
    above = torch.tensor([88.72284, 89.0, 1e4, 3.4e38, INF])
    assert torch.equal(rows_native.exp(above), torch.full((5,), INF))
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38])
    assert torch.equal(rows_native.exp(tiny), torch.ones(6))
    quiet, with_payload, negative = 0x7FC00000, 0x7FC12345, 0xFFC00001 - 2**32
    nans = torch.tensor([quiet, with_payload, negative], dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert rows_native.exp(nans).isnan().all()


# ---- statistics and gradients against fp64 ---------------------------------------------------------------------------


def tile(n, columns, dtype=torch.float32, scale=3.0, pad=0):
    """(n, columns) logits whose rows lie ``pad`` further apart; what lies between is NaN."""
    generator = torch.Generator().manual_seed(columns)
    storage = torch.full((n, columns + pad), NAN, dtype=dtype)
    logits_nv = storage[:, :columns]
    logits_nv.copy_(torch.randn(n, columns, generator=generator) * scale)
    return logits_nv


def statistics(kernels, logits_nv, labels_nk, slices=1, bias_v=None, transform=TRANSFORMS[0], **asked):
    asked = asked or ALL
    stats = RowStats.empty(logits_nv.shape[0], labels_nk.shape[1], logits_nv, **asked)
    start = 0
    for part in logits_nv.tensor_split(slices, dim=1):
        stop = start + part.shape[1]
        kernels.row_stats(part, labels_nk, stats, start, None if bias_v is None else bias_v[start:stop], transform)
        start = stop
    return stats


def coefficients(n, k):
    generator = torch.Generator().manual_seed(n)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return RowCoefficients(normal(n), normal(n, k), logp_slope_N=normal(n), constant_N=normal(n) * 0.01)


def in_fp64(record):
    """RowCoefficients or RowStats with fp64 tensors."""
    values = (getattr(record, field.name) for field in fields(record))
    return type(record)(*(None if t is None or not t.is_floating_point() else t.double() for t in values))


def compare(logits_nv, bias_v=None, transform=TRANSFORMS[0], slices=1, out_dtype=None, k=2):
    """Everything that the two kernels give, against plain torch in fp64 on the same values."""
    n, columns = logits_nv.shape
    out_dtype = out_dtype or logits_nv.dtype
    labels_nk = torch.randint(0, columns, (n, k), generator=torch.Generator().manual_seed(1))
    wide_bias = None if bias_v is None else bias_v.double()
    got = statistics(rows_native, logits_nv, labels_nk, slices, bias_v, transform)
    truth = statistics(rows_torch, logits_nv.double(), labels_nk, 1, wide_bias, transform)
    assert_result(got.lse_N, truth.lse_N, "lse")
    assert_result(got.logp_NK(0.1, columns), truth.logp_NK(0.1, columns), "logp")
    assert_result(got.entropy_N, truth.entropy_N, "entropy")
    z_nv = rows_torch._transformed(logits_nv.clone(), bias_v, transform, inplace=False)
    chosen = z_nv.gather(1, got.argmax_N.unsqueeze(1)).squeeze(1)
    assert_result(chosen, z_nv.max(1).values, "the maximum's column")

    given = coefficients(n, k)
    gradients = {}
    for name, kernels, x_nv, c, norms_2n, b_v, out in (
        ("got", rows_native, logits_nv, given, truth.norms_2N.float(), bias_v, out_dtype),
        ("truth", rows_torch, logits_nv.double(), in_fp64(given), truth.norms_2N, wide_bias, torch.float64),
        ("own", rows_torch, logits_nv.clone(), given, truth.norms_2N.float(), bias_v, out_dtype),
    ):
        gradients[name] = kernels.row_grad(x_nv, labels_nk, norms_2n, c, 0, b_v, transform, out)
    assert gradients["got"].dtype == out_dtype
    assert gradients["got"].data_ptr() == logits_nv.data_ptr(), "not in the tile's own storage"
    assert_gradient(gradients["got"], gradients["truth"], gradients["own"], "dlogits")


# One column, around a vector of 16, a block of 1024 and several of them.
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 507, 1023, 1024, 1025, 3000])
def test_widths(columns, level):
    compare(tile(9, columns))
    compare(tile(9, columns, pad=3), slices=min(columns, 3))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["identity", "scaled", "capped"])
@pytest.mark.parametrize("dtype", rows_native.DTYPES, ids=str)
def test_storages_and_transforms(dtype, transform, level):
    compare(tile(7, 507, dtype), transform=transform)
    bias_v = torch.randn(507, generator=torch.Generator().manual_seed(3))
    compare(tile(7, 507, dtype, pad=5), bias_v.to(dtype), transform, slices=2)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 17, 1025, 2600])
def test_a_narrower_gradient_lies_in_the_tile(out_dtype, columns, level):
    compare(tile(5, columns), out_dtype=out_dtype)
    compare(tile(5, columns, pad=4), torch.ones(columns, dtype=out_dtype), out_dtype=out_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_16_bit_as_torch_does(dtype, level):
    """row_grad with p = 0 writes its constant: every kind of fp32 value, ties and denormals among them."""
    bits = torch.arange(-(2**31), 2**31, 655_357)
    ties = torch.arange(0x37000000, 0x48000000, 0x1000)  # around fp16's range, half-way points included
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1])
    values_n = torch.cat([bits, ties, nans]).to(torch.int32).view(torch.float32)
    n = values_n.numel()
    zero_n = torch.zeros(n)
    got = rows_native.row_grad(
        torch.full((n, 1), -INF),
        torch.full((n, 1), 5),
        torch.zeros(2, n),
        RowCoefficients(zero_n, zero_n.unsqueeze(1), constant_N=values_n),
        0,
        None,
        LogitTransform(),
        dtype,
    )
    expected = values_n.to(dtype)
    assert torch.equal(got.squeeze(1).isnan(), expected.isnan())
    assert torch.equal(got.squeeze(1).nan_to_num(0.5), expected.nan_to_num(0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reads_every_16_bit_value(dtype, level):
    values_n1 = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).unsqueeze(1)
    zeros_nk = torch.zeros(values_n1.shape, dtype=torch.int64)
    got = statistics(rows_native, values_n1, zeros_nk, entropy=False, mean=False, argmax=False).label_logit_NK
    assert torch.equal(got.isnan(), values_n1.isnan())
    assert torch.equal(got.nan_to_num(0.5, INF, -INF), values_n1.float().nan_to_num(0.5, INF, -INF))


def test_softcap_keeps_the_digits_of_small_logits(level):
    """z is about x where x is far below the cap."""
    sizes_n = torch.cat([torch.logspace(-30, 2, 3000), torch.linspace(20, 60, 3000)])
    x_n1 = torch.cat([sizes_n, -sizes_n, torch.tensor([INF, -INF])]).unsqueeze(1)
    transform = LogitTransform(softcap=50.0)
    zeros_nk = torch.zeros(x_n1.shape, dtype=torch.int64)
    got = statistics(rows_native, x_n1, zeros_nk, transform=transform).label_logit_NK.double()
    truth = 50 * (x_n1.double() / 50).tanh()
    assert ((got - truth).abs() <= 2.0**-21 * truth.abs()).all()


def test_optional_statistics_do_not_change_the_others(level):
    logits_nv, labels_nk = tile(6, 2100), torch.arange(6).unsqueeze(1)
    full = statistics(rows_native, logits_nv, labels_nk)
    for name in ALL:
        some = statistics(rows_native, logits_nv, labels_nk, **{**ALL, name: False})
        assert_result(some.lse_N, full.lse_N.double(), name)
        assert torch.equal(some.label_logit_NK, full.label_logit_NK)
    none = statistics(rows_native, logits_nv, labels_nk, entropy=False, mean=False, argmax=False)
    assert torch.equal(none.max_N, full.max_N)


# ---- hard values -----------------------------------------------------------------------------------------------------


def test_hard_rows(level):
    """Forbidden tokens, huge logits, equal logits, a maximum that comes late: as plain torch in fp64."""
    logits_nv = tile(8, 2100)
    logits_nv[0, ::2] = -INF
    logits_nv[1, :1500] = -INF
    logits_nv[2] += 1e4
    logits_nv[3] -= 1e4
    logits_nv[4] = 7.0
    logits_nv[5, 2099] = 1e4
    logits_nv[6] = torch.linspace(-1e4, 1e4, 2100)
    logits_nv[7, :] = -INF
    logits_nv[7, 1030] = -3.0
    labels_nk = torch.tensor([1, 1501, 3, 4, 5, 2099, 2098, 1030]).unsqueeze(1)
    got = statistics(rows_native, logits_nv, labels_nk, slices=2, entropy=True, mean=False, argmax=True)
    truth = statistics(rows_torch, logits_nv.double(), labels_nk, entropy=True, mean=False, argmax=True)
    assert_result(got.logp_NK(0, 2100), truth.logp_NK(0, 2100), "logp", largest_logit=1e4)
    assert_result(got.entropy_N, truth.entropy_N, "entropy", largest_logit=1e4)
    assert torch.equal(got.argmax_N, truth.argmax_N)
    given = RowCoefficients(-torch.ones(8), torch.ones(8, 1), logp_slope_N=torch.full((8,), 0.1))
    args = (labels_nk, 0, None, LogitTransform())
    truth_grad = rows_torch.row_grad(
        logits_nv.double(), labels_nk, truth.norms_2N, in_fp64(given), *args[1:], torch.float64
    )
    grad = rows_native.row_grad(logits_nv, labels_nk, got.norms_2N, given, *args[1:], torch.float32)
    assert grad.isfinite().all()
    # lse of 1e4 is itself known to 2^-24 of it.
    assert (grad.double() - truth_grad).abs().max() < 2e-3
    assert (grad[4].double() - truth_grad[4]).abs().max() < 1e-6


def test_nothing_but_forbidden_tokens_so_far(level):
    logits_nv = torch.full((2, 40), -INF)
    stats = statistics(
        rows_native, logits_nv, torch.zeros(2, 1, dtype=torch.int64), entropy=True, mean=False, argmax=True
    )
    assert torch.equal(stats.max_N, torch.full((2,), -INF))
    assert torch.equal(stats.sumexp_N, torch.zeros(2))
    assert torch.equal(stats.shifted_sum_N, torch.zeros(2))
    rows_native.row_stats(torch.ones(2, 40), torch.zeros(2, 1, dtype=torch.int64), stats, 40, None, LogitTransform())
    assert_result(stats.lse_N, torch.full((2,), 1 + math.log(40)).double())
    assert torch.equal(stats.argmax_N, torch.full((2,), 40))


@pytest.mark.parametrize("where", [0, 700, 1500, 2099])
def test_nan_stays_in_its_row_and_is_not_lost(where, level):
    logits_nv = tile(3, 2100)
    logits_nv[1, where] = NAN
    labels_nk = torch.zeros(3, 1, dtype=torch.int64)
    stats = statistics(rows_native, logits_nv, labels_nk)
    for values in (stats.lse_N, stats.entropy_N, stats.logit_sum_N):
        assert values.isnan().tolist() == [False, True, False]
    norms_2n = stats.norms_2N.nan_to_num(8.0)
    grad = rows_native.row_grad(
        logits_nv, labels_nk, norms_2n, coefficients(3, 1), 0, None, LogitTransform(), torch.float32
    )
    assert grad.isnan().nonzero().tolist() == [[1, where]]


def test_ties_take_the_first_id(level):
    logits_nv = torch.zeros(1, 3000)
    logits_nv[0, [40, 41, 1500]] = 2.0
    stats = statistics(rows_native, logits_nv, torch.zeros(1, 1, dtype=torch.int64), slices=3)
    assert stats.argmax_N.item() == 40


# ---- threads, dispatch, refusals -------------------------------------------------------------------------------------


def test_same_bits_for_every_number_of_threads(level):
    before = torch.get_num_threads()
    labels_nk = torch.arange(67).unsqueeze(1)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits_nv = tile(67, 2100)
            stats = statistics(rows_native, logits_nv, labels_nk)
            args = (stats.norms_2N, coefficients(67, 1), 0, None, LogitTransform(), torch.bfloat16)
            results.append((stats, rows_native.row_grad(logits_nv, labels_nk, *args).clone()))
    finally:
        torch.set_num_threads(before)
    first, first_grad = results[0]
    for stats, grad in results[1:]:
        for field in fields(RowStats)[:6]:  # the others are row_exp's
            assert torch.equal(getattr(stats, field.name), getattr(first, field.name)), field.name
        assert torch.equal(grad, first_grad)


def test_no_rows_and_strided_vectors(level):
    empty = statistics(rows_native, torch.empty(0, 40), torch.empty(0, 1, dtype=torch.int64))
    assert empty.lse_N.shape == (0,)
    logits_nv, labels_nk = tile(6, 100), torch.arange(24).view(6, 4)
    bias_v = torch.randn(200)
    strided = statistics(rows_native, logits_nv, labels_nk[:, ::2], bias_v=bias_v[::2])
    packed = statistics(rows_native, logits_nv, labels_nk[:, ::2].clone(), bias_v=bias_v[::2].clone())
    assert torch.equal(strided.label_logit_NK, packed.label_logit_NK)
    assert torch.equal(strided.sumexp_N, packed.sumexp_N)


def test_chosen_on_a_cpu_unless_something_else_is_forced(monkeypatch):
    monkeypatch.delenv("VAR_KERNELS_BACKEND", raising=False)
    assert choose_backend(CPU, torch.float32)[0] == "native"
    assert choose_backend(CPU, torch.float64) == ("torch", "the C++ kernels compute in fp32, and this tile is fp64")
    with use_backend("torch"):
        assert choose_backend(CPU, torch.float32)[0] == "torch"
    with use_backend("native"), pytest.raises(ValueError, match=r"'native' was forced but .* this tile is fp64"):
        choose_backend(CPU, torch.float64)


def test_a_binary_older_than_its_sources_is_named(monkeypatch):
    sources = "".join(path.read_text() for path in (Path(__file__).parents[1] / "csrc").glob("*.cpp"))
    assert set(re.findall(r'"([a-z_]+)\(Tensor', sources)) == set(rows_native.OPS)
    monkeypatch.setattr(rows_native, "OPS", (*rows_native.OPS, "an_op_of_tomorrow"))
    assert "older than its sources" in rows_native.obstacle.__wrapped__()


def test_what_does_not_fit_the_contract_is_refused():
    labels_nk = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="columns next to each other"):
        statistics(rows_native, torch.zeros(40, 2).t(), labels_nk)
    with pytest.raises(RuntimeError, match="labels: expected 3 rows"):
        statistics(rows_native, torch.zeros(3, 40), labels_nk)
    with pytest.raises(RuntimeError, match="bias: expected 40 contiguous elements"):
        statistics(rows_native, torch.zeros(2, 40), labels_nk, bias_v=torch.zeros(30))
    with pytest.raises(RuntimeError, match="level: expected 0 to"):
        rows_native.exp(torch.zeros(3), level=7)


def test_tiles_of_a_large_budget_stay_in_the_cache():
    """Forward and vocabulary slices; a slice still sees all rows and as many columns as keep the GEMM busy."""
    hidden = torch.randn(600, 4, requires_grad=True)
    weight, labels = torch.randn(20_000, 4, requires_grad=True), torch.zeros(600, dtype=torch.int64)
    with Products() as products:
        linear_logprob(hidden, weight, labels, workspace_mb=40).sum().backward()
    shapes = [(m, n) for m, n, k in products.sizes if k == 4]
    assert len(shapes) >= 12
    assert max(m * n for m, n in shapes) * 4 <= 4 << 20
    assert all(shape[0] == 600 for shape in shapes)
    # The last slices of both may be narrow.
    assert sum(shape[1] < 1024 for shape in shapes) <= 2
