"""``linear_logprob``: values and gradients in every regime, and the behaviour that trainers rely on."""

import pytest
import torch

from tests.op_cases import CASES, SMALL, Case, check_logprob
from tests.products import Products
from tests.tolerance import assert_gradient, assert_result
from var_kernels.ops import linear_logprob
from var_kernels.ops.backend import use_backend
from var_kernels.reference import linear_logprob_ref


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_the_reference(case, target, small_tiles):
    target.require(case.dtype)
    check_logprob(case, target.device)


@pytest.mark.parametrize("entropy", [False, True])
def test_results_do_not_depend_on_the_budget(entropy, small_tiles):
    case = Case("budget", bias=True)
    results = []
    for workspace_mb in (0.03, 0.05, 0.11, 64):
        hidden, weight, labels, bias = case.inputs()
        output = linear_logprob(hidden, weight, labels, bias, return_entropy=entropy, workspace_mb=workspace_mb)
        (sum(t.sum() for t in output) if entropy else output.sum()).backward()
        results.append([hidden.grad, weight.grad, bias.grad])
    for other in results[:-1]:
        for got, expected in zip(other, results[-1], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_a_tight_budget_really_makes_chunks(small_tiles):
    hidden, weight, labels, _ = Case("", tight=True).inputs()
    # Its temporaries are part of the budget.
    with use_backend("torch"), Products() as products:
        linear_logprob(hidden, weight, labels, workspace_mb=0.03).sum().backward()
    widths = [n for _, n, k in products.sizes if k == hidden.shape[-1]]
    assert len(widths) >= 8
    assert len(set(widths)) >= 2, "no ragged slice"


def test_gradcheck_fp64(small_tiles):
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3, 3])

    def op(hidden, weight, bias):
        return linear_logprob(
            hidden,
            weight,
            labels,
            bias,
            softcap=2.0,
            logit_scale=0.8,
            temperature=1.2,
            label_smoothing=0.1,
            return_lse=True,
            return_entropy=True,
        )

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))


def test_gradcheck_frozen_head_fp64():
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64)
    labels = torch.tensor([0, 8, -100, 3, 3])
    assert torch.autograd.gradcheck(lambda h: linear_logprob(h, weight, labels, softcap=2.0), (hidden,))


def test_frozen_head_does_not_recompute_logits():
    hidden, weight, labels, _ = Case("", frozen=("weight",)).inputs()
    logp = linear_logprob(hidden, weight, labels)
    with Products() as products:
        logp.sum().backward()
    assert not products.sizes
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["two passes", "frozen head"])
def test_second_backward_repeats_the_first(frozen):
    hidden, weight, labels, _ = Case("", frozen=frozen).inputs()
    logp = linear_logprob(hidden, weight, labels, workspace_mb=0.5)
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    first = torch.autograd.grad(logp.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(logp.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("workspace_mb", "kept"), [(3, 0), (4, 1280), (64, 4000)])
def test_spare_memory_saves_the_recompute(workspace_mb, kept):
    """The backward computes the logits that the budget did not hold, a second one too."""
    n, d, v = 200, 256, 4000
    inputs = hidden, weight, labels, _ = Case("", shape=(n, d, v), ignored=0).inputs()
    truth = [t.detach().double().requires_grad_() for t in inputs[:2]]
    expected = torch.autograd.grad(linear_logprob_ref(*truth, labels).sum(), truth)
    own = [t.detach().requires_grad_() for t in inputs[:2]]
    own_gradients = torch.autograd.grad(linear_logprob_ref(*own, labels).sum(), own)
    with use_backend("torch"):  # the others' tiles differ
        logp = linear_logprob(hidden, weight, labels, workspace_mb=workspace_mb)
        for _ in range(2):
            with Products() as products:
                gradients = torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True)
            assert products.logits(d) == n * (v - kept)
            for triple in zip(gradients, expected, own_gradients, strict=True):
                assert_gradient(*triple)


def test_same_bits_twice(small_tiles, target):
    runs = []
    for _ in range(2):
        hidden, weight, labels, _ = Case("", tight=True).inputs(target.device)
        logp = linear_logprob(hidden, weight, labels, workspace_mb=0.05)
        logp.sum().backward()
        runs.append((logp.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_leading_shape_and_strides():
    """(B, T, D) from a transposed buffer, every other label, an upstream gradient that is not contiguous."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 4, 16).transpose(0, 1).requires_grad_()
    weight = torch.randn(40, 32)[:, ::2].requires_grad_()
    labels = torch.randint(0, 40, (4, 18))[:, ::2]
    upstream = torch.randn(9, 4).T
    assert not any(t.is_contiguous() for t in (hidden, weight, labels, upstream))
    logp = linear_logprob(hidden, weight, labels)
    expected = linear_logprob_ref(hidden, weight, labels)
    assert logp.shape == labels.shape
    assert_result(logp, expected)
    got = torch.autograd.grad(logp, (hidden, weight), upstream)
    truth = torch.autograd.grad(expected, (hidden, weight), upstream.double())
    for g, t in zip(got, truth, strict=True):
        torch.testing.assert_close(g, t.float(), rtol=1e-5, atol=1e-6)


def test_all_ignored_is_a_differentiable_zero():
    hidden, weight, labels, _ = Case("").inputs()
    logp, lse, argmax = linear_logprob(
        hidden, weight, torch.full_like(labels, -100), return_lse=True, return_argmax=True
    )
    assert logp.count_nonzero() == 0
    assert lse.count_nonzero() == 0
    assert (argmax == -1).all()
    (logp.sum() + lse.sum()).backward()
    assert hidden.grad.count_nonzero() == 0
    assert weight.grad.count_nonzero() == 0


def test_no_rows_at_all():
    weight = torch.randn(7, 4, requires_grad=True)
    logp = linear_logprob(torch.randn(2, 0, 4), weight, torch.empty(2, 0, dtype=torch.int64))
    assert logp.shape == (2, 0)
    logp.sum().backward()
    assert weight.grad.count_nonzero() == 0


def test_ignored_rows_may_hold_nan(target):
    """Padding is often uninitialised memory."""
    hidden, weight, labels, _ = Case("").inputs(target.device)
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    logp = linear_logprob(hidden, weight, labels)
    logp.sum().backward()
    assert logp.isfinite().all()
    assert weight.grad.isfinite().all()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("workspace_mb", [0.06, 64])
def test_nan_of_another_token_is_not_lost(target, workspace_mb, small_tiles):
    """One row of a diverged head: whatever is normalised by it is NaN, and a maximum must not hide it."""
    hidden, weight, labels, _ = Case("", ignored=0.0, frozen=("hidden", "weight")).inputs(target.device)
    weight[300] = torch.nan
    labels = labels.where(labels != 300, 7)
    outputs = linear_logprob(hidden, weight, labels, return_lse=True, return_entropy=True, workspace_mb=workspace_mb)
    assert all(t.isnan().all() for t in outputs)


def test_forbidden_tokens(target):
    """A bias of -inf takes a token out: same numbers as the smaller vocabulary, entropy and gradients finite."""
    hidden, weight, labels, _ = Case("", ignored=0.0).inputs(target.device)
    labels = labels % 400
    bias = torch.zeros(SMALL[2], device=target.device)
    bias[400:] = -torch.inf
    logp, entropy = linear_logprob(hidden, weight, labels, bias, return_entropy=True)
    small_logp, small_entropy = linear_logprob(hidden, weight[:400], labels, return_entropy=True)
    torch.testing.assert_close(logp, small_logp)
    torch.testing.assert_close(entropy, small_entropy)
    (logp + entropy).sum().backward()
    assert weight.grad[400:].count_nonzero() == 0
    assert weight.grad.isfinite().all()
    assert weight.grad[:400].count_nonzero() > 0


def test_no_grad_saves_nothing():
    hidden, weight, labels, _ = Case("").inputs()
    with torch.no_grad():
        assert not linear_logprob(hidden, weight, labels).requires_grad
    assert linear_logprob(hidden.detach(), weight.detach(), labels).grad_fn is None


def test_fast_precision_is_coarser_but_bounded():
    hidden, weight, labels, _ = Case("", dtype=torch.bfloat16, logits=5.0).inputs()
    exact = linear_logprob_ref(hidden, weight, labels)
    default_error = (linear_logprob(hidden, weight, labels) - exact).abs().max().item()
    fast = linear_logprob(hidden, weight, labels, precision="fast")
    fast_error = (fast - exact).abs().max().item()
    assert default_error < 1e-5 < fast_error < 0.2
    fast.sum().backward()
    assert weight.grad.isfinite().all()


def test_autocast_takes_the_path_of_a_linear_layer():
    hidden, weight, labels, _ = Case("").inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logprob(hidden, weight, labels)
    logp.sum().backward()
    assert logp.dtype == torch.float32
    assert hidden.grad.dtype == torch.float32
    rounded = linear_logprob_ref(hidden.bfloat16(), weight.bfloat16(), labels)
    assert_result(logp, rounded)


def test_label_ids_may_be_int32():
    hidden, weight, labels, _ = Case("").inputs()
    assert torch.equal(linear_logprob(hidden, weight, labels.int()), linear_logprob(hidden, weight, labels))


def test_another_ignore_index():
    hidden, weight, labels, _ = Case("").inputs()
    renamed = labels.masked_fill(labels == -100, -1)
    assert torch.equal(linear_logprob(hidden, weight, renamed, ignore_index=-1), linear_logprob(hidden, weight, labels))


def test_by_hand():
    """Two tokens with logits 0 and log 3: probabilities 1/4 and 3/4."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[1.0], [3.0]]).log()
    logp, lse, entropy, argmax = linear_logprob(
        hidden, weight, torch.tensor([0]), return_lse=True, return_entropy=True, return_argmax=True
    )
    torch.testing.assert_close(logp.exp().item(), 0.25)
    torch.testing.assert_close(lse.exp().item(), 4.0)
    torch.testing.assert_close(entropy.item(), 0.5623351446188083)
    assert argmax.tolist() == [1]


def test_strided_bias(target):
    hidden, weight, labels, _ = Case("").inputs(target.device)
    bias = torch.randn(2 * SMALL[2], device=target.device)[::2]
    assert_result(linear_logprob(hidden, weight, labels, bias), linear_logprob_ref(hidden, weight, labels, bias))


def test_strided_labels_and_upstream_gradient(target):
    """Several targets a row, both laid out by target: the row kernels read them row by row."""
    hidden, weight, labels, _ = Case("", targets=3, ignored=0.0).inputs(target.device)
    labels = labels.t().contiguous().t()
    upstream = torch.randn(labels.shape[::-1], device=target.device).t()
    truth = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logp, expected = linear_logprob(hidden, weight, labels), linear_logprob_ref(*truth, labels)
    assert_result(logp, expected)
    logp.backward(upstream)
    expected.backward(upstream.double())
    for name, got, leaf in zip(("dhidden", "dweight"), (hidden, weight), truth, strict=True):
        assert_gradient(got.grad, leaf.grad, leaf.grad, name)
