"""torch.compile(fullgraph=True) of every op, with every option, equals eager: to the bit where the same tiles are
computed, which takes that every row counts and that no logits are kept; see ``assert_agrees`` for the others.
"""

import pytest
import torch
import torch._dynamo

from tests.op_cases import ALL_OUTPUTS, BF16, Case
from tests.tolerance import assert_gradient, assert_result, rms
from var_kernels import linear_logprob, linear_token_kl, linear_token_loss, linear_weighted_nll
from var_kernels.ops.ava_literal import linear_prob_lse
from var_kernels.reference import linear_weighted_nll_ref

CASES = [
    Case("plain"),
    Case("bias, every output", bias=True, outputs=ALL_OUTPUTS),
    Case("softcap, scale, temperature", options={"softcap": 5.0, "logit_scale": 0.5, "temperature": 1.3}),
    Case("frozen head", frozen=("weight",)),
    Case("nothing learns", frozen=("hidden", "weight")),
    Case("ragged chunks", tight=True, bias=True),
    Case("bf16", dtype=BF16),
    Case("fp16", dtype=torch.float16),
    Case("fp64", dtype=torch.float64, bias=True),
    Case("bf16, bias of fp32", dtype=BF16, bias=True, bias_dtype=torch.float32),
]
TARGETS = [
    Case("label smoothing", options={"label_smoothing": 0.1}),
    Case("several targets", targets=3),
    Case("frozen head, lse", frozen=("weight",), outputs=("lse",)),
]
by_id = {"ids": lambda case: case.id}


def logprob(case, hidden, weight, labels, bias, **options):
    return linear_logprob(hidden, weight, labels, bias, **{f"return_{name}": True for name in case.outputs}, **options)


def weighted_nll(case, hidden, weight, labels, bias, **options):
    token_weight = (labels % 7 - 2.5) / 3
    asked = {"reduction": "mean", "z_loss": 0.01, "return_logp": True, "return_argmax": True}
    return linear_weighted_nll(hidden, weight, labels, token_weight, bias, **asked, **options)


def token_loss(case, hidden, weight, labels, bias, **options):
    return linear_token_loss(hidden, weight, labels, lambda logp, a: -a * logp.exp(), (labels.abs(),), bias, **options)


generator = torch.Generator().manual_seed(1)
REFERENCE = [torch.randn(n, 24, generator=generator) for n in (63, 507)]  # another model's states, and its head


def token_kl(case, hidden, weight, labels, bias, **options):
    ref_hidden, ref_weight = (t.to(hidden.dtype) for t in REFERENCE)
    ref_hidden = ref_hidden[: hidden.shape[0]]
    return linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, bias, ref_temperature=1.5, **options)


def weighted_kl(case, hidden, weight, labels, bias, **options):
    token_weight = (labels % 7 - 2.5) / 3
    options = {"direction": "forward", "reduction": "sum", "token_weight": token_weight, **options}
    return token_kl(case, hidden, weight, labels, bias, **options)


def prob_lse(case, hidden, weight, labels, bias, **options):
    return linear_prob_lse(hidden, weight, labels, bias, alpha=3.0, **options)


OPS = [logprob, weighted_nll, token_loss, token_kl, weighted_kl, prob_lse]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


def budget(op, case):
    """Of ragged chunks: the KL and prob_lse work on several tiles at once."""
    return {name: value if op in OPS[:3] else 4 * value for name, value in case.workspace().items()}


def outputs_and_gradients(fn, case, low_rank=None):
    hidden, weight, labels, bias = case.inputs()
    with torch.no_grad():  # padding that a mask must keep out
        padded = labels == -100 if labels.dim() == 1 else (labels == -100).all(-1)
        hidden[padded] = torch.nan
    factors = [] if low_rank is None else [f.requires_grad_() for f in case.low_rank(low_rank)]
    outputs = fn(hidden, weight, labels, bias, *factors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(
        (t.double() * torch.linspace(0.5, i + 2, max(t.numel(), 1)).view(t.shape)).sum()
        for i, t in enumerate(outputs)
        if t.requires_grad
    )
    leaves = [t for t in (hidden, weight, bias, *factors) if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(total, leaves) if leaves else []
    return [t.detach() for t in outputs], gradients


def assert_agrees(got, eager, operand):
    """A gradient of the same products summed in another order: the compiler masks rows that do not count, where eager
    leaves them out, and copies the logits that are kept slice by slice, where eager overwrites all of them at once.

    Sums of operands in 16 bit are rounded at the end, some to the neighbour: one step of the largest element.
    ``operand``: their dtype in the GEMMs, under autocast not the gradient's.
    """
    difference, largest = (got.double() - eager.double()).abs(), eager.abs().max().item()
    if operand.itemsize == 2:
        assert difference.max() <= 2.0**-7 * largest
        assert rms(difference) <= 2.0**-8 * rms(eager)
    else:
        assert difference.max() <= (2.0**-40 if operand == torch.float64 else 2.0**-17) * largest


def assert_compiles(fn, case, low_rank=None, backend="aot_eager", operand=None, **options):
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=backend, **options)
    (outputs, gradients), (expected, wanted) = (outputs_and_gradients(f, case, low_rank) for f in (compiled, fn))
    for got, eager in zip(outputs, expected, strict=True):
        assert got.dtype == eager.dtype
        if case.ignored == 0 or not got.is_floating_point():
            assert torch.equal(got, eager)
        else:  # fp32 sums of exact products, whatever the operands are
            assert_result(got, eager)
    for got, eager in zip(gradients, wanted, strict=True):
        assert got.dtype == eager.dtype
        if case.ignored == 0:
            assert torch.equal(got, eager)
        else:
            assert_agrees(got, eager, operand or case.dtype)


@every_op
@pytest.mark.parametrize("case", CASES, **by_id)
def test_equals_eager(op, case, small_tiles):
    assert_compiles(lambda *inputs: op(case, *inputs, **case.options, **budget(op, case)), case)


@pytest.mark.parametrize("op", [logprob, weighted_nll], ids=lambda op: op.__name__)
@pytest.mark.parametrize("case", TARGETS, **by_id)
def test_equals_eager_where_labels_have_options(op, case):
    assert_compiles(lambda *inputs: op(case, *inputs, **case.options), case)


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("op", [weighted_nll, token_loss, weighted_kl], ids=lambda op: op.__name__)
def test_a_forced_engine(op, engine):
    case = Case("", bias=True)
    assert_compiles(lambda *inputs: op(case, *inputs, engine=engine), case)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_same_bits_where_every_row_counts(op, dtype):
    """Token losses take two passes under the compiler, and say so."""
    case = Case("", dtype=dtype, bias=True, ignored=0.0)
    options = {"engine": "two_pass"} if op is token_loss else {}
    assert_compiles(lambda *inputs: op(case, *inputs, **options), case)


@pytest.mark.parametrize(
    ("op", "factors"),
    [*((op, torch.float32) for op in OPS if op is not token_loss), (logprob, BF16)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_low_rank(op, factors):
    case = Case("", dtype=BF16 if factors == BF16 else torch.float32)

    def fn(hidden, weight, labels, bias, left, right):
        return op(case, hidden, weight, labels, bias, low_rank=(left, right))

    assert_compiles(fn, case, factors)


@pytest.mark.parametrize("op", [weighted_nll, token_kl, prob_lse], ids=lambda op: op.__name__)
def test_autocast(op):
    case = Case("")

    def fn(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return op(case, *inputs)

    assert_compiles(fn, case, operand=BF16)


@pytest.mark.skipif(" " in torch.__file__, reason="Inductor's link command ends at a space in torch's path")
def test_inductor():
    """The default backend, with a layer below that learns too."""
    case = Case("", bias=True)
    torch.manual_seed(0)
    body = torch.nn.Linear(72, 72)

    def fn(hidden, *others):
        hidden = torch.tanh(body(hidden.nan_to_num()))
        return (
            *weighted_nll(case, hidden, *others),
            *(op(case, hidden, *others) for op in (logprob, token_kl, prob_lse)),
        )

    assert_compiles(fn, case, backend="inductor")


def test_fp16_gradients_do_not_underflow():
    """Made before the GradScaler's factor is known, p_v / num_items would be 0."""
    hidden, weight, labels, _ = Case("", dtype=torch.float16, logits=0.1, ignored=0.0).inputs()
    truth = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    scale = 2.0**16

    def loss(hidden, weight):
        return linear_weighted_nll(hidden, weight, labels, None, reduction="mean", num_items=1e5)

    torch._dynamo.reset()
    got = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight) * scale, (hidden, weight)
    )
    expected = linear_weighted_nll_ref(*truth, labels, None, reduction="mean", num_items=1e5) * scale
    own = [t.detach().requires_grad_() for t in (hidden, weight)]
    plain = linear_weighted_nll_ref(*own, labels, None, reduction="mean", num_items=1e5, dtype=torch.float32) * scale
    triples = zip(got, torch.autograd.grad(expected, truth), torch.autograd.grad(plain, own), strict=True)
    for triple in triples:
        assert_gradient(*triple)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_that_a_mask_selects():
    """Their number is known when the graph runs."""
    case = Case("", bias=True)

    def fn(hidden, weight, labels, bias):
        rows = (labels != -100).nonzero().squeeze(1)
        selected = hidden[rows], weight, labels[rows], bias
        kl = linear_token_kl(selected[0], weight, -selected[0].detach(), weight.detach(), None, bias)
        return (
            logprob(case, *selected).sum(),
            weighted_nll(case, *selected)[0],
            prob_lse(case, *selected).sum(),
            kl.sum(),
        )

    assert_compiles(fn, case)


def test_dynamic_shapes_and_options():
    """One graph for every number of rows above D, with floats that may change between calls; up to D the default budget
    of the KL is another (``plan.with_default_budget``).
    """
    torch._dynamo.reset()
    weight = torch.randn(50, 16, requires_grad=True)
    ref_weight = torch.randn(50, 8)
    graphs, made = [], []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    def fn(hidden, labels, scale, softcap):
        options = {"logit_scale": scale, "softcap": softcap, "temperature": 1.3}
        loss = linear_weighted_nll(hidden, weight, labels, None, reduction="mean", label_smoothing=0.1, **options)
        loss = loss + linear_logprob(hidden, weight, labels, return_entropy=True, **options)[1].sum()
        kl = linear_token_kl(hidden, weight, hidden.detach()[:, :8], ref_weight, labels, ref_softcap=softcap, **options)
        return loss + kl.sum() + linear_prob_lse(hidden, weight, labels, alpha=scale, **options).sum()

    compiled_fn = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    for n, scale in ((22, 0.5), (31, 0.5), (17, 0.25), (7, 0.25)):
        hidden, labels = torch.randn(n, 16, requires_grad=True), torch.randint(50, (n,))
        got, expected = (
            torch.autograd.grad(f(hidden, labels, scale, 4.0), (hidden, weight)) for f in (compiled_fn, fn)
        )
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)
        made.append(len(graphs))
    # A number that changes may cost one more graph, a number of rows none but where D is crossed.
    assert made[2] <= 2
    assert made[3] <= 3
