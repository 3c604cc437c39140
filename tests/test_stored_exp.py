"""Exponentials that are stored once and serve every product: pivots that rise, the label beside them, frozen heads."""

import functools
import importlib

import pytest
import torch

from tests import triton_interpreter
from tests.mutation import mutant_of
from tests.op_cases import Case, check_logprob, check_weighted_nll
from tests.products import Products
from tests.tolerance import assert_gradient, assert_result, rms
from var_kernels.kernels import labels_torch as labels
from var_kernels.ops import checks, engines, linear_logprob, linear_weighted_nll, logprob, weighted_nll
from var_kernels.ops.backend import use_backend
from var_kernels.reference import linear_logprob_ref

BF16 = torch.bfloat16
HEAD = ("weight", "bias")
CASES = [
    Case("slices", frozen=HEAD, tight=True, bias=True),
    Case("slices, confident", frozen=HEAD, tight=True, logits=30.0),
    Case("slices, logits of 1e4", frozen=HEAD, tight=True, logits=1e4),
    Case("slices, every logit far below 0", frozen=HEAD, tight=True, bias=True, offset=-1e4),
    Case("slices, scale and temperature", frozen=HEAD, tight=True, options={"logit_scale": 0.5, "temperature": 1.5}),
    Case("slices, softcap and temperature", frozen=HEAD, tight=True, options={"softcap": 5.0, "temperature": 0.7}),
    Case("slices, smoothing", frozen=HEAD, tight=True, bias=True, options={"label_smoothing": 0.1, "logit_scale": 0.5}),
    Case("smoothing and softcap", frozen=HEAD, options={"label_smoothing": 0.1, "softcap": 5.0}),
    Case("several targets", frozen=HEAD, targets=3),
    Case("one row", shape=(1, 72, 507), frozen=HEAD, ignored=0.0, tight=True),
    Case("bf16, slices", dtype=BF16, frozen=HEAD, tight=True, bias=True),
    Case("bf16, slices, softcap", dtype=BF16, frozen=HEAD, tight=True, options={"softcap": 5.0}),
    Case("fp64, slices", dtype=torch.float64, frozen=HEAD, tight=True, bias=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_the_reference(case, target, small_tiles):
    target.require(case.dtype)
    check_logprob(case, target.device)
    check_weighted_nll(case, "one_pass", z_loss=0.01 if case.largest_logit == 0 else 0.0, device=target.device)


def rising(n=24, d=16, v=400):
    """Each slice's logits lie 30 above those before: every pivot moves in every slice."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d, dtype=torch.float64), torch.randn(v, d, dtype=torch.float64)
    bias = torch.linspace(0, 240, v, dtype=torch.float64)
    labels = torch.randint(0, v, (n,))
    labels[: n // 2] = v - 1 - torch.arange(n // 2) % 5
    return hidden, weight, labels, bias


def check_rising(order: str, device: str = "cpu", learns: str = "hidden", workspace_mb: float = 0.02) -> None:
    hidden, weight, labels, bias = rising()
    if order == "falling":
        weight, bias, labels = weight.flip(0), bias.flip(0), weight.shape[0] - 1 - labels
    if learns == "hidden":
        leaves, ours = [hidden.requires_grad_()], [hidden]
    else:
        leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    upstream = torch.linspace(-1, 1.5, len(labels), dtype=torch.float64)
    truth_logp = linear_logprob_ref(hidden, weight, labels, bias)
    truth = torch.autograd.grad((truth_logp * upstream).sum(), leaves)

    def on(dtype):
        return [t.detach().to(device, dtype).requires_grad_(t.requires_grad) for t in (hidden, weight, bias)]

    own = on(torch.float32)
    own_logp = linear_logprob_ref(*own[:2], labels.to(device), own[2], dtype=torch.float32)
    ours = on(torch.float32)
    logp = linear_logprob(*ours[:2], labels.to(device), ours[2], workspace_mb=workspace_mb)
    assert_result(logp.cpu(), truth_logp.detach())
    upstream = upstream.to(device, torch.float32)
    names = ("dhidden", "dweight", "dbias")
    found = torch.autograd.grad((logp * upstream).sum(), [t for t in ours if t.requires_grad])
    plain = torch.autograd.grad((own_logp * upstream).sum(), [t for t in own if t.requires_grad])
    for name, g, t, o in zip(names, found, truth, plain, strict=False):
        assert_gradient(g.cpu(), t, o.cpu(), name)


@pytest.mark.parametrize(
    ("learns", "workspace_mb"), [("hidden", 0.02), ("all", 0.03), ("all", 0.06), ("all", 0.0645), ("all", 8)]
)
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_pivots_that_move_in_every_slice(order, learns, workspace_mb, target, small_tiles):
    check_rising(order, target.device, learns, workspace_mb)


def test_tokens_forbidden_until_the_last_slice(target, small_tiles):
    """Rows of -inf alone in the first slices: no NaN, and the gradient of what remains."""
    hidden, weight, labels, _ = Case("", ignored=0.0, frozen=("weight",)).inputs(target.device)
    bias = torch.full((weight.shape[0],), -torch.inf, device=target.device)
    bias[-7:] = 0
    labels = weight.shape[0] - 1 - labels % 7
    (got,) = torch.autograd.grad(linear_logprob(hidden, weight, labels, bias, workspace_mb=0.06).sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(linear_logprob_ref(exact, weight.double(), labels, bias.double()).sum(), exact)
    assert rms(got - truth) <= 2.0**-17 * rms(truth)


def test_a_confident_token_keeps_its_digits_in_bf16(target):
    """p_y = 1 - 1e-3: in bf16 p_y rounds to 1, and a gradient made from it would be 0 or noise."""
    target.require(BF16)
    torch.manual_seed(0)
    hidden = torch.zeros(4, 32, dtype=BF16)
    hidden[:, 0] = 12
    weight = (torch.randn(200, 32) * 0.05).to(BF16)
    weight[:, 0] = 0
    weight[7, 0] = 1
    labels = torch.full((4,), 7)
    ours = hidden.to(target.device).requires_grad_()
    logp = linear_logprob(ours, weight.to(target.device), labels.to(target.device))
    (got,) = torch.autograd.grad(logp.sum(), ours)
    exact = hidden.double().requires_grad_()
    (truth,) = torch.autograd.grad(linear_logprob_ref(exact, weight.double(), labels).sum(), exact)
    assert 5e-4 < truth[:, 0].max() < 2e-3
    assert rms(got.cpu() - truth) <= 2.0**-8 * rms(truth)


@pytest.mark.parametrize("workspace_mb", [0.04, 64])
def test_logits_of_a_frozen_head_are_computed_once_at_any_budget(workspace_mb, small_tiles):
    hidden, weight, labels, _ = Case("", ignored=0.0, frozen=("weight",)).inputs()
    (n, d), v = hidden.shape, weight.shape[0]
    with use_backend("torch"), Products() as products:
        linear_logprob(hidden, weight, labels, workspace_mb=workspace_mb).sum().backward()
        assert products.logits(d) == n * v
        linear_weighted_nll(hidden, weight, labels, None, workspace_mb=workspace_mb).backward()
        assert products.logits(d) == 2 * n * v


def test_a_label_more_likely_than_all_others_keeps_its_digits(target):
    """log p of 1 - p = 1e-9, which no sum of both in fp32 shows, and its gradient."""
    hidden, weight = torch.zeros(3, 8), torch.zeros(11, 8)
    hidden[:, 0], weight[4, 0] = torch.tensor([20.0, 23.0, 30.0]), 1.0
    labels = torch.full((3,), 4)
    exact = hidden.double().requires_grad_()
    truth = -(10 * (-exact[:, 0]).exp()).log1p()
    ours = [t.to(target.device).requires_grad_() for t in (hidden, weight)]
    logp = linear_logprob(*ours, labels.to(target.device))
    torch.testing.assert_close(logp.cpu().double(), truth, rtol=1e-5, atol=0)
    (got,), (expected,) = torch.autograd.grad(logp.sum(), ours[:1]), torch.autograd.grad(truth.sum(), exact)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_hidden_states_by_columns(target, frozen):
    """A transposed matrix, whose memory new tensors are shaped after."""
    target.require(BF16)
    hidden, weight, labels, _ = Case("", dtype=BF16, shape=(40, 24, 37), ignored=0.0).inputs(target.device)
    weight.requires_grad_(not frozen)
    found = []
    for given in (hidden.detach(), hidden.detach().t().contiguous().t()):
        leaves = [t for t in (given.requires_grad_(), weight) if t.requires_grad]
        losses = linear_logprob(given, weight, labels).sum(), linear_weighted_nll(given, weight, labels, None)
        found += [torch.autograd.grad(loss, leaves) for loss in losses]
    for got, expected in zip(found[2:], found[:2], strict=True):
        for g, e in zip(got, expected, strict=True):
            assert_gradient(g, e, e)


def test_labels_that_many_rows_share(target):
    """Their rows of dW are summed in fp32 and rounded once: 300 rows of one label, in bf16."""
    target.require(BF16)
    case = Case("", dtype=BF16, shape=(400, 24, 37), ignored=0.0)
    hidden, weight, labels, _ = case.inputs()
    labels[50:350] = 5
    ours = [t.detach().to(target.device).requires_grad_() for t in (hidden, weight)]
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    upstream = torch.linspace(0.5, 1.5, 400, dtype=torch.float64)
    logp = linear_logprob(*ours, labels.to(target.device))
    got = torch.autograd.grad((logp * upstream.to(target.device, torch.float32)).sum(), ours)
    truth = torch.autograd.grad((linear_logprob_ref(*exact, labels) * upstream).sum(), exact)
    for name, g, t in zip(("dhidden", "dweight"), got, truth, strict=True):
        # Of exact operands: the error is that of rounding E, the scaled rows and the result, each once.
        assert rms(g.cpu() - t) <= 2.6e-3 * rms(t), f"{name}: {rms(g.cpu() - t) / rms(t):.2e}"


FROZEN_RISING = ("rising", "hidden", 0.02)
LEARNING_RISING = ("rising", "all", 0.0645)
# module, text, mistake, what shows it: a case, or arguments of check_rising
MISTAKES = {
    "sums are not rescaled": (engines, "sum_nx.mul_(decay_n1)", "sum_nx.clone().mul_(decay_n1)", FROZEN_RISING),
    "rescaled the wrong way": (
        engines,
        "(before_n - pivot_n).exp()",
        "(pivot_n - before_n).exp().clamp(max=1e30)",
        FROZEN_RISING,
    ),
    "the label's vector is left out": (
        engines,
        "head.labels_NK.squeeze(1), label_N)",
        "head.labels_NK.squeeze(1), 0 * label_N)",
        "slices",
    ),
    "the label's row of dW is left out": (
        engines,
        "((dweight_cd, hidden_nd), (dright",
        "((None, hidden_nd), (dright",
        "all learn",
    ),
    "the label's bias is left out": (
        engines,
        "kernels.add_label_rows(dbias_c",
        "(lambda *_: None)(dbias_c",
        "all learn",
    ),
    "hidden is not scaled": (
        engines,
        "kernels.combine_rows(scaled_nd, hidden_nd, scale_n, gathered=head.gathered)",
        "scaled_nd.copy_(hidden_nd)",
        "all learn",
    ),
    "the scale of dbias is coarse": (
        engines,
        "torch.stack((scale_n, scale_n - scale_n.to(head.operand)), 1)",
        "torch.stack((scale_n.bfloat16(), 0 * scale_n), 1)",
        "all learn",
    ),
    "the label's slope is left out": (
        labels,
        "logp_n.expm1()) * slope",
        "logp_n.expm1())",
        "slices, scale and temperature",
    ),
    "p_y is left out": (labels, "+ prob_n * logp_n.expm1()", "- prob_n", "slices, confident"),
    "smoothing is left out": (labels, "addcmul_(constant[0]", "addcmul_(0 * constant[0]", "slices, smoothing"),
    "a label counts twice": (
        labels,
        "label_n.where((labels_n >= 0) & (labels_n < c)",
        "label_n.where((labels_n >= 0) & (labels_n < 2 * c)",
        "some kept",
    ),
}
LEARNING = {
    "all learn": Case("all learn", bias=True),
    "some kept": Case("some kept", workspace_mb=0.12),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused(mistake, target, small_tiles, monkeypatch, tmp_path):
    module, before, after, shown_by = MISTAKES[mistake]
    if module is labels and target.backend == "triton":
        pytest.skip("its own kernels: tests/test_label_kernels.py")
    mutant = mutant_of(module, before, after, tmp_path)
    if module is labels:
        for name in ("row_scales", "combine_rows", "add_label_rows"):
            monkeypatch.setattr(labels, name, getattr(mutant, name))
        mutant = engines
    for op in (logprob, weighted_nll):
        for name in ("exp_pass", "frozen_gradient", "vocabulary_pass", "one_pass"):
            if hasattr(op, name):
                monkeypatch.setattr(op, name, getattr(mutant, name))
    if isinstance(shown_by, tuple):
        order, learns, workspace_mb = shown_by
        with pytest.raises(AssertionError):
            check_rising(order, target.device, learns, workspace_mb)
        return
    case = LEARNING.get(shown_by) or next(case for case in CASES if case.id == shown_by)
    with pytest.raises(AssertionError):
        check_logprob(case, target.device)


# backend: mistake: text, what replaces it, what shows it
KERNEL_MISTAKES = {
    "torch": {
        "earlier exponentials keep the old pivot": ("earlier_nc[low_n] =", "earlier_nc.clone()[low_n] =", None),
        "their sum keeps the old pivot": ("stats.others_N.mul_(decay_n)", "stats.others_N.clone().mul_(decay_n)", None),
        "the label stays": ("masked_fill_(inside_nk, 0.0))", "masked_fill_(inside_nk & False, 0.0))", None),
        "the raised pivot is not kept": ("stats.max_N.copy_(raised_n)", "stats.max_N.clone().copy_(raised_n)", None),
        "no slope of the softcap": ("exp_nv.mul_(transform.cap", "(transform.cap", Case("", options={"softcap": 5.0})),
    },
    "triton": {
        "earlier exponentials keep the old pivot": ("to(tl.float32) * decay", "to(tl.float32)", None),
        "their sum keeps the old pivot": ("others *= decay", "others *= 1.0", None),
        "the label stays": ('columns == label, float("-inf"), z', 'columns < 0, float("-inf"), z', None),
        "the raised pivot is not kept": ("pivot = top\n", "pivot = pivot\n", None),
        "no slope of the softcap": ("e *= 1.0 - tanh * tanh", "e *= 1.0", Case("", options={"softcap": 5.0})),
        "no slope of the scale": ("return scale * x", "return x", Case("", options={"logit_scale": 0.5})),
        "no bias": ("x += tl.load(bias_ptr", "x + tl.load(bias_ptr", Case("", bias=True)),
        "tail counted": ('z = tl.where(mask, z, float("-inf"))\n    others', "others", Case("", logits=0.1)),
        "last column dropped": ("mask = columns < C\n    x", "mask = columns < C - 1\n    x", Case("", logits=0.1)),
        "a block is lost": ("lane_sum += e\n        if", "lane_sum = e\n        if", Case("", logits=0.1)),
        "argmax without its slice": (
            "slice_argmax.to(tl.int64) + v_start, old_argmax))\n        tl.store(top_ptr",
            "slice_argmax.to(tl.int64), old_argmax))\n        tl.store(top_ptr",
            Case("", outputs=("argmax",), workspace_mb=0.12),
        ),
    },
}


@pytest.mark.parametrize(
    ("backend", "mistake"), [(backend, mistake) for backend in KERNEL_MISTAKES for mistake in KERNEL_MISTAKES[backend]]
)
def test_a_mistake_in_the_kernel_is_refused(backend, mistake, small_tiles, monkeypatch, tmp_path):
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("Triton is interpreted on machines without a GPU")
        triton_interpreter.mend()
    before, after, case = KERNEL_MISTAKES[backend][mistake]
    module = importlib.import_module(f"var_kernels.kernels.rows_{backend}")
    mutant = mutant_of(module, before, after, tmp_path)
    for name in ("BLOCK_ELEMENTS", "EXP_BLOCK_COLUMNS"):
        if hasattr(module, name):
            setattr(mutant, name, getattr(module, name))
    check = functools.partial(check_rising, *LEARNING_RISING[:1], "cpu", *LEARNING_RISING[1:])
    if case is not None:
        check = functools.partial(check_logprob, case)
    with use_backend(backend):
        check()
        monkeypatch.setattr(module, "row_exp", mutant.row_exp)
        with pytest.raises(AssertionError):
            check()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_label_that_nobody_looked_at(target, frozen, monkeypatch):
    """Beyond the vocabulary, on an accelerator, whose values are not read: NaN in its own row, no other harm."""
    monkeypatch.setattr(checks, "check_values", lambda *_: None)
    hidden, weight, labels, _ = Case("", ignored=0.0).inputs(target.device)
    labels[3] = weight.shape[0]
    logp = linear_logprob(hidden, weight.detach() if frozen else weight, labels)
    logp.sum().backward()
    right = torch.arange(len(labels), device=logp.device) != 3
    assert logp[3].isnan()
    assert logp[right].isfinite().all()
    assert hidden.grad[right].isfinite().all()
