"""Random shapes, budgets and strides: nothing but the definition is assumed."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tolerance import assert_result
from var_kernels.ops import linear_logprob, linear_weighted_nll
from var_kernels.reference import linear_logprob_ref, linear_weighted_nll_ref

SETTINGS = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(2, 130))


def leaves(n, d, v, seed, stride):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d * stride, generator=generator)[:, ::stride]
    weight = torch.randn(v * stride, d, generator=generator)[::stride]
    labels = torch.randint(-1, v, (n,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels.masked_fill(labels == -1, -100)


@SETTINGS
@given(sizes, st.integers(0, 1000), st.sampled_from([1, 2]), st.floats(0.02, 0.3))
def test_logprob_of_any_shape(small_tiles, shape, seed, stride, workspace_mb):
    hidden, weight, labels = leaves(*shape, seed, stride)
    logp, entropy = linear_logprob(hidden, weight, labels, return_entropy=True, workspace_mb=workspace_mb)
    truth = linear_logprob_ref(hidden, weight, labels, return_entropy=True)
    assert_result(logp, truth[0])
    assert_result(entropy, truth[1])
    got = torch.autograd.grad(logp.sum() - entropy.sum(), (hidden, weight))
    expected = torch.autograd.grad(truth[0].sum() - truth[1].sum(), (hidden, weight))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@SETTINGS
@given(sizes, st.integers(0, 1000), st.sampled_from(["sum", "mean"]), st.sampled_from(["one_pass", "two_pass"]))
def test_weighted_nll_of_any_shape(small_tiles, shape, seed, reduction, engine):
    hidden, weight, labels = leaves(*shape, seed, 1)
    token_weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) - 0.3
    loss = linear_weighted_nll(
        hidden, weight, labels, token_weight, reduction=reduction, engine=engine, workspace_mb=0.1
    )
    truth = linear_weighted_nll_ref(hidden, weight, labels, token_weight, reduction=reduction)
    torch.testing.assert_close(loss, truth.float(), rtol=1e-5, atol=1e-5)
    got, expected = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@SETTINGS
@given(sizes, st.integers(0, 1000))
def test_logp_of_all_tokens_sums_to_one_and_gives_the_entropy(small_tiles, shape, seed):
    """The K target ids of one row may be the whole vocabulary."""
    n, d, v = shape
    hidden, weight, _ = leaves(n, d, v, seed, 1)
    every = torch.arange(v).expand(n, v)
    logp, entropy = linear_logprob(hidden, weight, every, return_entropy=True)
    torch.testing.assert_close(logp.exp().sum(1), torch.ones(n), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-(logp.exp() * logp).sum(1), entropy, rtol=1e-4, atol=1e-5)


@SETTINGS
@given(sizes, st.integers(0, 1000))
def test_rows_of_several_temperatures_take_a_call_for_each(small_tiles, shape, seed):
    """As the refusal of a temperature a row says, under a softcap and a bias too."""
    n, d, v = shape
    hidden, weight, labels = leaves(n, d, v, seed, 1)
    bias, temperatures = torch.randn(v), (0.6, 1.0, 1.7)
    labels, of_row = labels.clamp(min=0), torch.arange(n) % 3
    rows = [(t, labels.where(of_row == i, -100)) for i, t in enumerate(temperatures)]
    logp = sum(linear_logprob(hidden, weight, y, bias, softcap=3.0, temperature=t) for t, y in rows)
    z = 3.0 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) / 3.0)
    z = z / torch.tensor(temperatures, dtype=torch.float64)[of_row].unsqueeze(1)
    assert_result(logp, z.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1))
