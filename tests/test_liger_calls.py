"""The calls of liger-kernel: same arguments, and the results of torch's own cross-entropy."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F

from tests.tolerance import assert_gradient, assert_result
from var_kernels.integrations import liger
from var_kernels.integrations.liger import (
    LigerFusedLinearCrossEntropyFunction,
    LigerFusedLinearCrossEntropyLoss,
    liger_fused_linear_cross_entropy,
)

N, D, V = 31, 24, 207


def tensors():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator).mul(0.4).requires_grad_()
    bias = torch.randn(V, generator=generator, requires_grad=True)
    target = torch.randint(0, V, (N,), generator=generator)
    target[::4] = -100
    return weight, hidden, target, bias


def naive(weight, hidden, target, bias, *, ce_weight=None, softcap=None, lse_square_scale=0.0, label_smoothing=0.0,
          reduction="mean", use_token_scaling=False):  # fmt: skip
    logits = hidden.double() @ weight.double().T + bias.double()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    given = None if ce_weight is None else ce_weight.double()
    loss = F.cross_entropy(logits, target, given, label_smoothing=label_smoothing, reduction="none")
    kept = target != -100
    penalty = lse_square_scale * logits.logsumexp(-1).square() * kept
    if use_token_scaling:
        label_prob = logits.softmax(-1).gather(1, target.clamp(min=0)[:, None]).squeeze(1).detach()
        loss, penalty = loss * label_prob, penalty * label_prob
    if reduction == "none":
        return loss + penalty
    if reduction == "sum":
        return (loss + penalty).sum()
    return loss.sum() / (kept.sum() if given is None else given[target[kept]].sum()) + penalty.sum() / kept.sum()


CLASSES = torch.linspace(0.5, 2, V)
OPTIONS = {
    "plain": {},
    "softcap, smoothing, z-loss": {"softcap": 3.0, "label_smoothing": 0.1, "lse_square_scale": 0.01},
    "smoothing 1": {"label_smoothing": 1.0},
    "class weights": {"ce_weight": CLASSES},
    "class weights, smoothing": {"ce_weight": CLASSES, "label_smoothing": 0.1},
    "class weights, smoothing 1": {"ce_weight": CLASSES, "label_smoothing": 1.0},
    "class weights, z-loss": {"ce_weight": CLASSES, "lse_square_scale": 0.01, "softcap": 3.0},
    "class weights of both signs": {"ce_weight": 0.6 - CLASSES},
    "token scaling": {"use_token_scaling": True},
    "everything": {
        "use_token_scaling": True,
        "ce_weight": CLASSES,
        "label_smoothing": 0.1,
        "lse_square_scale": 0.01,
        "softcap": 3.0,
    },
    "class weights, smoothing, softcap": {"ce_weight": CLASSES, "label_smoothing": 0.1, "softcap": 3.0},
    "token scaling, class weights, softcap": {"use_token_scaling": True, "ce_weight": CLASSES, "softcap": 3.0},
    "token scaling, smoothing": {"use_token_scaling": True, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_torch(options, reduction):
    leaves = tensors()
    asked = {"return_token_accuracy": True} if len(options) > 1 else {}
    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction, **asked, **options)(*leaves)
    loss = loss.loss if asked else loss
    truth_leaves = tensors()
    truth = naive(*truth_leaves, reduction=reduction, **options)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)
    (loss * upstream).sum().backward()
    (truth * upstream).sum().backward()
    for ours, theirs in zip(leaves, truth_leaves, strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"ce_weight": CLASSES, "label_smoothing": 0.3, "lse_square_scale": 0.01}], ids=["plain", "mixed"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_of_fp32_beside_16_bit(dtype, options):
    """As it is where only the matrices are kept in 16 bit; its gradient is fp32 too."""
    weight, hidden, target, bias = tensors()
    leaves = [weight.detach().to(dtype), hidden.detach().to(dtype), target, bias.detach()]
    truth_leaves = [t.double() if t.is_floating_point() else t for t in leaves]
    for some in (leaves, truth_leaves):
        for i in (0, 1, 3):
            some[i].requires_grad_()
    loss, truth = LigerFusedLinearCrossEntropyLoss(**options)(*leaves), naive(*truth_leaves, **options)
    assert_result(loss, truth)
    (7 * loss).backward()
    (7 * truth).backward()
    rounded = [t.grad.to(dtype) for t in (truth_leaves[0], truth_leaves[1])]
    for ours, theirs, plain in zip(leaves[:2], truth_leaves[:2], rounded, strict=True):
        assert_gradient(ours.grad, theirs.grad, plain)
    assert bias.dtype == leaves[3].grad.dtype == torch.float32
    error = leaves[3].grad.double() - truth_leaves[3].grad
    assert error.abs().max() <= 2.0**-17 * truth_leaves[3].grad.abs().max()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_that_do_not_count_may_hold_anything(options, reduction):
    """Padding of NaN changes no number; a batch without a row gives 0, and gradients of 0."""
    clean, leaves = tensors(), tensors()
    with torch.no_grad():
        leaves[1][leaves[2] == -100] = torch.nan
    call = LigerFusedLinearCrossEntropyLoss(reduction=reduction, **options)
    gradients = []
    for some in (clean, leaves):
        loss = call(*some)
        gradients.append([loss.detach(), *torch.autograd.grad(loss.sum(), (some[0], some[1], some[3]))])
    for got, expected in zip(*gradients, strict=True):
        assert torch.equal(got, expected)
    leaves[2].fill_(-100)
    loss = call(*leaves)
    assert not loss.any()
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), (leaves[0], leaves[1], leaves[3])))


def test_several_tiles_of_the_classes(monkeypatch):
    """Smoothing over weighted classes, in ragged slices of the vocabulary."""
    monkeypatch.setattr(liger, "_TILE_ELEMENTS", N * 50)
    test_equals_torch(OPTIONS["everything"], "mean")
    test_a_bias_of_fp32_beside_16_bit(torch.bfloat16, OPTIONS["everything"])


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 3), (0, 1)], ids=str)
def test_frozen_tensors(frozen):
    """Of lin_weight, hidden, target, bias; the others' gradients are as they are when all learn."""
    leaves = tensors()
    call = LigerFusedLinearCrossEntropyLoss(**OPTIONS["everything"])
    learns = [i for i in (0, 1, 3) if i not in frozen]
    expected = torch.autograd.grad(call(*leaves), [leaves[i] for i in learns])
    some = [t.detach() if i in frozen else t for i, t in enumerate(leaves)]
    for got, want in zip(torch.autograd.grad(call(*some), [leaves[i] for i in learns]), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_weights_that_sum_to_nothing():
    """A mean over no weight is torch's: 0 / 0 where the weights are 0, the other sign where their sum is negative."""
    weight, hidden, target, bias = tensors()
    for classes in (torch.zeros(V), -CLASSES, -torch.ones(V)):
        loss = LigerFusedLinearCrossEntropyLoss(classes)(weight, hidden, target, bias)
        truth = naive(weight, hidden, target, bias, ce_weight=classes)
        torch.testing.assert_close(loss.double(), truth, equal_nan=True)
        assert loss.isnan() == (not classes.any())


def test_what_learns():
    """Not the class weights, and nothing by the z-loss that is returned; the loss has it."""
    weight, hidden, target, bias = tensors()
    classes = CLASSES.clone().requires_grad_()
    call = LigerFusedLinearCrossEntropyLoss(classes, lse_square_scale=0.1, label_smoothing=0.1, return_z_loss=True)
    out = call(weight, hidden, target, bias)
    assert not out.z_loss.requires_grad
    with_part = torch.autograd.grad(out.loss + out.z_loss, hidden, retain_graph=True)[0]
    assert torch.equal(with_part, torch.autograd.grad(out.loss, hidden, retain_graph=True)[0])
    assert torch.autograd.grad(out.loss, classes, allow_unused=True) == (None,)


def test_extras():
    weight, hidden, target, bias = tensors()
    asked = dict.fromkeys(("return_z_loss", "return_token_accuracy", "return_predicted_tokens"), True)
    with torch.no_grad():
        best = (hidden @ weight.T + bias).argmax(-1)
    target[1:4] = best[1:4]
    out = liger_fused_linear_cross_entropy(hidden, weight, target, bias, lse_square_scale=0.01, **asked)
    kept = target != -100
    torch.testing.assert_close(
        out.loss.double(), naive(weight, hidden, target, bias, lse_square_scale=0.01), rtol=1e-5, atol=1e-5
    )
    lse = (hidden @ weight.T + bias).logsumexp(-1)
    torch.testing.assert_close(out.z_loss, (0.01 * lse.square() * kept).sum() / kept.sum())
    assert out.token_accuracy == ((best == target) & kept).sum() / kept.sum()
    assert torch.equal(out.predicted_tokens, best.where(kept, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.1}, r"label_smoothing must be in \[0, 1\], got 1.1"),
        ({"ce_weight": torch.ones(3)}, r"ce_weight must be \(207,\)"),
        ({"reduction": "average"}, "reduction must be one of"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearCrossEntropyLoss(**options)(*tensors())


# liger-kernel 0.8.5's own, by position
OPTION_NAMES = ["ce_weight", "ignore_index", "lse_square_scale", "label_smoothing", "reduction", "softcap",
                "return_z_loss", "accum_dtype", "use_token_scaling", "return_token_accuracy",
                "return_predicted_tokens"]  # fmt: skip
POSITIONS = {
    LigerFusedLinearCrossEntropyLoss: OPTION_NAMES,
    LigerFusedLinearCrossEntropyLoss.forward: ["self", "lin_weight", "_input", "target", "bias"],
    liger_fused_linear_cross_entropy: ["input", "weight", "target", "bias", *OPTION_NAMES, "chunk_mem_const"],
    LigerFusedLinearCrossEntropyFunction.apply: ["_input", "weight", "target", "bias", "options"],
}


@pytest.mark.parametrize("call", POSITIONS, ids=lambda call: call.__qualname__)
def test_positions(call):
    assert list(inspect.signature(call).parameters) == POSITIONS[call]


def test_signatures_are_theirs():
    theirs = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    for call in ("__init__", "forward"):
        ours, other = (
            list(inspect.signature(getattr(owner.LigerFusedLinearCrossEntropyLoss, call)).parameters)
            for owner in (__import__("var_kernels.integrations.liger", fromlist=["x"]), theirs)
        )
        assert ours == other


def test_the_function_by_position():
    weight, hidden, target, bias = tensors()
    asked = (None, -100, 0.01, 0.0, "mean", None, True, None, False, True, True)
    wanted = LigerFusedLinearCrossEntropyLoss(*asked)(weight, hidden, target, bias)
    found = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target, bias, *asked, None, None, 1)
    for ours, theirs in zip(found, vars(wanted).values(), strict=True):
        assert torch.equal(ours, theirs)
    loss, *others = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target, bias)
    assert torch.equal(loss, LigerFusedLinearCrossEntropyLoss()(weight, hidden, target, bias))
    assert others == [None] * 3
    with pytest.raises(ValueError, match="ce_mode must be None"):
        LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target, bias, *asked, None, "mode")


def test_the_module_is_one_as_any_other():
    """A dataclass underneath: it copies and pickles, and compares and prints as modules do."""
    loss = LigerFusedLinearCrossEntropyLoss(torch.linspace(0.5, 2, V), reduction="sum")
    copied = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert torch.equal(copied(*tensors()), loss(*tensors()))
    assert loss != copied
    assert repr(loss) == "LigerFusedLinearCrossEntropyLoss()"
