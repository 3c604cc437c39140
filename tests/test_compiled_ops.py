"""The registered ops under torch's machinery: opcheck, kept logits, checkpointing, partitioners, torch.func."""

import functools

import pytest
import torch
from functorch.compile import default_partition, make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.op_cases import Case
from tests.test_compiled import OPS, logprob, prob_lse, token_kl, weighted_kl, weighted_nll
from tests.tolerance import assert_gradient
from var_kernels import linear_logprob
from var_kernels.kernels import gemm_torch
from var_kernels.measure import peak_extra_bytes
from var_kernels.ops import plan
from var_kernels.ops.backend import use_backend
from var_kernels.reference import linear_logprob_ref

compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Checking(torch.fx.Interpreter):
    """Runs a graph, and torch's own checks of each of our ops on the values that it gets there."""

    def __init__(self, graph, checked, **options):
        super().__init__(graph)
        self.checked, self.options = checked, options

    def run_node(self, node):
        if node.op == "call_function" and str(node.target).startswith("var_kernels"):
            arguments, _ = self.fetch_args_kwargs_from_env(node)
            torch.library.opcheck(node.target, arguments, **self.options)
            self.checked.add(str(node.target).split(".")[1])
        return super().run_node(node)


@pytest.mark.parametrize("op", [logprob, weighted_nll, token_kl, weighted_kl, prob_lse], ids=lambda op: op.__name__)
@pytest.mark.parametrize("kind", ["everything", "frozen"])
def test_opcheck(op, kind, monkeypatch):
    """Schema, fake tensors, gradients; of the backward's op too, whose arguments are those of a real backward."""
    monkeypatch.setattr(plan, "_MIN_CACHED_DEPTH", 1)
    frozen = kind == "frozen"
    case = Case("", shape=(7, 5, 507), bias=not frozen, frozen=("weight",) if frozen else ())
    hidden, weight, labels, bias = case.inputs()
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    options = {}
    if not frozen:
        options["low_rank"] = tuple(f.requires_grad_() for f in case.low_rank())
        leaves += options["low_rank"]
    checked = set()

    def of_dynamo(graph, _):
        return Checking(graph, checked).run

    def of_aot(graph, _):  # no gradients there
        return make_boxed_func(Checking(graph, checked, test_utils=("test_schema", "test_faketensor")).run)

    for backend in (of_dynamo, aot_autograd(fw_compiler=of_aot, bw_compiler=of_aot)):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *args: op(case, *args, **options), fullgraph=True, backend=backend)
        out = compiled(hidden, weight, labels, bias)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out.sum(), leaves)
    scales = op in (weighted_nll, weighted_kl)  # gradients that the forward made
    assert checked == {op.__name__, *([] if scales else [f"{op.__name__}_backward"])}


N, D, V = 200, 256, 4000


@pytest.mark.parametrize(("workspace_mb", "kept"), [(3, 0), (4, 1280), (64, V)])
def test_the_backward_computes_what_the_budget_did_not_hold(workspace_mb, kept, monkeypatch):
    """And again where it runs again, with the same bits: what is kept is not overwritten."""
    computed = []
    original = gemm_torch.logits_into
    monkeypatch.setattr(gemm_torch, "logits_into", lambda tile, *a: (computed.append(tile.numel()), original(tile, *a)))
    inputs = hidden, weight, labels, _ = Case("", shape=(N, D, V), ignored=0).inputs()
    truth = [t.detach().double().requires_grad_() for t in inputs[:2]]
    expected = torch.autograd.grad(linear_logprob_ref(*truth, labels).sum(), truth)
    own = [t.detach().requires_grad_() for t in inputs[:2]]
    own_gradients = torch.autograd.grad(linear_logprob_ref(*own, labels).sum(), own)
    with use_backend("torch"):  # the others' tiles differ
        logp = compiled(linear_logprob)(hidden, weight, labels, workspace_mb=workspace_mb)
        assert sum(computed) == N * V
        found = []
        for _ in range(2):
            computed.clear()
            found.append(torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True))
            assert sum(computed) == N * (V - kept)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for triple in zip(found[0], expected, own_gradients, strict=True):
        assert_gradient(*triple)


@pytest.mark.parametrize("kept", [False, True])
def test_peak_memory_is_bounded(kept):
    """As in eager mode (tests/test_memory.py), forward to backward: what is kept and the tiles are the budget."""
    n, d, v, budget = 1024, 256, 16_000, 33
    hidden, weight, labels, _ = Case("", shape=(n, d, v), ignored=0).inputs()
    call = compiled(functools.partial(linear_logprob, workspace_mb=budget if kept else 9))

    def step():
        return torch.autograd.grad(call(hidden, weight, labels).sum(), (hidden, weight))

    step()  # compiles
    bound = ((budget if kept else 9) << 20) + (2 * n * d + v * d) * 4 + 40 * 8 * n
    assert peak_extra_bytes(step) <= bound
    assert bound < n * v * 4


# ---- checkpointing and partitioners ----------------------------------------------------------------------------------


def scalar(op, hidden, weight, labels):
    out = op(Case(""), hidden, weight, labels, None)
    return (out[0] if isinstance(out, tuple) else out).sum()


def every(hidden, weight, labels):
    """All ops in one graph."""
    return sum(scalar(op, hidden, weight, labels) for op in OPS)


def gradients(fn):
    hidden, weight, labels, _ = Case("").inputs()
    return torch.autograd.grad(fn(hidden, weight, labels), (hidden, weight))


POLICIES = {
    "save nothing": lambda ctx, op, *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE,
    "save everything": lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE,
    "save our ops": lambda ctx, op, *args, **kwargs: (
        CheckpointPolicy.MUST_SAVE if "var_kernels" in str(op) else CheckpointPolicy.MUST_RECOMPUTE
    ),
}


def after_tanh(hidden, weight, labels):
    return every(torch.tanh(hidden), weight, labels)


@pytest.fixture(scope="module")
def without_checkpoint():
    torch._dynamo.reset()
    return gradients(compiled(after_tanh))


@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_checkpointed_inside_the_graph(policy, without_checkpoint):
    options = {}
    if policy is not None:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, POLICIES[policy])

    def step(hidden, weight, labels):
        return checkpoint(after_tanh, hidden, weight, labels, use_reentrant=False, **options)

    for got, expected in zip(gradients(compiled(step)), without_checkpoint, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_compiled_call_checkpointed(reentrant):
    hidden, weight, labels, _ = Case("").inputs()
    call = compiled(every)
    expected = gradients(call)
    checkpoint(call, hidden, weight, labels, use_reentrant=reentrant).backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


def test_a_partitioner_that_saves_all_it_can():
    """min-cut is the default; the other saves every forward value for the backward, what is kept among them."""
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), partition_fn=default_partition)
    case = Case("", shape=(N, D, V))
    hidden, weight, labels, _ = case.inputs()

    def step(hidden, weight):
        return linear_logprob(torch.tanh(hidden), weight, labels).exp().sum()

    expected = torch.autograd.grad(compiled(step)(hidden, weight), (hidden, weight))
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(step, backend=backend, fullgraph=True)(hidden, weight), (hidden, weight))
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


# ---- torch.func ------------------------------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda fn, hidden: torch.func.grad(fn)(hidden),
    "jvp": lambda fn, hidden: torch.func.jvp(fn, (hidden,), (hidden,)),  # would give a tangent of 0
    "vmap": lambda fn, hidden: torch.func.vmap(fn)(hidden.unsqueeze(0)),
    "jacrev": lambda fn, hidden: torch.func.jacrev(fn)(hidden),
}


@pytest.mark.parametrize("op", [logprob, prob_lse], ids=lambda op: op.__name__)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("fullgraph", [True, False])
def test_torch_func_is_refused_by_name(op, transform, fullgraph):
    hidden, weight, labels, _ = Case("", ignored=0).inputs()

    def step(hidden):
        return transform(lambda h: scalar(op, h, weight.detach(), labels), hidden)

    refused = torch._dynamo.exc.Unsupported if fullgraph else TypeError
    with pytest.raises(refused, match=r"no tensor of a torch\.func transform"):
        torch.compile(step, fullgraph=fullgraph, backend="aot_eager")(hidden.detach())
