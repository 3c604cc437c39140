"""What torch's machinery does to an op: second order, torch.func, checkpointing, threads, tensors without values."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.op_cases import Case
from var_kernels import linear_logprob, linear_token_kl, linear_token_loss, linear_weighted_nll
from var_kernels.measure import peak_extra_bytes
from var_kernels.ops import backend
from var_kernels.ops.ava_literal import linear_prob_lse

OPS = {
    "logprob": lambda h, w, y: linear_logprob(h, w, y).sum(),
    "weighted_nll": lambda h, w, y: linear_weighted_nll(h, w, y, None),
    "token_loss": lambda h, w, y: linear_token_loss(h, w, y, lambda logp: -logp.exp() * logp),
    "token_kl": lambda h, w, y: linear_token_kl(h, w, -h.detach(), w.detach(), y).sum(),
    "token_kl, one pass": lambda h, w, y: linear_token_kl(h, w, -h.detach(), w.detach(), y, reduction="sum"),
    "prob_lse": lambda h, w, y: linear_prob_lse(h, w, y, alpha=3.0).sum(),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def inputs():
    hidden, weight, labels, _ = Case("").inputs()
    return hidden, weight, labels


@every_op
def test_a_second_derivative_is_refused(op):
    """The upstream gradient of a sum is a constant: ``once_differentiable`` would let a penalty of 0 pass."""
    hidden, weight, labels = inputs()
    loss = op(hidden, weight, labels)
    plain = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    gradients = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    assert all(torch.equal(g, p) for g, p in zip(gradients, plain, strict=True))
    for g in gradients:
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*full logits"):
            g.square().sum().backward()


FINISHED = ("weighted_nll", "token_loss", "token_kl, one pass")


@pytest.mark.parametrize("name", FINISHED)
def test_finished_gradients_are_scaled_where_they_lie(name, target):
    """But not where another backward may ask for them: what an earlier one gave stays as it is."""
    hidden, weight, labels, _ = Case("").inputs(target.device)
    leaves, factors = (hidden, weight), (1.0, 3.0, 1.0, -2.0)
    loss = OPS[name](hidden, weight, labels)
    truth = torch.autograd.grad(OPS[name](hidden, weight, labels), leaves)
    found = [
        torch.autograd.grad(loss, leaves, torch.tensor(factor, device=target.device), retain_graph=i + 1 < len(factors))
        for i, factor in enumerate(factors)
    ]
    for factor, gradients in zip(factors, found, strict=True):
        for g, t in zip(gradients, truth, strict=True):
            torch.testing.assert_close(g, factor * t)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("name", FINISHED)
def test_a_backward_makes_no_copy_of_the_gradients(name, target):
    hidden, weight, labels, _ = Case("", shape=(64, 40, 3000)).inputs(target.device)
    loss = OPS[name](hidden, weight, labels)
    factor = torch.tensor(0.5, device=target.device)
    peak = peak_extra_bytes(lambda: torch.autograd.backward([loss], [factor]), target.device)
    assert weight.grad is not None
    assert peak < weight.nbytes / 4


@every_op
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_is_refused_too(op, frozen):
    hidden, weight, labels = inputs()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    learns = weight if frozen == "hidden" else hidden
    (gradient,) = torch.autograd.grad(op(hidden, weight, labels), learns, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()


@every_op
def test_torch_func_is_refused_by_name(op):
    hidden, weight, labels = (t.detach() for t in inputs())
    with pytest.raises(TypeError, match=r"no tensor of a torch\.func transform"):
        torch.func.grad(lambda h: op(h, weight, labels))(hidden)
    with pytest.raises(TypeError, match=r"no tensor of a torch\.func transform"):
        torch.func.vmap(lambda h: op(h, weight, labels))(hidden.unsqueeze(0))


@every_op
def test_a_single_vector(op):
    """hidden (D,), labels (): the leading shape is empty."""
    hidden, weight, _ = inputs()
    row, label = hidden[3].detach().requires_grad_(), torch.tensor(7)
    expected = torch.autograd.grad(op(row.unsqueeze(0), weight, label.unsqueeze(0)), (row, weight))
    for got, e in zip(torch.autograd.grad(op(row, weight, label), (row, weight)), expected, strict=True):
        torch.testing.assert_close(got, e)


@every_op
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(op, reentrant):
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(op(hidden, weight, labels), (hidden, weight))
    checkpoint(op, hidden, weight, labels, use_reentrant=reentrant).backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


@every_op
def test_one_gradient_of_several_is_the_same(op):
    hidden, weight, labels = inputs()
    both = torch.autograd.grad(op(hidden, weight, labels), (hidden, weight))
    for leaf, expected in zip((hidden, weight), both, strict=True):
        (alone,) = torch.autograd.grad(op(hidden, weight, labels), leaf)
        assert torch.equal(alone, expected)


@every_op
def test_threads_do_not_share(op):
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(op(hidden, weight, labels), (hidden, weight))
    found = []

    def step():
        found.append(torch.autograd.grad(op(hidden, weight, labels), (hidden, weight)))

    threads = [threading.Thread(target=step) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(g, e) for got in found for g, e in zip(got, expected, strict=True))


@every_op
def test_a_backward_in_another_thread_keeps_the_backend(op, monkeypatch):
    """As that of a GPU's tensors, which autograd runs in a thread of its own; ``use_backend`` holds in its thread."""
    hidden, weight, labels = inputs()
    loss, chosen = op(hidden, weight, labels), []
    monkeypatch.setattr(backend, "_FORCED", SimpleNamespace(get=lambda: chosen.append("asked")))
    thread = threading.Thread(target=loss.backward, args=(torch.tensor(3.0),))
    thread.start()
    thread.join()
    assert weight.grad is not None
    assert not chosen


@pytest.mark.parametrize("op", ["logprob", "token_kl", "prob_lse"])
def test_a_weight_that_changed_before_the_backward_is_noticed(op):
    hidden, weight, labels = inputs()
    loss = OPS[op](hidden, weight, labels)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("op", OPS)
def test_shapes_without_values(op, kind):
    hidden, weight, labels = inputs()
    if kind == "meta":
        leaves = [t.detach().to("meta").requires_grad_() for t in (hidden, weight)]
        loss = OPS[op](*leaves, labels.to("meta"))
        gradients = torch.autograd.grad(loss, leaves)
    else:
        with FakeTensorMode() as mode:
            leaves = [mode.from_tensor(t) for t in (hidden, weight)]
            loss = OPS[op](*leaves, mode.from_tensor(labels))
            gradients = torch.autograd.grad(loss, leaves)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert [g.shape for g in gradients] == [hidden.shape, weight.shape]


class Scorer(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.weight = torch.nn.Parameter(inputs()[1].detach())
        self.op = op

    def forward(self, hidden, labels):
        return self.op(hidden, self.weight, labels)


@pytest.mark.parametrize("op", OPS)
def test_exported(op):
    hidden, _, labels = inputs()
    module = Scorer(OPS[op])
    program = torch.export.export(module, (hidden.detach(), labels))
    assert any("var_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(hidden.detach(), labels), module(hidden, labels))
