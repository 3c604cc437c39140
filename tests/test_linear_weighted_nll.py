"""``linear_weighted_nll``: both engines against the reference and against each other."""

import pytest
import torch

from tests.op_cases import CASES, Case, check_weighted_nll
from tests.products import took_one_pass
from var_kernels.ops import linear_logprob, linear_weighted_nll
from var_kernels.ops.backend import use_backend
from var_kernels.reference import linear_weighted_nll_ref

ENGINES = ["one_pass", "two_pass"]


def _budgeted(case: Case) -> Case:
    """One pass holds an fp32 dW for 16-bit weights inside the budget, so a tight one cannot serve it."""
    tight = case.tight and case.dtype in (torch.float32, torch.float64)
    return Case(**{**vars(case), "tight": tight})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", [c for c in CASES if not c.outputs], ids=lambda case: case.id)
def test_equals_the_reference(case, engine, target, small_tiles):
    target.require(case.dtype)
    check_weighted_nll(_budgeted(case), engine, device=target.device)


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_z_loss_and_reduction(engine, reduction, dtype, small_tiles):
    check_weighted_nll(Case("", dtype=dtype, bias=True), engine, reduction, z_loss=0.01)


def test_reduction_none(small_tiles):
    check_weighted_nll(Case("", bias=True, tight=True), "auto", "none", z_loss=0.01)


def test_bf16_in_several_chunks_with_a_wide_gradient(small_tiles):
    """The budget holds the fp32 dW and a few rows, so it is updated chunk by chunk."""
    case = Case("", dtype=torch.bfloat16)
    _, d, v = case.shape
    workspace_mb = (v * d * 4 + 60_000) / 2**20
    check_weighted_nll(
        case, "one_pass", op=lambda *a, **k: linear_weighted_nll(*a, **{**k, "workspace_mb": workspace_mb})
    )


def test_engines_agree_and_auto_follows_the_budget():
    case = Case("", dtype=torch.bfloat16, shape=(300, 64, 2000))
    hidden, weight, labels, _ = case.inputs()
    # Its temporaries are part of the budget.
    with use_backend("torch"):
        roomy = linear_weighted_nll(hidden, weight, labels, None, workspace_mb=64)
        tight = linear_weighted_nll(hidden, weight, labels, None, workspace_mb=3)
    assert took_one_pass(roomy)
    assert not took_one_pass(tight), "a budget without room for dW must take two passes"


def test_gradcheck_fp64():
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    token_weight = torch.tensor([1.0, -0.5, 2.0, 0.0, 0.3], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3, 3])
    for engine in ENGINES:
        for reduction in ("sum", "mean"):

            def op(h, w, b, tw, engine=engine, reduction=reduction):
                return linear_weighted_nll(
                    h,
                    w,
                    labels,
                    tw,
                    b,
                    engine=engine,
                    reduction=reduction,
                    softcap=2.0,
                    z_loss=0.1,
                    label_smoothing=0.1,
                )

            assert torch.autograd.gradcheck(op, (hidden, weight, bias, token_weight))


@pytest.mark.parametrize("engine", ENGINES)
def test_second_backward_and_upstream_scale(engine):
    hidden, weight, labels, _ = Case("").inputs()
    loss = linear_weighted_nll(hidden, weight, labels, None, engine=engine)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    for one, three, same in zip(first, tripled, again, strict=True):
        assert torch.equal(one, same)
        torch.testing.assert_close(3 * one, three)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["ignored", "weight 0"])
def test_nothing_counts(engine, how):
    hidden, weight, labels, _ = Case("").inputs()
    token_weight = torch.zeros(labels.shape) if how == "weight 0" else None
    labels = torch.full_like(labels, -100) if how == "ignored" else labels
    loss = linear_weighted_nll(hidden, weight, labels, token_weight, reduction="mean", engine=engine)
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad.count_nonzero() == 0
    assert weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_weight_zero_may_hold_nan(engine):
    hidden, weight, labels, _ = Case("", ignored=0.0).inputs()
    token_weight = torch.ones(labels.shape)
    token_weight[::3] = 0
    with torch.no_grad():
        hidden[::3] = torch.nan
    loss = linear_weighted_nll(hidden, weight, labels, token_weight, engine=engine)
    loss.backward()
    assert loss.isfinite()
    assert weight.grad.isfinite().all()


def test_mean_divides_by_labels_or_by_num_items():
    hidden, weight, labels, _ = Case("").inputs()
    total = linear_weighted_nll(hidden, weight, labels, None)
    count = (labels != -100).sum()
    torch.testing.assert_close(linear_weighted_nll(hidden, weight, labels, None, reduction="mean"), total / count)
    for num_items in (8, torch.tensor(8)):
        got = linear_weighted_nll(hidden, weight, labels, None, reduction="mean", num_items=num_items)
        torch.testing.assert_close(got, total / 8)


def test_fp16_gradients_survive_a_large_divisor():
    """p / num_items is below fp16's smallest number; the scaler's factor must be in before anything is rounded."""
    scale, num_items = 2.0**16, 2**17
    hidden, weight, labels, _ = Case("", dtype=torch.float16).inputs()
    grads = []
    for dtype in (torch.float16, torch.float64):
        h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        op = linear_weighted_nll if dtype == torch.float16 else linear_weighted_nll_ref
        (op(h, w, labels, None, reduction="mean", num_items=num_items) * scale).backward()
        grads.append([h.grad.double(), w.grad.double()])
    for got, expected in zip(*grads, strict=True):
        assert (got - expected).norm() <= 2**-10 * expected.norm()


def test_equals_cross_entropy():
    hidden, weight, labels, _ = Case("").inputs()
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, label_smoothing=0.1)
    got = linear_weighted_nll(hidden, weight, labels, None, reduction="mean", label_smoothing=0.1)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_in_the_same_pass(engine):
    hidden, weight, labels, _ = Case("").inputs()
    loss, logp, argmax = linear_weighted_nll(
        hidden, weight, labels, None, return_logp=True, return_argmax=True, engine=engine
    )
    expected = linear_logprob(hidden, weight, labels, return_argmax=True)
    torch.testing.assert_close(logp, expected[0].detach())
    assert torch.equal(argmax, expected[1])
    assert not logp.requires_grad
    torch.testing.assert_close(loss, -logp.sum())


def test_weights_of_several_targets_distil():
    """The K most likely tokens of a teacher with their probabilities: cross-entropy to the truncated teacher."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8), torch.randn(30, 8)
    top = torch.randn(6, 30).softmax(-1).topk(4)
    got = linear_weighted_nll(hidden, weight, top.indices, top.values)
    expected = linear_weighted_nll_ref(hidden, weight, top.indices, top.values)
    torch.testing.assert_close(got, expected.float())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_weights_of_another_dtype(engine, narrow, wide):
    hidden, weight, labels, _ = Case("", dtype=wide).inputs()
    token_weight = torch.full(labels.shape, 0.5, dtype=narrow, requires_grad=True)
    loss = linear_weighted_nll(hidden, weight, labels, token_weight, engine=engine)
    loss.backward()
    assert loss.dtype == wide
    assert token_weight.grad.dtype == narrow
    torch.testing.assert_close(loss, 0.5 * linear_weighted_nll(hidden, weight, labels, None), rtol=1e-6, atol=1e-6)
