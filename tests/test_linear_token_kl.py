"""``linear_token_kl`` against the full logits of both models in fp64: values, gradients, calls of every kind."""

import pytest
import torch

from tests.kl_cases import BF16, D_REF, FP64, D, KLCase, N, V, inputs, run_case
from tests.op_cases import Case
from tests.products import Products
from tests.tolerance import assert_result
from var_kernels.ops import linear_logprob, linear_token_kl
from var_kernels.reference import linear_token_kl_ref

CASES = [
    KLCase("plain"),
    KLCase("flat rows", Case("", logits=0.1)),
    KLCase("confident rows", Case("", logits=30.0)),
    KLCase("nearly equal models", near=1e-3),
    KLCase("ragged chunks", Case("", tight=True, bias=True), ref_bias=True),
    KLCase("rows split too", Case("", bias=True), ref_bias=True, workspace_mb=0.035),
    KLCase(
        "softcap, scale, temperature",
        Case("", options={"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7}, bias=True, tight=True),
        ref_options={"softcap": 3.0, "temperature": 1.5},
    ),
    KLCase("every logit far below 0", Case("", bias=True, offset=-1e4), ref_bias=True),
    KLCase("frozen head", Case("", frozen=("weight",))),
    KLCase("frozen hidden", Case("", frozen=("hidden",), bias=True, tight=True)),
    KLCase("frozen weight, bias learns", Case("", frozen=("weight",), bias=True)),
    KLCase("one row", Case("", shape=(1, D, V), ignored=0.0)),
    KLCase("tiny vocabulary", Case("", shape=(17, 5, 3), bias=True)),
    KLCase("fp64, ragged", Case("", dtype=FP64, bias=True, tight=True, options={"softcap": 5.0}), ref_bias=True),
    KLCase("bf16", Case("", dtype=BF16, bias=True)),
    KLCase("bf16, ragged", Case("", dtype=BF16, tight=True)),
    KLCase("fp32 policy, bf16 reference", ref_dtype=BF16),
    KLCase("fp16", Case("", dtype=torch.float16)),
]


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equals_the_full_logits(case, direction, engine, device, small_tiles):
    run_case(case, direction, engine, device)


def test_by_hand():
    """Two tokens: p = (1/2, 1/2), q = (3/4, 1/4)."""
    hidden, weight = torch.ones(1, 1, dtype=FP64), torch.zeros(2, 1, dtype=FP64)
    ref_weight = torch.tensor([[3.0], [1.0]], dtype=FP64).log()
    half, three = torch.tensor(0.5, dtype=FP64).log(), torch.tensor([0.75, 0.25], dtype=FP64)
    reverse = linear_token_kl(hidden, weight, hidden, ref_weight)
    assert reverse.item() == pytest.approx((0.5 * (half - three.log())).sum().item(), rel=1e-12)
    forward = linear_token_kl(hidden, weight, hidden, ref_weight, direction="forward")
    assert forward.item() == pytest.approx((three * (three.log() - half)).sum().item(), rel=1e-12)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradcheck(direction):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, ref_hidden, ref_weight = (
        torch.randn(shape, generator=generator, dtype=FP64) for shape in ((3, 4), (7, 4), (7,), (3, 2), (7, 2))
    )
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    token_weight = torch.randn(3, generator=generator, dtype=FP64).requires_grad_()

    def kl(hidden, weight, bias):
        return linear_token_kl(hidden, weight, ref_hidden, ref_weight, None, bias, direction=direction, softcap=4.0)

    def weighted(hidden, weight, bias, token_weight):
        options = {"direction": direction, "token_weight": token_weight, "reduction": "sum"}
        return linear_token_kl(hidden, weight, ref_hidden, ref_weight, None, bias, **options)

    assert torch.autograd.gradcheck(kl, leaves)
    assert torch.autograd.gradcheck(weighted, (*leaves, token_weight))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_model_lies_at_0_from_itself(direction, small_tiles):
    hidden, weight, *_ = inputs()
    for workspace in (0.08, None):
        kl = linear_token_kl(hidden, weight, hidden, weight, direction=direction, workspace_mb=workspace)
        assert kl.count_nonzero() == 0
        kl.sum().backward()
        assert hidden.grad.abs().max() < 1e-5
        hidden.grad = weight.grad = None


def test_gradients_of_the_two_directions_and_the_cross_entropy():
    """KL(q||p) for a q that is certain of one token is that token's negative log-prob."""
    hidden, weight, _, _, labels = inputs(FP64)
    labels = labels.clamp(min=0)
    ref_weight = torch.eye(V, dtype=FP64) * 1e4
    certain = torch.nn.functional.one_hot(labels, V).double()
    kl = linear_token_kl(hidden, weight, certain, ref_weight, direction="forward")
    logp = linear_logprob(hidden, weight, labels)
    torch.testing.assert_close(kl, -logp)
    got = torch.autograd.grad(kl.sum(), (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(-logp.sum(), (hidden, weight)))


def test_forbidden_tokens():
    hidden, weight, ref_hidden, ref_weight, labels = inputs(FP64)
    forbids = torch.zeros(V, dtype=FP64)
    forbids[100:] = -torch.inf
    both = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, forbids, forbids)
    fewer = linear_token_kl(hidden, weight[:100], ref_hidden, ref_weight[:100], labels != -100)
    torch.testing.assert_close(both, fewer)
    gradient = torch.autograd.grad(both.sum(), hidden)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(fewer.sum(), hidden)[0])
    kept = labels != -100
    assert linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, None, forbids)[kept].isposinf().all()
    assert linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, forbids)[kept].isfinite().all()


def test_rows_by_labels_mask_or_none():
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    kept = labels != -100
    whole = linear_token_kl(hidden, weight, ref_hidden, ref_weight)
    by_labels = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels)
    by_mask = linear_token_kl(hidden, weight, ref_hidden, ref_weight, kept)
    assert torch.equal(by_labels, by_mask)
    assert by_labels[~kept].count_nonzero() == 0
    torch.testing.assert_close(by_labels[kept], whole[kept])
    padded = linear_token_kl(hidden.view(7, 9, D), weight, ref_hidden.view(7, 9, D_REF), ref_weight, labels.view(7, 9))
    assert torch.equal(padded.view(-1), by_labels)
    # what does not count may hold anything, in either model
    broken, ref_broken = hidden.detach().clone(), ref_hidden.clone()
    broken[~kept] = ref_broken[~kept] = torch.nan
    assert torch.equal(linear_token_kl(broken, weight, ref_broken, ref_weight, labels), by_labels)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_nothing_counts(reduction):
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    kl = linear_token_kl(hidden, weight, ref_hidden, ref_weight, torch.full_like(labels, -100), reduction=reduction)
    assert kl.count_nonzero() == 0
    kl.sum().backward()
    assert hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trained head", "frozen head"])
def test_backward_twice(frozen):
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    weight.requires_grad_("weight" not in frozen)
    kl = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels).sum()
    kl.backward(retain_graph=True)
    first = hidden.grad.clone()
    kl.backward()
    torch.testing.assert_close(hidden.grad, 2 * first)


def test_a_frozen_head_recomputes_nothing():
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    with Products() as products:
        linear_token_kl(hidden, weight.detach(), ref_hidden, ref_weight, labels).sum().backward()
    assert len(products.sizes) == 3  # both models' logits, and dhidden


def test_strided_inputs_and_upstream():
    hidden, weight, ref_hidden, ref_weight, labels = inputs(FP64)
    expected = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels)
    weights = torch.linspace(-1, 1, 2 * N, dtype=FP64)[::2]
    want = torch.autograd.grad(expected, (hidden, weight), weights.contiguous())
    strided = [torch.stack([t.detach(), t.detach()], -1)[..., 0] for t in (hidden, weight, ref_hidden, ref_weight)]
    leaves = [t.requires_grad_() for t in strided[:2]]
    kl = linear_token_kl(*strided, labels)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(torch.autograd.grad(kl, leaves, weights), want)


def test_without_gradients():
    args = inputs()
    expected = linear_token_kl(*args)
    with torch.inference_mode():
        got = linear_token_kl(*args)
        total = linear_token_kl(*args, reduction="sum")
    assert not got.requires_grad
    assert torch.equal(got, expected.detach())
    assert_result(total, got.sum())


def test_autocast():
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    rounded = [t.detach().bfloat16() for t in (hidden, weight, ref_hidden, ref_weight)]
    with torch.autocast("cpu", torch.bfloat16):
        kl = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels)
    assert torch.equal(kl.detach(), linear_token_kl(*rounded, labels))
    kl.sum().backward()
    assert hidden.grad.dtype == torch.float32


def test_the_reference_is_a_constant():
    """Also where its tensors require gradients, and where it is the policy itself: one that learns is ``ref_grad``."""
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    teacher = [t.requires_grad_() for t in (ref_hidden, ref_weight, torch.randn(V), torch.randn(len(hidden), 2))]
    factors = (teacher[3], torch.randn(V, 2, requires_grad=True))
    for reduction in ("none", "sum"):
        kl = linear_token_kl(
            hidden, weight, ref_hidden, ref_weight, labels, None, teacher[2], ref_low_rank=factors, reduction=reduction
        )
        found = torch.autograd.grad(kl.sum(), [hidden, *teacher, factors[1]], allow_unused=True)
        assert found[0].any()
        assert found[1:] == (None,) * 5
    itself = linear_token_kl(hidden, weight, hidden, weight, labels, temperature=2.0).sum()
    frozen = linear_token_kl(hidden, weight, hidden.detach(), weight.detach(), labels, temperature=2.0).sum()
    for got, expected in zip(*(torch.autograd.grad(kl, (hidden, weight)) for kl in (itself, frozen)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_biases_of_fp32_beside_16_bit(direction):
    hidden, weight, ref_hidden, ref_weight, labels = inputs(BF16)
    bias, ref_bias = torch.randn(V, requires_grad=True), torch.randn(V)
    kl = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias, direction=direction)
    exact = [t.detach().double() for t in (hidden, weight, ref_hidden, ref_weight)]
    exact_bias = bias.detach().double().requires_grad_()
    truth = linear_token_kl_ref(*exact, labels, exact_bias, ref_bias.double(), direction=direction)
    assert_result(kl, truth)
    (got,), (expected,) = (torch.autograd.grad(t.sum(), b) for t, b in ((kl, bias), (truth, exact_bias)))
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() <= 2.0**-15 * expected.abs().max()


def test_fast_precision():
    hidden, weight, ref_hidden, ref_weight, labels = inputs(BF16)
    fine = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels)
    fast = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, precision="fast")
    assert fast.dtype == torch.float32
    assert 0 < (fine - fast).abs().max() < 0.2
    fast.sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.slow
def test_compiled_breaks_the_graph_and_agrees():
    args = inputs()
    compiled = torch.compile(lambda *a: 2 * linear_token_kl(*a), backend="eager")
    assert torch.equal(compiled(*args), 2 * linear_token_kl(*args))
