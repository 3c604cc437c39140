"""torch.compile(fullgraph=True) of calls with every option equals eager; the registered ops pass opcheck."""

import pytest
import torch

from tests.op_cases import ALL_OUTPUTS, Case
from var_kernels import linear_logprob, linear_token_loss, linear_weighted_nll
from var_kernels.ops import compiled

CASES = [
    Case("plain"),
    Case("bias, every output", bias=True, outputs=ALL_OUTPUTS),
    Case("softcap, scale, temperature", options={"softcap": 5.0, "logit_scale": 0.5, "temperature": 1.3}),
    Case("label smoothing", options={"label_smoothing": 0.1}),
    Case("several targets", targets=3),
    Case("frozen head", frozen=("weight",)),
    Case("frozen hidden", frozen=("hidden",)),
    Case("bf16", dtype=torch.bfloat16),
    Case("fp64", dtype=torch.float64, bias=True),
]


def gradients(fn, case):
    hidden, weight, labels, bias = case.inputs()
    with torch.no_grad():  # padding that a mask must keep out
        padded = labels == -100 if labels.dim() == 1 else (labels == -100).all(-1)
        hidden[padded] = torch.nan
    outputs = fn(hidden, weight, labels, bias)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((i + 1) * t.float().sum() for i, t in enumerate(outputs) if t.requires_grad)
    total.backward()
    leaves = (hidden, weight, bias)
    return [t.detach() for t in outputs], [t.grad for t in leaves if t is not None and t.requires_grad]


def assert_compiles(fn, case):
    torch._dynamo.reset()
    got = gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), case)
    expected = gradients(fn, case)
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if case.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for ours, theirs in zip(got, expected, strict=True):
        for g, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(g, e, **tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_logprob(case):
    asked = {f"return_{name}": True for name in case.outputs}
    assert_compiles(lambda h, w, y, b: linear_logprob(h, w, y, b, **asked, **case.options), case)


@pytest.mark.parametrize("engine", ["auto", "two_pass"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_weighted_nll(case, engine):
    def fn(hidden, weight, labels, bias):
        token_weight = torch.linspace(-1, 1, labels.numel()).view(labels.shape)
        return linear_weighted_nll(
            hidden,
            weight,
            labels,
            token_weight,
            bias,
            reduction="mean",
            z_loss=0.01,
            return_logp=True,
            return_argmax=True,
            engine=engine,
            **case.options,
        )

    assert_compiles(fn, case)


def test_token_loss():
    def fn(hidden, weight, labels, bias):
        return linear_token_loss(
            hidden, weight, labels, lambda logp, a: -a * logp.exp(), (torch.ones(labels.shape),), bias
        )

    assert_compiles(fn, Case("", bias=True))


def test_dynamic_shapes_and_options():
    """One graph for every number of rows, with floats that may change between calls."""
    torch._dynamo.reset()
    weight = torch.randn(50, 16, requires_grad=True)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    def fn(hidden, labels, scale, softcap):
        options = {"logit_scale": scale, "softcap": softcap, "temperature": 1.3}
        loss = linear_weighted_nll(hidden, weight, labels, None, reduction="mean", label_smoothing=0.1, **options)
        return loss + linear_logprob(hidden, weight, labels, return_entropy=True, **options)[1].sum()

    compiled_fn = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    for n, scale in ((12, 0.5), (31, 0.5), (7, 0.25)):
        hidden, labels = torch.randn(n, 16, requires_grad=True), torch.randint(50, (n,))
        got, expected = (
            torch.autograd.grad(f(hidden, labels, scale, 4.0), (hidden, weight)) for f in (compiled_fn, fn)
        )
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)
    assert len(graphs) <= 2  # a number that changes may cost one more graph, a number of rows none


def test_a_training_step_with_inductor():
    """The default backend, with a layer below that learns too."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    body = torch.nn.Linear(16, 16)
    weight = torch.randn(50, 16, requires_grad=True)
    hidden, labels = torch.randn(12, 16), torch.randint(50, (12,))

    def step(hidden, weight):
        return linear_weighted_nll(torch.tanh(body(hidden)), weight, labels, None)

    expected = torch.autograd.grad(step(hidden, weight), (weight, *body.parameters()))
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(hidden, weight), (weight, *body.parameters()))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_low_rank(factors):
    """Two passes and one, with gradients of both factors."""
    torch._dynamo.reset()
    case = Case("", dtype=torch.bfloat16 if factors == torch.bfloat16 else torch.float32)
    hidden, weight, labels, _ = case.inputs()
    leaves = [hidden, weight, *(f.requires_grad_() for f in case.low_rank(factors))]

    def step(hidden, weight, left, right):
        low_rank = (left, right)
        logp = linear_logprob(hidden, weight, labels, low_rank=low_rank)
        return logp.sum() + linear_weighted_nll(hidden, weight, labels, None, reduction="mean", low_rank=low_rank)

    expected = torch.autograd.grad(step(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if factors == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-5}
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        torch.testing.assert_close(g, e, **tolerance)


def samples(bias, low_rank):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    bias = torch.randn(11, requires_grad=True) if bias else None
    labels = torch.randint(0, 11, (7, 1))
    factors = [torch.randn(n, 2, requires_grad=True) if low_rank else None for n in (7, 11)]
    return hidden, weight, bias, *factors, labels, [1.0, 3.0, 1.2, 0.1], "fp32", -1


@pytest.mark.parametrize(("bias", "low_rank"), [(False, False), (True, False), (False, True)])
def test_opcheck(bias, low_rank):
    *tensors, labels, scales, precision, budget = samples(bias, low_rank)
    options = (scales, precision, budget)
    torch.library.opcheck(compiled.logprob, (*tensors, labels, *options, True, True))
    token_weight = torch.rand(7, 1, requires_grad=True)
    kept = torch.ones(7, 1, dtype=torch.bool)
    needs = [True, True, bias, low_rank, low_rank]
    arguments = (
        *tensors,
        token_weight,
        labels,
        kept,
        scales,
        0.1,
        precision,
        budget,
        "auto",
        needs,
        True,
    )
    torch.library.opcheck(compiled.weighted_nll, arguments)
    lse = torch.randn(7)
    saved = [t if t is None else t.detach() for t in tensors]
    arguments = (torch.randn(7, 1), lse, lse, *saved, labels, lse, lse, scales, precision, budget, needs)
    torch.library.opcheck(compiled.logprob_backward, arguments)
