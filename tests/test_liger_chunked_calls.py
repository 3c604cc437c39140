"""The calls of liger-kernel's chunked preference losses, against full logits and, where installed, itself."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from var_kernels.integrations import liger_chunked as ours
from var_kernels.integrations.liger_chunked import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

P, T, D, V = 3, 7, 12, 53
NAMES = ["DPO", "CPO", "SimPO", "ORPO", "KTO"]
DPO_TYPES = [
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]


def tensors(seed=0):
    """lin_weight, _input, target, bias in fp64; ragged rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(V, (2 * P, T), generator=torch.Generator().manual_seed(9))
    target[0, :3] = target[4, 5:] = -100
    return normal(V, D).requires_grad_(), normal(2 * P, T, D).requires_grad_(), target, normal(V).requires_grad_()


def sequences(weight, hidden, target, bias, average=False):
    logp = (hidden @ weight.T + bias).log_softmax(-1)
    kept = target != -100
    logp = logp.gather(-1, target.where(kept, 0)[..., None])[..., 0].where(kept, 0.0)
    return logp.sum(-1) / kept.sum(-1) if average else logp.sum(-1)


def dpo_by_hand(loss_type, chosen, rejected, beta, smoothing, tau):
    """TRL's and liger-kernel's formulas, of log-ratios."""
    m = beta * (chosen - rejected)
    epsilon = torch.tensor(smoothing, dtype=m.dtype)
    return {
        "sigmoid": lambda: -F.logsigmoid(m),
        "hinge": lambda: torch.relu(1 - m),
        "exo_pair": lambda: (
            torch.sigmoid(m) * (F.logsigmoid(m) - torch.log(1 - epsilon))
            + torch.sigmoid(-m) * (F.logsigmoid(-m) - torch.log(epsilon))
        ),
        "nca_pair": lambda: (
            -F.logsigmoid(beta * chosen) - 0.5 * F.logsigmoid(-beta * chosen) - 0.5 * F.logsigmoid(-beta * rejected)
        ),
        "robust": lambda: (-(1 - smoothing) * F.logsigmoid(m) + smoothing * F.logsigmoid(-m)) / (1 - 2 * smoothing),
        "bco_pair": lambda: -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected),
        "sppo_hard": lambda: (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected),
        "apo_down": lambda: torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected)),
        "discopop": lambda: -F.logsigmoid(m) * (1 - torch.sigmoid(m / tau)) + torch.exp(-m) * torch.sigmoid(m / tau),
    }[loss_type]().mean()


def assert_same(make, by_hand):
    """Loss and every gradient, with an upstream gradient of 0.7."""
    leaves, truth_leaves = tensors(), tensors()
    (0.7 * make(*leaves)).backward()
    truth = by_hand(*truth_leaves)
    torch.testing.assert_close(make(*leaves), truth, rtol=1e-10, atol=1e-10)
    (0.7 * truth).backward()
    for got, expected in zip(leaves, truth_leaves, strict=True):
        if got.is_floating_point():
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_dpo(loss_type):
    ref_weight, ref_input, _, ref_bias = (t.detach() for t in tensors(1))
    options = {"beta": 0.3, "label_smoothing": 0.1, "discopop_tau": 0.4}
    loss = LigerFusedLinearDPOLoss(loss_type=loss_type, compute_nll_loss=True, alpha=0.5, **options)

    def by_hand(weight, hidden, target, bias):
        policy = sequences(weight, hidden, target, bias)
        ratio = policy - sequences(ref_weight, ref_input, target, ref_bias)
        nll = -policy[:P].sum() / (target[:P] != -100).sum()
        return dpo_by_hand(loss_type, ratio[:P], ratio[P:], 0.3, 0.1, 0.4) + 0.5 * nll

    assert_same(lambda *leaves: loss(*leaves, ref_input, ref_weight, ref_bias)[0], by_hand)


def test_the_metrics_of_dpo():
    weight, hidden, target, bias = tensors()
    loss = LigerFusedLinearDPOLoss(use_ref_model=False, average_log_prob=True)
    chosen, rejected, chosen_logit, rejected_logit, nll, c, r = loss(weight, hidden, target, bias)[1]
    logp, logits = sequences(weight, hidden, target, bias, average=True), hidden @ weight.T + bias
    torch.testing.assert_close(torch.cat([chosen, rejected]), logp)
    torch.testing.assert_close(torch.cat([c, r]), 0.1 * logp)
    torch.testing.assert_close(chosen_logit.double(), logits[:P].mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rejected_logit.double(), logits[P:].mean(), rtol=1e-5, atol=1e-6)
    assert nll == 0
    assert not any(metric.requires_grad for metric in (chosen, c, r, chosen_logit))


def test_cpo_simpo_orpo():
    def nll(weight, hidden, target, bias):
        return -sequences(weight, hidden, target, bias)[:P].sum() / (target[:P] != -100).sum()

    def smoothed(m):
        return (-0.9 * F.logsigmoid(m) - 0.1 * F.logsigmoid(-m)).mean()

    def cpo(*leaves):
        logp = 0.2 * sequences(*leaves)
        return smoothed(logp[:P] - logp[P:]) + 2 * nll(*leaves)

    def simpo(*leaves):
        logp = 0.2 * sequences(*leaves, average=True)
        return smoothed(logp[:P] - logp[P:] - 0.4) + nll(*leaves)

    def orpo(*leaves):
        logp = sequences(*leaves, average=True)
        odds = logp - torch.log1p(-logp.exp())
        return nll(*leaves) - 0.2 * F.logsigmoid(odds[:P] - odds[P:]).mean()

    options = {"beta": 0.2, "label_smoothing": 0.1}
    assert_same(lambda *leaves: LigerFusedLinearCPOLoss(alpha=2.0, **options)(*leaves)[0], cpo)
    assert_same(lambda *leaves: LigerFusedLinearSimPOLoss(gamma=0.4, **options)(*leaves)[0], simpo)
    assert_same(lambda *leaves: LigerFusedLinearORPOLoss(beta=0.2)(*leaves)[0], orpo)


def test_kto():
    ref_weight, ref_input, _, ref_bias = (t.detach() for t in tensors(1))
    desirable = torch.tensor([True, False, True, True, False, False])
    loss = LigerFusedLinearKTOLoss(beta=0.3, use_ref_model=True)

    def make(weight, hidden, target, bias):
        return loss(hidden, weight, target, bias, desirable, ref_input, ref_weight, ref_bias, 0.2)

    def by_hand(*leaves):
        ratio = sequences(*leaves) - sequences(ref_weight, ref_input, leaves[2], ref_bias)
        sign = torch.where(desirable, 1.0, -1.0)
        return (1 - torch.sigmoid(0.3 * (ratio - 0.2) * sign)).mean()

    assert_same(lambda *leaves: make(*leaves)[0], by_hand)
    weight, hidden, target, bias = tensors()
    good, bad, good_logits, _, good_reward, _ = make(weight, hidden, target, bias)[1]
    logp, logits = sequences(weight, hidden, target, bias), hidden @ weight.T + bias
    torch.testing.assert_close(torch.stack([good, bad]), torch.stack([logp[desirable].sum(), logp[~desirable].sum()]))
    torch.testing.assert_close(good_logits.double(), logits[desirable].sum(), rtol=1e-4, atol=1e-3)
    ratio = logp - sequences(ref_weight, ref_input, target, ref_bias)
    torch.testing.assert_close(good_reward, 0.3 * ratio[desirable].sum())


def test_refusals():
    weight, hidden, target, bias = tensors()
    with pytest.raises(ValueError, match="loss_type must be one of"):
        LigerFusedLinearDPOLoss(loss_type="ipo")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \(0, 0\.5\) for loss_type='exo_pair'"):
        LigerFusedLinearDPOLoss(loss_type="exo_pair")
    with pytest.raises(ValueError, match="ref_input: expected the reference's tensor"):
        LigerFusedLinearDPOLoss()(weight, hidden, target, bias)
    with pytest.raises(ValueError, match="chosen before rejected"):
        LigerFusedLinearCPOLoss()(weight, hidden[:3], target[:3], bias)
    with pytest.raises(ValueError, match="preference_labels: expected"):
        LigerFusedLinearKTOLoss()(hidden, weight, target, bias)
    with pytest.raises(ImportError, match=r"LigerFusedLinearGRPOLoss is not among .*linear_loss"):
        from var_kernels.integrations.liger_chunked import LigerFusedLinearGRPOLoss  # noqa: F401


@pytest.mark.parametrize("name", NAMES)
def test_signatures_and_numbers_are_theirs(name):
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    name = f"LigerFusedLinear{name}Loss"
    for call in ("__init__", "forward"):
        got, expected = (inspect.signature(getattr(getattr(m, name), call)).parameters for m in (ours, theirs))
        assert [(p.name, p.default) for p in got.values()] == [(p.name, p.default) for p in expected.values()]
    weight, hidden, target, bias = (t.float() if t.is_floating_point() else t for t in tensors())
    options = {"compiled": False, **({"use_ref_model": False} if "DPO" in name else {})}
    args = (weight, hidden, target, bias)
    if "KTO" in name:
        args = (hidden, weight, target, bias, torch.tensor([True, False] * P))
    (loss, metrics), (their_loss, their_metrics) = (getattr(m, name)(**options)(*args) for m in (ours, theirs))
    assert math.isclose(loss.item(), their_loss.item(), rel_tol=1e-5)
    for got, expected in zip(metrics, their_metrics, strict=True):
        torch.testing.assert_close(got, torch.as_tensor(expected), rtol=1e-4, atol=1e-4)
