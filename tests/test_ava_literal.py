"""``linear_prob_lse`` against the full probabilities in fp64, and AVA's literal Q made from it."""

import math

import pytest
import torch

from tests.op_cases import Case
from tests.tolerance import assert_gradient, assert_result
from var_kernels.losses.ava import ava_d_loss, literal_q
from var_kernels.measure import peak_extra_bytes
from var_kernels.ops import linear_logprob
from var_kernels.ops.ava_literal import linear_prob_lse
from var_kernels.reference import logits_ref

FP64 = torch.float64
CASES = [
    Case("plain"),
    Case("flat rows", logits=0.1),
    Case("confident rows", logits=30.0),
    Case("ragged", tight=True, bias=True),
    Case("softcap", tight=True, options={"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7}, bias=True),
    Case("frozen weight", frozen=("weight",), bias=True),
    Case("one row", shape=(1, 72, 507), ignored=0.0),
    Case("fp64", dtype=FP64, tight=True, bias=True),
    Case("bf16", dtype=torch.bfloat16, tight=True),
]


def prob_lse_ref(leaves, labels, alpha, dtype=FP64, **options):
    hidden, weight, bias = leaves
    p = logits_ref(hidden, weight, bias, dtype=dtype, **options).softmax(-1)
    return (alpha * p).logsumexp(-1).where(labels != -100, 0.0)


@pytest.mark.parametrize("alpha", [0.5, 300.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_the_full_probabilities(case, alpha, target, small_tiles):
    target.require(case.dtype)
    hidden, weight, labels, bias = case.inputs(target.device)
    got = linear_prob_lse(hidden, weight, labels, bias, alpha=alpha, **case.options, **case.workspace())
    upstream = torch.linspace(-1, 1, labels.numel(), dtype=FP64, device=target.device)
    (got * upstream.to(got.dtype)).sum().backward()

    def reference(dtype):
        leaves = [
            None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (hidden, weight, bias)
        ]
        value = prob_lse_ref(leaves, labels, alpha, dtype, **case.options)
        (value * upstream.to(dtype)).sum().backward()
        return value, leaves

    truth, truth_leaves = reference(FP64)
    _, own_leaves = reference(case.dtype)
    assert_result(got, truth)
    for leaf, expected, own in zip((hidden, weight, bias), truth_leaves, own_leaves, strict=True):
        if leaf is not None and leaf.requires_grad:
            assert_gradient(leaf.grad, expected.grad, own.grad)


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=FP64) for s in ((3, 4), (7, 4), (7,)))
    labels = torch.tensor([0, -100, 5])
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: linear_prob_lse(h, w, labels, b, alpha=6.0, softcap=3.0), leaves)


def test_limits():
    hidden, weight, labels, _ = Case("", dtype=FP64, ignored=0.0).inputs()
    v = weight.shape[0]
    tiny = linear_prob_lse(hidden, weight, labels, alpha=1e-9)
    torch.testing.assert_close(tiny, torch.full_like(tiny, math.log(v)))
    uniform = linear_prob_lse(torch.zeros_like(hidden), weight, labels, alpha=5.0)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 5 / v + math.log(v)))
    certain = linear_prob_lse(1e7 * hidden, weight, labels, alpha=2.0)
    torch.testing.assert_close(certain, torch.full_like(certain, math.log(v - 1 + math.exp(2))))


def test_literal_ava_through_the_head():
    """log softmax(alpha p)[y] from the two ops, in AVA's loss, against autograd over the full probabilities."""
    hidden, weight, labels, _ = Case("", dtype=FP64).inputs()
    alpha, mask = math.log(507), (labels != -100).view(7, 9)
    mu, log_sigma = (torch.randn(7, 9, generator=torch.Generator().manual_seed(s), dtype=FP64) / 2 for s in (1, 2))
    logp = linear_logprob(hidden, weight, labels).view(7, 9)
    prob_lse = linear_prob_lse(hidden, weight, labels, alpha=alpha).view(7, 9)
    loss = ava_d_loss(literal_q(logp, prob_lse, alpha=alpha), mu, log_sigma, mask).sum()
    full = (alpha * logits_ref(hidden, weight).softmax(-1)).log_softmax(-1)
    q = full.gather(-1, labels.clamp(min=0)[:, None]).view(7, 9)
    expected = ava_d_loss(q, mu, log_sigma, mask).sum()
    torch.testing.assert_close(loss, expected)
    got, want = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    for g, w in zip(got, want, strict=True):
        assert_gradient(g, w, w)


def test_nothing_counts():
    hidden, weight, labels, _ = Case("").inputs()
    out = linear_prob_lse(hidden, weight, torch.full_like(labels, -100), alpha=1.0)
    assert out.count_nonzero() == 0
    out.sum().backward()
    assert hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0


def test_peak_is_bounded():
    n, d, v, workspace_mb = 512, 32, 12_000, 3
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    labels = torch.zeros(n, dtype=torch.int64)

    def step():
        out = linear_prob_lse(hidden, weight, labels, alpha=5.0, workspace_mb=workspace_mb)
        return torch.autograd.grad(out.sum(), (hidden, weight))

    bound = (workspace_mb << 20) + (n + v) * d * 4 + 40 * 8 * n
    assert peak_extra_bytes(step) <= bound < n * v * 4 / 4


def test_refusals():
    hidden, weight, labels, _ = Case("").inputs()
    with pytest.raises(ValueError, match="alpha must be finite and > 0, got 0"):
        linear_prob_lse(hidden, weight, labels, alpha=0.0)
    with pytest.raises(ValueError, match="labels must hold one entry a row"):
        linear_prob_lse(hidden, weight, labels.unsqueeze(1), alpha=1.0)
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor, got list"):
        linear_prob_lse(hidden, weight, labels.tolist(), alpha=1.0)
    with pytest.raises(ValueError, match="nothing is shifted"):
        linear_prob_lse(hidden, weight, labels[1:], alpha=1.0)
