"""The frozen head's pass: two GEMMs at any budget, sums over rising pivots, the label beside them."""

import pytest
import torch

from tests.mutation import mutant_of
from tests.op_cases import Case, check_logprob, check_weighted_nll
from tests.tolerance import rms
from var_kernels.ops import checks, engines, frozen, linear_logprob, linear_weighted_nll, logprob
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


def check_rising(order: str, device: str = "cpu") -> None:
    hidden, weight, labels, bias = rising()
    if order == "falling":
        weight, bias, labels = weight.flip(0), bias.flip(0), weight.shape[0] - 1 - labels
    leaf = hidden.clone().requires_grad_()
    (truth,) = torch.autograd.grad(linear_logprob_ref(leaf, weight, labels, bias).sum(), leaf)
    ours, weight, bias = (t.to(device, torch.float32) for t in (hidden, weight, bias))
    logp = linear_logprob(ours.requires_grad_(), weight, labels.to(device), bias, workspace_mb=0.02)
    (got,) = torch.autograd.grad(logp.sum(), ours)
    assert rms(got.cpu() - truth) <= 2.0**-17 * rms(truth)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_pivots_that_move_in_every_slice(order, target, small_tiles):
    check_rising(order, target.device)


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


def counting(monkeypatch):
    """Logits computed: by the pass itself, and by every other engine."""
    computed = {"frozen": 0, "engines": 0}

    def counted(module, name):
        original = module.logits_into

        def logits_into(out, *rest):
            computed[name] += out.numel()
            original(out, *rest)

        monkeypatch.setattr(module, "logits_into", logits_into)

    counted(frozen, "frozen")
    counted(engines, "engines")
    return computed


@pytest.mark.parametrize("workspace_mb", [0.03, 64])
def test_logits_are_computed_once_at_any_budget(workspace_mb, small_tiles, monkeypatch):
    computed = counting(monkeypatch)
    hidden, weight, labels, _ = Case("", ignored=0.0, frozen=("weight",)).inputs()
    every = hidden.shape[0] * weight.shape[0]
    with use_backend("torch"):
        linear_logprob(hidden, weight, labels, workspace_mb=workspace_mb).sum().backward()
        assert computed == {"frozen": every, "engines": 0}
        linear_weighted_nll(hidden, weight, labels, None, workspace_mb=workspace_mb).backward()
        assert computed == {"frozen": 2 * every, "engines": 0}


def test_a_bias_that_learns_takes_another_engine(monkeypatch):
    computed = counting(monkeypatch)
    hidden, weight, labels, bias = Case("", frozen=("weight",), bias=True).inputs()
    linear_logprob(hidden, weight, labels, bias).sum().backward()
    assert computed["frozen"] == 0
    assert bias.grad is not None


# (text, mistake, the case that shows it; None: pivots that rise)
MISTAKES = {
    "sums are not rescaled": ("sum_nd.mul_((pivot_n - raised_n)", "sum_nd.clone().mul_((pivot_n - raised_n)", None),
    "rescaled the wrong way": ("(pivot_n - raised_n).exp()", "(raised_n - pivot_n).exp().clamp(max=1e30)", None),
    "the label stays in the sum": (
        "-(chunk.label_logit_NK - below_n.unsqueeze(1)).exp()",
        "0 * chunk.label_logit_NK",
        "slices",
    ),
    "the label's slope is left out": (
        " * head.options.transform.derivative(label_logit_n)",
        "",
        "slices, scale and temperature",
    ),
    "p_y is left out": (
        "prob_n + label_n + prob_n * (label_logit_n - stats.max_N - log_sum_n).expm1()",
        "label_n",
        "slices, confident",
    ),
    "smoothing is left out": (
        "(coefficients.constant_N * head",
        "(0 * coefficients.constant_N * head",
        "slices, smoothing",
    ),
    "divided by the maximum alone": ("(pivot_n - stats.max_N - log_sum_n)", "(pivot_n - stats.max_N)", "slices"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused(mistake, target, small_tiles, monkeypatch, tmp_path):
    before, after, shown_by = MISTAKES[mistake]
    monkeypatch.setattr(logprob, "frozen", mutant_of(frozen, before, after, tmp_path))
    check, case = check_logprob, next((case for case in CASES if case.id == shown_by), None)
    if case is None:
        check, case = check_rising, "rising"
    with pytest.raises(AssertionError):
        check(case, target.device)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_label_that_nobody_looked_at(target, frozen, monkeypatch):
    """Beyond the vocabulary, on an accelerator, whose values are not read: NaN in its own row, no other harm."""
    monkeypatch.setattr(checks, "values_readable", lambda t: False)
    hidden, weight, labels, _ = Case("", ignored=0.0).inputs(target.device)
    labels[3] = weight.shape[0]
    logp = linear_logprob(hidden, weight.detach() if frozen else weight, labels)
    logp.sum().backward()
    right = torch.arange(len(labels), device=logp.device) != 3
    assert logp[3].isnan()
    assert logp[right].isfinite().all()
    assert hidden.grad[right].isfinite().all()
