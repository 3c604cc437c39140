"""The calls of liger-kernel: same arguments, and the results of torch's own cross-entropy."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F

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
    logits = (hidden @ weight.T + bias).double()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    given = None if ce_weight is None else ce_weight.double()
    loss = F.cross_entropy(logits, target, given, label_smoothing=label_smoothing, reduction="none")
    kept = target != -100
    if use_token_scaling:
        loss = loss * logits.softmax(-1).gather(1, target.clamp(min=0)[:, None]).squeeze(1).detach()
    loss = loss + lse_square_scale * logits.logsumexp(-1).square() * kept
    if reduction == "none":
        return loss
    divisor = kept.sum() if given is None else given[target[kept]].sum()
    return loss.sum() / divisor if reduction == "mean" else loss.sum()


OPTIONS = [
    {},
    {"softcap": 3.0, "label_smoothing": 0.1, "lse_square_scale": 0.01},
    {"ce_weight": torch.linspace(0.5, 2, V)},
    {"use_token_scaling": True},
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all options", "class weights", "token scaling"])
def test_equals_torch(options, reduction):
    leaves = tensors()
    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction, **options)(*leaves)
    truth_leaves = tensors()
    truth = naive(*truth_leaves, reduction=reduction, **options)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)
    (loss * upstream).sum().backward()
    (truth * upstream).sum().backward()
    for ours, theirs in zip(leaves, truth_leaves, strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


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
        ({"ce_weight": torch.ones(V), "label_smoothing": 0.1}, "label_smoothing must be off together with ce_weight"),
        ({"use_token_scaling": True, "lse_square_scale": 0.1}, "lse_square_scale must be off together with use_token"),
        ({"ce_weight": torch.ones(3)}, r"ce_weight must be \(207,\)"),
        ({"reduction": "average"}, "reduction must be one of"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearCrossEntropyLoss(**options)(*tensors())


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
    with pytest.raises(ValueError, match="ce_mode: expected None"):
        LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target, bias, *asked, None, "mode")


def test_the_module_is_one_as_any_other():
    """A dataclass underneath: it copies and pickles, and compares and prints as modules do."""
    loss = LigerFusedLinearCrossEntropyLoss(torch.linspace(0.5, 2, V), reduction="sum")
    copied = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert torch.equal(copied(*tensors()), loss(*tensors()))
    assert loss != copied
    assert repr(loss) == "LigerFusedLinearCrossEntropyLoss()"
