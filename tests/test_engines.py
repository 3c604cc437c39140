"""What the engines promise beyond their numbers: storage behind a tile, labels that nobody checked, counts given."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.op_cases import Case
from tests.tolerance import assert_gradient, assert_result
from var_kernels import linear_logprob, linear_token_kl, linear_token_loss, linear_weighted_nll
from var_kernels.kernels import labels_torch
from var_kernels.kernels.rows import LogitTransform, RowCoefficients, aligned
from var_kernels.ops import checks
from var_kernels.ops.ava_literal import linear_prob_lse
from var_kernels.ops.backend import choose_backend, use_backend
from var_kernels.ops.engines import rounded, row_grad, zero_row_ends
from var_kernels.ops.head import Head, HeadOptions, Needs

N, V, D = 63, 507, 72
ALL = {"return_lse": True, "return_entropy": True, "return_argmax": True}


def test_row_ends_are_zero_for_16_bit_gemms(target):
    """A strided bf16 GEMM may read up to 32 columns beyond a row's end, and NaN times 0 is NaN."""
    target.require(torch.bfloat16)
    if target.device != "cpu":
        pytest.skip("cuBLAS reads nothing beyond a row")
    backend, _ = choose_backend(torch.device("cpu"), torch.float32)
    options = HeadOptions(LogitTransform(), 0.0, torch.float32, 1 << 20, backend)
    hidden, weight = torch.randn(N, D).bfloat16(), torch.randn(V, D).bfloat16()
    head = Head(hidden, weight, None, torch.zeros(N, 1, dtype=torch.int64), options, Needs())
    logits = torch.full((N, aligned(V)), torch.nan)[:, :V].normal_()
    coefficients = RowCoefficients(torch.ones(N), torch.zeros(N, 1))
    norms = torch.stack((logits.logsumexp(1), torch.zeros(N)))
    dlogits = rounded(head, row_grad(head, logits, slice(0, N), norms, coefficients, 0), None)
    assert dlogits.shape == (N, V)
    behind = min(dlogits.stride(0) - V, 5)  # a result without gaps between its rows has nothing to clear
    assert not dlogits.as_strided((N, behind), dlogits.stride(), dlogits.storage_offset() + V).any()
    torch.testing.assert_close(dlogits @ weight, dlogits.contiguous() @ weight)


def test_row_ends_leave_the_next_row_alone():
    values = torch.ones(3, 40, dtype=torch.bfloat16)
    zero_row_ends(values[:, :38])
    assert values[:, :38].all()
    assert not values[:, 38:].any()
    whole = torch.ones(2, 33, dtype=torch.bfloat16)
    zero_row_ends(whole)
    assert whole.all()


@pytest.mark.parametrize("wrong", [V, V + 1000, -1])
def test_unchecked_labels_beyond_the_vocabulary_give_nan(target, wrong, monkeypatch, small_tiles):
    """Accelerators do not read labels back to refuse them: the loss must show it."""
    monkeypatch.setattr(checks, "check_values", lambda *_: None)
    hidden, weight, labels, _ = Case("", tight=True, ignored=0.2).inputs(target.device)
    labels[5] = wrong
    with torch.no_grad():
        logp = linear_logprob(hidden, weight, labels, workspace_mb=0.05)
    assert logp[5].isnan()
    others = torch.arange(N, device=logp.device) != 5
    assert logp[others].isfinite().all()
    assert linear_weighted_nll(hidden, weight, labels, None, workspace_mb=0.05).isnan()


def inputs_with_padding(device):
    """Padding that holds NaN, as uninitialised rows of a padded batch may."""
    hidden, weight, labels, bias = Case("", bias=True, ignored=0.4).inputs(device)
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    return hidden, weight, labels, bias


def run(op, num_active, device):
    hidden, weight, labels, bias = inputs_with_padding(device)
    outputs = op(hidden, weight, labels, bias, num_active)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(t.sum() * (i + 1.5) for i, t in enumerate(outputs) if t.requires_grad).backward()
    return [t.detach() for t in outputs], [t.grad for t in (hidden, weight, bias)]


def logprob(h, w, y, b, count):
    return linear_logprob(h, w, y, b, num_active=count, **ALL)


def weighted_nll(engine):
    def op(h, w, y, b, count):
        weight = torch.linspace(-1, 1, N, device=h.device)
        asked = {"return_logp": True, "return_argmax": True, "engine": engine}
        return linear_weighted_nll(h, w, y, weight, b, reduction="mean", num_active=count, z_loss=0.1, **asked)

    return op


def token_loss(engine):
    def op(h, w, y, b, count):
        def f(logp, entropy, a):
            return -a * logp.exp() + 1.0 - 0.1 * entropy

        inputs = (torch.linspace(-1, 1, N, device=h.device),)
        return linear_token_loss(h, w, y, f, inputs, b, entropy=True, return_logp=True, num_active=count, engine=engine)

    return op


def token_kl(reduction):
    def op(h, w, y, b, count):
        options = {"token_weight": torch.linspace(-1, 1, N, device=h.device), "reduction": reduction}
        return linear_token_kl(h, w, -h.detach(), w.detach().roll(1, 0), y, b, num_active=count, **options)

    return op


def prob_lse(h, w, y, b, count):
    return linear_prob_lse(h, w, y, b, alpha=3.0, num_active=count)


OPS = {
    "logprob": logprob,
    "one pass": weighted_nll("one_pass"),
    "two passes": weighted_nll("two_pass"),
    "token loss, one pass": token_loss("one_pass"),
    "token loss, two passes": token_loss("two_pass"),
    "token KL": token_kl("none"),
    "token KL, summed": token_kl("sum"),
    "prob_lse": prob_lse,
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_given_count_changes_nothing(op, target, small_tiles):
    """Every output and gradient is that of the call that counts by itself, whether the count is exact, a little or far
    too high; rows beyond the kept ones are masked.
    """
    _, _, labels, _ = inputs_with_padding(target.device)
    expected, expected_gradients = run(op, None, target.device)
    for surplus in (0, 5, 1000):
        got, gradients = run(op, int((labels != -100).sum()) + surplus, target.device)
        for g, e in zip(got, expected, strict=True):
            assert g.dtype == e.dtype
            if g.is_floating_point():
                assert_result(g, e, f"output, {surplus} too many")
            else:
                assert torch.equal(g, e)
        for g, e in zip(gradients, expected_gradients, strict=True):
            assert_gradient(g, e, e, f"{surplus} too many")
        assert not gradients[0][labels == -100].any()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_count_that_is_too_small_is_refused(op):
    hidden, weight, labels, bias = inputs_with_padding("cpu")
    count = int((labels != -100).sum())
    with pytest.raises(ValueError, match=f"num_active must be at least the number of rows that count, {count}, got 3"):
        op(hidden, weight, labels, bias, 3)


@pytest.mark.parametrize(("count", "error"), [(-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_no_count_at_all(count, error):
    with pytest.raises(error, match="num_active"):
        logprob(*inputs_with_padding("cpu"), count)


def test_rows_of_weight_0_need_not_be_counted():
    hidden, weight, labels, bias = inputs_with_padding("cpu")
    token_weight = torch.zeros(N)
    token_weight[:7] = 1.0
    expected = linear_weighted_nll(hidden, weight, labels, token_weight, bias)
    kept = int((labels[:7] != -100).sum())
    torch.testing.assert_close(
        linear_weighted_nll(hidden, weight, labels, token_weight, bias, num_active=kept), expected
    )


def test_masked_rows_share_no_label(monkeypatch):
    """Where rows are masked and not left out, a GPU's program that adds the rows of a label to dW would add all masked
    ones, one after the other, where they had one label.
    """
    longest, add_label_rows = [], labels_torch.add_label_rows

    def counting(total_CD, segments, *others):
        longest.append(int(segments[0].bincount().max()))
        add_label_rows(total_CD, segments, *others)

    monkeypatch.setattr(labels_torch, "add_label_rows", counting)
    hidden, weight, _, _ = inputs_with_padding("cpu")
    rows = hidden.flatten(0, -2)
    labels = torch.full(rows.shape[:1], -100)
    labels[:3] = torch.arange(20, 23)
    linear_weighted_nll(rows, weight, labels, None, num_active=len(labels), engine="one_pass")
    assert len(labels) > 20
    assert longest == [2]  # an id of its own, and once that of a row that counts


def test_a_count_under_the_compiler():
    _hidden, _weight, labels, _bias = inputs_with_padding("cpu")
    count = int((labels != -100).sum())
    expected = run(OPS["one pass"], None, "cpu")
    torch._dynamo.reset()
    got = run(torch.compile(OPS["one pass"], fullgraph=True, backend="aot_eager"), count, "cpu")
    for ours, theirs in zip(got, expected, strict=True):
        for g, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(g, e)


def test_a_forced_backend_stays_in_its_thread(monkeypatch):
    monkeypatch.delenv("VAR_KERNELS_BACKEND", raising=False)
    on_cpu = torch.device("cpu"), torch.float32
    with ThreadPoolExecutor(1) as other, use_backend("torch"):
        assert choose_backend(*on_cpu) == ("torch", "forced")
        assert other.submit(choose_backend, *on_cpu).result()[1] != "forced"
    assert choose_backend(*on_cpu)[1] != "forced"
