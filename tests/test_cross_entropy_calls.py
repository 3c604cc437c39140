"""The calls of cut-cross-entropy and of torch's linear_cross_entropy: same arguments, torch's own cross-entropy."""

import inspect
import itertools
import re

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


def by_hand(hidden, weight, target, bias, steps, reduction):
    """Loss and lse of capped logits, of the rows that a shift leaves."""
    logits = 4 * torch.tanh((hidden @ weight.T + bias) / 4)[:, : T - steps]
    target = target[:, steps:]
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction=reduction)
    return loss.view(target.shape) if reduction == "none" else loss, logits.logsumexp(-1).where(target != -1, 0.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, True, 2])
def test_cut_cross_entropy(reduction, shift):
    hidden, weight, bias, target = tensors(B, T)
    options = {"ignore_index": -1, "softcap": 4.0, "reduction": reduction, "shift": shift}
    loss = cce.linear_cross_entropy(hidden, weight, target, bias, filter_eps="high", impl="cce_exact", **options)
    assert torch.equal(loss, cce.LinearCrossEntropy(**options)(hidden, weight, target, bias))
    naive, lse = by_hand(hidden, weight, target, bias, int(shift), reduction)
    assert_same(loss, naive, (hidden, weight, bias))
    # the loss beside lse, and a z-loss of it
    by_name = cce.linear_cross_entropy(hidden, weight, target, bias, return_lse=True, **options)
    by_place = cce.linear_cross_entropy(hidden, weight, target, bias, -1, 4.0, reduction, shift, True)
    by_module = cce.LinearCrossEntropy(return_lse=True, **options)(hidden, weight, target, bias)
    for found in (by_name, by_place, by_module):
        torch.testing.assert_close(found[0], naive, rtol=1e-10, atol=1e-10)
        naive, lse = by_hand(hidden, weight, target, bias, int(shift), reduction)
        assert_same(found[0].sum() + found[1].square(), naive.sum() + lse.square(), (hidden, weight, bias))


# The arguments that cut-cross-entropy takes by position, release by release; only the newest has what all of them have.
NEWEST = ["e", "c", "targets", "bias", "ignore_index", "softcap", "reduction", "shift", "return_lse", "filter_eps",
          "accum_e_fp32", "accum_c_fp32", "filter_e_grad", "filter_c_grad", "impl",
          "vocab_parallel_options"]  # fmt: skip
NEWEST_MODULE = ["ignore_index", "softcap", "reduction", "shift", "filter_eps", "accum_e_fp32", "accum_c_fp32",
                 "filter_e_grad", "filter_c_grad", "impl", "return_lse"]  # fmt: skip
WITHOUT_BIAS = ["e", "c", "targets", "ignore_index", "softcap", "reduction", "shift", "filter_eps", "impl"]  # 25.1.1
WITHOUT_BIAS_MODULE = ["ignore_index", "softcap", "reduction", "filter_eps", "shift", "impl"]
TORCH = ["input", "linear_weight", "target", "linear_bias", "weight", "reduction", "ignore_index", "label_smoothing",
         "options"]  # fmt: skip
OTHERS = {
    "ignore_index": [-1], "softcap": [4.0, None], "reduction": ["sum"], "shift": [True],
    "filter_eps": ["high", 1e-3, None], "impl": ["cce"],
}  # fmt: skip


def test_positions_are_theirs():
    assert list(inspect.signature(cce.linear_cross_entropy).parameters) == NEWEST
    assert list(inspect.signature(cce.LinearCrossEntropy).parameters) == NEWEST_MODULE
    assert list(inspect.signature(torch_call.linear_cross_entropy).parameters) == TORCH
    assert set(WITHOUT_BIAS) <= set(NEWEST)
    assert set(WITHOUT_BIAS_MODULE) <= set(NEWEST_MODULE)
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        theirs = inspect.signature(F.linear_cross_entropy).parameters
        assert list(theirs) == TORCH
        for ours in inspect.signature(torch_call.linear_cross_entropy).parameters.values():
            assert (ours.kind, ours.default) == (theirs[ours.name].kind, theirs[ours.name].default)


def test_another_release_s_positions_are_refused_by_name():
    """Calls that give some of 25.1.1's arguments by position: the numbers they mean, or an error that names one."""
    hidden, weight, _, target = tensors(B, T)
    refused = []
    for values in itertools.product(*OTHERS.values()):
        given = dict(zip(OTHERS, values, strict=True))
        meant = cce.linear_cross_entropy(hidden, weight, target, **given)
        for count in range(len(given) + 1):
            calls = (
                (WITHOUT_BIAS[3:], lambda *a, **k: cce.linear_cross_entropy(hidden, weight, target, *a, **k)),
                (WITHOUT_BIAS_MODULE, lambda *a, **k: cce.LinearCrossEntropy(*a, **k)(hidden, weight, target)),
            )
            for names, call in calls:
                by_place, by_name = [given[n] for n in names[:count]], {n: given[n] for n in names[count:]}
                try:
                    found = call(*by_place, **by_name)
                except TypeError as error:
                    refused.append(str(error))
                else:
                    assert torch.equal(found, meant)
    assert len(refused) > 50
    assert all(re.search("must be .*name them|multiple values for", message) for message in refused)


def test_what_cut_cross_entropy_is_refused():
    hidden, weight, bias, target = tensors(B, T)
    with pytest.raises(ValueError, match="shift must be from 0 to 7, got 8"):
        cce.linear_cross_entropy(hidden, weight, target, shift=8)
    with pytest.raises(TypeError, match="bias must be a tensor or None, got int -100"):
        cce.linear_cross_entropy(hidden, weight, target, -100)
    with pytest.raises(TypeError, match=r"return_lse must be a bool, got str 'auto'; .* name them"):
        cce.linear_cross_entropy(hidden, weight, target, bias, -100, None, "mean", 0, "auto")
    with pytest.raises(TypeError, match="'high' or None, got bool True"):
        cce.LinearCrossEntropy(-100, None, "mean", 0, True)
    with pytest.raises(ValueError, match="vocab_parallel_options must be None"):
        cce.linear_cross_entropy(hidden, weight, target, vocab_parallel_options=object())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 4])
def test_no_row_gives_0(reduction, rows):
    """Where both libraries say NaN for "mean", with gradients of 0."""
    hidden, weight, bias, _ = tensors(rows)
    target = torch.full((rows,), -100)
    losses = [torch_call.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction=reduction)]
    if rows:
        losses += [
            cce.linear_cross_entropy(hidden, weight, target, bias, reduction=reduction),
            cce.linear_cross_entropy(hidden, weight, target, bias, reduction=reduction, return_lse=True)[0],
        ]
    theirs = F.cross_entropy(hidden @ weight.T + bias, target, reduction=reduction)
    assert theirs.isnan() if reduction == "mean" else not theirs.any()
    for loss in losses:
        assert loss.shape == theirs.shape
        assert not loss.any()
        for ours, expected in zip(
            *(torch.autograd.grad(t.sum(), (hidden, weight), retain_graph=True) for t in (loss, theirs)), strict=True
        ):
            assert not ours.any()
            assert not expected.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0},
    {"weight": torch.linspace(0.5, 2, V).double()},
    {"weight": torch.linspace(-2, 0.3, V).double()},
    {"weight": torch.linspace(-2, 2.2, V).double(), "label_smoothing": 0.1},
])  # fmt: skip
def test_torch(reduction, options):
    hidden, weight, bias, target = tensors(B * T)
    call = {"reduction": reduction, "ignore_index": -1, **options}
    loss = torch_call.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **call)
    assert_same(loss, F.cross_entropy(hidden @ weight.T + bias, target, **call), (hidden, weight, bias))


def test_torch_alone():
    hidden, weight, bias, target = tensors(B * T)
    one = torch_call.linear_cross_entropy(hidden[1], weight, target[1], linear_bias=bias, reduction="none")
    torch.testing.assert_close(one, F.cross_entropy(hidden[1] @ weight.T + bias, target[1]))
    with pytest.raises(ValueError, match="target must be class ids"):
        torch_call.linear_cross_entropy(hidden, weight, torch.rand(B * T, V))
    with pytest.raises(ValueError, match=r"linear_weight must be \(V, D\)"):
        torch_call.linear_cross_entropy(hidden, weight[None], target)
