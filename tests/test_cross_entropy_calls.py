"""The calls of cut-cross-entropy and of torch's linear_cross_entropy: same arguments, torch's own cross-entropy."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from var_kernels.integrations import cce, torch_call

B, T, D, V = 3, 8, 12, 61


def tensors(*leading):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*leading, D, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(V, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(V, leading, generator=generator)
    target.view(-1)[::4] = -1
    return hidden, weight, bias, target


def assert_same(ours, theirs, leaves):
    gradients = []
    for loss in (ours, theirs):
        (loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, True, 2])
def test_cut_cross_entropy(reduction, shift):
    hidden, weight, bias, target = tensors(B, T)
    options = {"ignore_index": -1, "softcap": 4.0, "reduction": reduction, "shift": shift}
    loss = cce.linear_cross_entropy(hidden, weight, target, bias, filter_eps="high", impl="cce_exact", **options)
    assert torch.equal(loss, cce.LinearCrossEntropy(**options)(hidden, weight, target, bias))
    steps = int(shift)
    logits = 4 * torch.tanh((hidden @ weight.T + bias) / 4)
    naive = F.cross_entropy(
        logits[:, : T - steps].flatten(0, 1), target[:, steps:].flatten(), ignore_index=-1, reduction=reduction
    )
    assert_same(loss, naive.view(loss.shape), (hidden, weight, bias))


def test_what_cut_cross_entropy_is_refused():
    hidden, weight, _, target = tensors(B, T)
    with pytest.raises(ValueError, match="shift: expected 0 to 7, got 8"):
        cce.linear_cross_entropy(hidden, weight, target, shift=8)
    with pytest.raises(TypeError, match="bias: expected a tensor or None, got int -100"):
        cce.linear_cross_entropy(hidden, weight, target, -100)
    with pytest.raises(ValueError, match="vocab_parallel_options: expected None"):
        cce.linear_cross_entropy(hidden, weight, target, vocab_parallel_options=object())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.linspace(0.5, 2, V).double()}])
def test_torch(reduction, options):
    hidden, weight, bias, target = tensors(B * T)
    call = {"reduction": reduction, "ignore_index": -1, **options}
    loss = torch_call.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **call)
    assert_same(loss, F.cross_entropy(hidden @ weight.T + bias, target, **call), (hidden, weight, bias))


def test_torch_alone():
    hidden, weight, bias, target = tensors(B * T)
    one = torch_call.linear_cross_entropy(hidden[1], weight, target[1], linear_bias=bias, reduction="none")
    torch.testing.assert_close(one, F.cross_entropy(hidden[1] @ weight.T + bias, target[1]))
    with pytest.raises(ValueError, match="target: expected class ids"):
        torch_call.linear_cross_entropy(hidden, weight, torch.rand(B * T, V))
    with pytest.raises(ValueError, match=r"linear_weight: expected \(V, D\)"):
        torch_call.linear_cross_entropy(hidden, weight[None], target)
    with pytest.raises(ValueError, match="label_smoothing: expected 0 together with weight"):
        torch_call.linear_cross_entropy(hidden, weight, target, weight=torch.ones(V), label_smoothing=0.1)


def test_signatures_are_theirs():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch before 2.13")
    expected = list(inspect.signature(F.linear_cross_entropy).parameters)
    assert list(inspect.signature(torch_call.linear_cross_entropy).parameters) == expected
