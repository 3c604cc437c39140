"""One declaration makes an op's eager and its registered form: arguments come back as they went, both forms agree."""

from dataclasses import dataclass, replace
from operator import attrgetter

import pytest
import torch
from torch import Tensor

from var_kernels.kernels.rows import LogitTransform
from var_kernels.ops import define, kl, logprob
from var_kernels.ops.define import Forward, define_op
from var_kernels.ops.head import Head, HeadOptions, Needs

N, D, V = 5, 4, 7


def head(**tensors) -> Head:
    options = HeadOptions(LogitTransform(0.5, 7.0, 1.3), 0.1, torch.bfloat16, 1 << 20, "torch", True, False, True)
    given = {"bias_V": torch.randn(V), "left_NR": torch.randn(N, 2), "right_VR": torch.randn(V, 2), **tensors}
    labels = torch.randint(V, (N, 1))
    needs = Needs(hidden=True, bias=given["bias_V"] is not None, right=given["right_VR"] is not None)
    return Head(torch.randn(N, D), torch.randn(V, D), labels_NK=labels, options=options, needs=needs, **given)


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return a is b
    return a == b and type(a) is type(b)


@pytest.mark.parametrize("absent", [{}, {"bias_V": None}, {"left_NR": None, "right_VR": None}], ids=str)
def test_arguments_come_back_as_they_went(absent):
    given = head(**absent)
    ref = replace(given, options=replace(given.options, transform=LogitTransform(2.0, None, 0.7)), needs=Needs())
    for arguments in (
        logprob.LogprobArguments(given, True, 3, False),
        kl.WeightedKLArguments(given, ref, "reverse", 0.5, torch.randn(N), torch.ones(N, dtype=torch.bool)),
    ):
        layout = define._Layout(type(arguments))
        leaves = attrgetter(*layout.paths)(arguments)
        again = layout.build(iter(leaves))
        assert all(same(a, b) for a, b in zip(attrgetter(*layout.paths)(again), leaves, strict=True))
        assert again.head.options == given.options
        assert again.head.needs == given.needs
        stripped = layout.with_tensors(arguments, iter([None] * len(layout.tensors)))
        assert not any(isinstance(leaf, Tensor) for leaf in attrgetter(*layout.paths)(stripped))
        assert arguments.head is given
        assert given.hidden_ND is not None
        names = [entry.split()[1] for entry in layout.schema()]
        assert len(set(names)) == len(names)


@dataclass
class ToyArguments:
    head: Head
    factor: float
    weight_N: Tensor


found_once: list[bool] = []


def forward(arguments: ToyArguments) -> Forward:
    """factor weight_n sum_d h_nd; its square where the entropy is asked for; ids."""
    sum_N = arguments.head.hidden_ND.sum(1)
    value_N = arguments.factor * arguments.weight_N * sum_N
    square_N = value_N.square() if arguments.head.options.entropy else None
    ids_N = arguments.head.labels_NK.squeeze(1).clone()
    # value_N is an output too
    return Forward((value_N, square_N, ids_N), (value_N, sum_N, None), arguments, once=torch.ones(3))


def shapes(arguments: ToyArguments) -> Forward:
    value_N, sum_N, square_N = (torch.empty_like(arguments.weight_N) for _ in range(3))
    square_N = square_N if arguments.head.options.entropy else None
    ids_N = arguments.head.labels_NK.new_empty(arguments.head.n)
    return Forward((value_N, square_N, ids_N), (value_N, sum_N, None), once=value_N.new_empty(3))


def backward(arguments: ToyArguments, saved, upstream, once):
    found_once.append(once is not None)
    value_N, sum_N, nothing = saved
    dvalue_N, dsquare_N, dids_N = upstream
    assert nothing is None
    assert dids_N is None
    dvalue_N = torch.zeros_like(value_N) if dvalue_N is None else dvalue_N
    if dsquare_N is not None:
        dvalue_N = dvalue_N + 2 * value_N * dsquare_N
    scaled_N = arguments.factor * dvalue_N
    head = arguments.head
    dhidden_ND = (scaled_N * arguments.weight_N).unsqueeze(1).expand(head.n, head.d).contiguous()
    return dhidden_ND if head.needs.hidden else None, None, None, None, None, scaled_N * sum_N


toy = define_op("toy_of_the_tests", ToyArguments, forward, backward, shapes, outputs=3, learns=("weight_N",))


def step(hidden, weight, entropy, *, traced):
    options = HeadOptions(LogitTransform(), 0.0, torch.float32, 1 << 20, "torch", entropy=entropy)
    labels = torch.arange(N).unsqueeze(1)
    given = Head(hidden, torch.ones(V, D), None, labels, options, Needs(hidden=hidden.requires_grad))
    return toy(ToyArguments(given, 3.0, weight), traced)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "registered"])
def test_both_forms_of_an_op(entropy, traced):
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(N, requires_grad=True)
    value, square, ids = step(hidden, weight, entropy, traced=traced)
    expected = 3.0 * weight * hidden.sum(1)
    assert torch.equal(ids, torch.arange(N))
    assert not ids.requires_grad
    assert (square is not None) == entropy
    total, truth = value.sum() * 0.5, expected.sum() * 0.5
    if entropy:
        total, truth = total + square.sum(), truth + expected.square().sum()
    found_once.clear()
    wanted = torch.autograd.grad(truth, (hidden, weight))
    for _ in range(2):
        for got, want in zip(torch.autograd.grad(total, (hidden, weight), retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(got, want)
    # eagerly the first backward may overwrite it; a graph keeps it
    assert found_once == [True, traced]


def test_a_side_that_does_not_learn_gets_nothing():
    weight = torch.randn(N, requires_grad=True)
    for traced in (False, True):
        value, *_ = step(torch.randn(N, D), weight, False, traced=traced)
        (gradient,) = torch.autograd.grad(value.sum(), weight)
        assert gradient.shape == (N,)
