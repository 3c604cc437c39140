"""The label kernels of ``row_exp``'s gradients, each against fp64, and mistakes that they refuse."""

import functools

import pytest
import torch

from tests.conftest import TARGETS
from tests.mutation import mutant_of
from var_kernels.kernels.rows import LogitTransform, RowStats

pytest.importorskip("triton", reason="triton is not installed")
from var_kernels.kernels import labels_torch, labels_triton

BF16 = torch.bfloat16
N, V, D, R = 41, 53, 72, 5
GATHERED = 4000  # bytes: steps of three rows, and of four columns
PLAIN = LogitTransform()
on_triton = pytest.mark.parametrize("target", [p for p in TARGETS if "triton" in p.id], indirect=True)
interpreted = pytest.mark.parametrize("target", [p for p in TARGETS if p.id == "cpu-triton"], indirect=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name, value in (("BLOCK_DEPTH", 32), ("LABEL_DEPTH", 32), ("LABEL_ROWS", 4), ("BLOCK_ROWS", 16)):
        monkeypatch.setattr(labels_triton, name, value)


def normal(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def some_labels(device="cpu"):
    """Shared ones, one that a block of rows has, and two beyond the vocabulary."""
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
    labels[5:17], labels[20], labels[23], labels[30] = 7, V, -3, 9
    return labels.to(device)


def close(got, truth, dtype=torch.float32):
    """Sums in fp32 of exact operands, rounded once."""
    error, size = (got.double() - truth.double()).abs(), truth.double().abs()
    return bool((error <= (2.0**-8 if dtype == BF16 else 2.0**-21) * size + 2.0**-19 * size.max()).all())


def check_start(device, module=labels_triton, transform=PLAIN, dtype=torch.float32, bias=False, low_rank=False):
    labels = some_labels(device)
    # Columns of a larger matrix: a stride of rows that is not their length.
    hidden, weight = normal(N, D + 3, dtype=dtype, device=device)[:, :D], normal(V, D, dtype=dtype, device=device)
    bias = normal(V, dtype=dtype, device=device) if bias else None
    factors = (normal(N, R, device=device), normal(V, R, device=device)) if low_rank else None
    stats = RowStats.uninitialised(N, hidden, mean=True, argmax=True)
    for value in vars(stats).values():
        if value is not None:
            value.fill_(77)
    module.start_rows(hidden, weight, bias, factors, labels, stats, transform, GATHERED)
    known = (labels >= 0) & (labels < V)
    ids = labels.where(known, 0)
    raw = (hidden.double() * weight[ids].double()).sum(1)
    raw += 0 if bias is None else bias[ids].double()
    raw += 0 if factors is None else (factors[0].double() * factors[1][ids].double()).sum(1)
    truth = transform.apply(raw)
    got = stats.label_logit_NK.squeeze(1)
    assert close(got[known], truth[known])
    assert got[~known].isnan().all()
    assert (stats.max_N[~known] == -torch.inf).all()
    assert torch.equal(stats.max_N[known], got[known])
    assert not stats.others_N.any()
    assert not stats.logit_sum_N.any()
    assert not stats.argmax_N.any()
    assert (stats.top_N == -torch.inf).all()


def finishing(device):
    labels = some_labels(device)
    stats = RowStats.uninitialised(N, labels, mean=False, argmax=False)
    stats.label_logit_NK.copy_(normal(N, 1, device=device))
    stats.max_N.copy_(stats.label_logit_NK.squeeze(1))
    stats.max_N[:10] += 0.7  # a raised pivot
    stats.others_N.copy_(10 ** torch.linspace(-9, 9, N, device=device))
    stats.others_N[15:19] = torch.tensor([0.3, 0.6, 0.9, 0.99], device=device)
    stats.label_logit_NK[20:24:3] = torch.nan
    return labels, stats


def check_finish(device, module=labels_triton):
    labels, stats = finishing(device)
    module.finish_rows(labels, stats, V)
    known = (labels >= 0) & (labels < V)
    own = (stats.label_logit_NK.squeeze(1) - stats.max_N).double().exp()
    others = stats.others_N.double()
    total = others + own.where(known, 0.0)
    assert ((stats.sumexp_N.double() - total).abs() <= 2.0**-22 * total)[others > 0].all()
    truth = -(others / own).log1p()
    assert stats.logp_N[~known].isnan().all()
    error = ((stats.logp_N.double() - truth) / truth)[known].abs()
    assert error.max() <= 2.0**-20, error.max()


def check_scales(device, module=labels_triton, transform=PLAIN):
    labels = some_labels(device)
    prob, entry, logit = (normal(N, device=device).roll(i) for i in range(3))
    sumexp = 10 ** torch.linspace(-3, 6, N, device=device)
    logp = -(10 ** torch.linspace(-9, 1.5, N, device=device))
    entry = -prob + 1e-6 * entry  # cancels: what is left are the digits of 1 - p
    scale, label = module.row_scales(labels, prob, entry, sumexp, logp, logit, V, transform)
    known = (labels >= 0) & (labels < V)
    p_less_1 = logp.double().expm1()
    slope = transform.slope * (1.0 if transform.softcap is None else transform.cap_slope(logit.double()))
    truth = (prob.double() + entry.double() + prob.double() * p_less_1) * slope
    bound = 2.0**-20 * ((prob.double() + entry.double()).abs() + (prob.double() * p_less_1).abs()) * transform.slope
    assert ((label.double() - truth).abs() <= bound)[known].all()
    assert not label[~known].any()
    assert close(scale, prob.double() * transform.slope / sumexp.double())


def entries(module, entry_n, known_n):
    """Torch's operations are given 0 for an unknown label; Triton's kernels look at no entry of one."""
    return entry_n.where(known_n, 0.0) if hasattr(module, "_steps") else entry_n


def check_combine(
    device, module=labels_triton, dtype=torch.float32, in_place=False, with_label=True, constant=True, by_columns=False
):
    labels = some_labels(device)
    sums, matrix = normal(N, D, device=device), normal(V, D, dtype=dtype, device=device)
    scale, factor, third = (normal(N, device=device).roll(i) for i in range(3))
    total, known = normal(D, device=device), (labels >= 0) & (labels < V)
    truth = sums.double() * scale.double().unsqueeze(1)
    if with_label:
        truth += matrix[labels.clamp(0, V - 1)].double() * factor.double().where(known, 0.0).unsqueeze(1)
    if constant:
        truth += third.double().unsqueeze(1) * total.double()
    out = sums if in_place else torch.full((N, D + 1), torch.nan, dtype=dtype, device=device)[:, :D]
    if by_columns:
        out, sums = (t.t().contiguous().t() for t in (out, sums))
    label = (matrix, labels, entries(module, factor, known)) if with_label else None
    module.combine_rows(out, sums, scale, label, (third, total) if constant else None, GATHERED)
    assert close(out, truth, out.dtype)


def check_rows(device, module=labels_triton, dtype=torch.float32, c=V, d=D):
    labels = some_labels(device)
    vectors, known = normal(N, d, dtype=dtype, device=device), (labels >= 0) & (labels < c)
    factor = normal(N, device=device)
    total = normal(c + 2, d, dtype=dtype, device=device)  # the last two are another's
    truth, added = total.double(), vectors.double() * factor.double().unsqueeze(1)
    truth.index_add_(0, labels[known], added[known])
    again = total.clone()
    for out in (total, again):
        module.add_label_rows(out[:c], labels.sort(stable=True), entries(module, factor, known), vectors, GATHERED)
    assert torch.equal(total, again)
    assert close(total, truth, dtype)


def check_scale(device, module=labels_triton, factor=0.7, dtype=BF16):
    values = normal(N, V, dtype=dtype, device=device)
    truth = (values.double() * torch.tensor(factor).double().to(device)).to(dtype)
    module.scale_(values, torch.tensor(factor, device=device))
    assert torch.equal(values, truth) if factor == 1 else close(values, truth, dtype)


@on_triton
def test_columns_far_from_each_other(target):
    """A matrix of columns, the last of which begins 2^31 elements behind the first; little of the memory is touched."""
    stride = 2**31 // (D - 1) + 2
    labels, (scale, factor) = some_labels(target.device), normal(2, N, device=target.device)
    hidden, weight = normal(N, D, dtype=BF16, device=target.device), normal(V, D, dtype=BF16, device=target.device)
    known = (labels >= 0) & (labels < V)

    def far(t):
        memory = torch.empty((D - 1) * stride + t.shape[0], dtype=BF16, device=target.device)
        return memory.as_strided(t.shape, (1, stride)).copy_(t)

    found = []
    for place in (torch.clone, far):
        stats = RowStats.uninitialised(N, hidden, mean=False, argmax=False)
        labels_triton.start_rows(hidden, place(weight), None, None, labels, stats, PLAIN)
        out, total = torch.empty_like(hidden), weight.clone()
        labels_triton.combine_rows(out, place(hidden), scale, (place(weight), labels, factor))
        labels_triton.add_label_rows(total, labels.sort(stable=True), factor, place(hidden))
        found.append((stats.label_logit_NK[known], out, total))
    for near, far_away in zip(*found, strict=True):
        assert torch.equal(near, far_away)


SOFTCAP = LogitTransform(0.5, 3.0, 1.3)
CHECKS = {
    "start": check_start,
    "start, bf16": functools.partial(check_start, dtype=BF16, bias=True),
    "start, softcap": functools.partial(check_start, transform=SOFTCAP, bias=True),
    "start, low rank": functools.partial(check_start, transform=LogitTransform(0.5), low_rank=True),
    "finish": check_finish,
    "scales": check_scales,
    "scales, softcap": functools.partial(check_scales, transform=SOFTCAP),
    "combine": check_combine,
    "combine, in place": functools.partial(check_combine, in_place=True),
    "combine, bf16": functools.partial(check_combine, dtype=BF16),
    "combine, columns first": functools.partial(check_combine, by_columns=True),
    "combine, scale alone": functools.partial(check_combine, with_label=False, constant=False),
    "rows": check_rows,
    "rows, bf16": functools.partial(check_rows, dtype=BF16),
    "rows, fewer columns": functools.partial(check_rows, c=9),
    "rows, of one column": functools.partial(check_rows, d=1),
    "scale": check_scale,
    "scale of 1": functools.partial(check_scale, factor=1.0),
    "scale, fp32": functools.partial(check_scale, dtype=torch.float32),
}


@on_triton
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_equals_fp64(check, target):
    check(target.device)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_torchs_operations_equal_fp64(check):
    check("cpu", module=labels_torch)


def test_few_threads_divide_no_operation_on_label_vectors(monkeypatch):
    vectors, longest = torch.empty(1000, 1024), {}
    for threads in (2, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        steps = labels_torch._steps(vectors, torch.float32, 4 << 20)
        assert [row for step in steps for row in range(step.start, step.stop)] == list(range(1000))
        longest[threads] = max(vectors[step].numel() for step in steps)
    assert longest == {2: 31 * 1024, 64: 256 * 1024}  # torch divides from 32 * 1024 elements on


# what goes wrong: text, what replaces it, the check that shows it
MISTAKES = {
    "the tail of a row is left out": ("range(0, D, BLOCK)", "range(0, D - 31, BLOCK)", "start"),
    "no bias": ("_transformed(x, bias_ptr, label", "_transformed(x, None, label", "start, bf16"),
    "no low rank": ("x += _dot(", "_dot(", "start, low rank"),
    "a label beyond the vocabulary is one": ('tl.where(known, z, float("nan"))', "z", "start"),
    "a pivot of NaN": ('tl.where(tl.abs(z) < float("inf"), z, float("-inf"))', "z", "start"),
    "digits of 1 - p": ("-_log1p(others / own)", "above - tl.log(sumexp)", "finish"),
    "a short series": ("tl.static_range(13, 0, -2)", "tl.static_range(5, 0, -2)", "finish"),
    "the label is left out of the sum": ("others + tl.where(known, own, 0.0)", "others", "finish"),
    "an unknown label joins": ("tl.where(known, own, 0.0)", "tl.where(known, own, 1.0)", "finish"),
    "p - 1 rounded": ("tl.where(logp > -0.125, small, tl.exp(logp) - 1.0)", "tl.exp(logp) - 1.0", "scales"),
    "no slope": ("entry * slope", "entry", "scales, softcap"),
    "no slope of the cap": ("entry *= 1.0 - tanh * tanh", "entry *= 1.0", "scales, softcap"),
    "an entry of an unknown label": ("tl.where(known, entry * slope, 0.0)", "entry * slope", "scales"),
    "rows are not scaled": ("sums * tl.load(scale_ptr + row)", "sums", "combine, scale alone"),
    "no label's vector": ("out += tl.load(label_ptr + row)", "out += 0.0", "combine"),
    "the vector of an unknown label": ("mask=there", "mask=mask", "combine"),
    "no constant": ("out += tl.load(constant_ptr + row)", "out += 0.0", "combine, bf16"),
    "a shared label's second block is lost": ("start += ROWS", "start += ROWS + 1", "rows"),
    "each of its rows adds": ("(label != before) &", "(label == label) &", "rows"),
    "labels beyond the columns": ("& (label < C)", "& (label < C + 1)", "rows, fewer columns"),
    "a last column is lost": ("D\n        sums = tl.zeros", "D - 1\n        sums = tl.zeros", "rows"),
    "not scaled": ("factor != 1.0", "factor == 1.0", "scale"),
    "a tail not scaled": ("mask = at < size", "mask = at < size - 1", "scale"),
}  # fmt: skip


TORCH_MISTAKES = {
    "no bias": ("x_N += bias_V[ids_N]", "x_N + bias_V[ids_N]", "start, bf16"),
    "no low rank": ("x_n += (low_rank", "x_n + (low_rank", "start, low rank"),
    "a label beyond the vocabulary is one": (".where((labels_N >= 0) & (labels_N < v), torch.nan)", "", "start"),
    "digits of 1 - p": ("own_n > stats.others_N, above_n", "own_n < 0, above_n", "finish"),
    "the label is left out of the sum": ("stats.others_N + own_n.where", "stats.others_N + 0 * own_n.where", "finish"),
    "an unknown label joins": ("own_n.where((labels_n >= 0) & (labels_n < v), 0.0)", "own_n", "finish"),
    "p - 1 rounded": ("logp_n.expm1()", "(logp_n.exp() - 1)", "scales"),
    "no slope of the cap": ("transform.cap_slope(label_logit_n).mul_(", "(", "scales, softcap"),
    "an unknown label has an entry": ("label_n.where((labels_n >= 0) & (labels_n < c), 0.0)\n", "label_n\n", "scales"),
    "a step of rows is lost": ("spans(0, n, max(", "spans(0, n - 1, max(", "combine"),
    "the sign of an entry is lost": ("label[2][rows]", "label[2][rows].abs()", "combine"),
    "no constant": ("if constant is not None:", "if False:", "combine, bf16"),
    "a block of columns is lost": ("spans(0, d, width)", "spans(0, d - 1, width)", "rows"),
    "not scaled": ("values.mul_(factor)", "values.mul(factor)", "scale"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", TORCH_MISTAKES)
def test_a_mistake_in_torchs_operations_is_refused(mistake, tmp_path):
    before, after, shown_by = TORCH_MISTAKES[mistake]
    with pytest.raises((AssertionError, IndexError)):
        CHECKS[shown_by]("cpu", module=mutant_of(labels_torch, before, after, tmp_path))


@interpreted
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused(mistake, target, tmp_path):
    before, after, shown_by = MISTAKES[mistake]
    mutant = mutant_of(labels_triton, before, after, tmp_path)
    for name in ("BLOCK_DEPTH", "LABEL_DEPTH", "LABEL_ROWS", "BLOCK_ROWS"):
        setattr(mutant, name, getattr(labels_triton, name))
    with pytest.raises(AssertionError):
        CHECKS[shown_by](target.device, module=mutant)
