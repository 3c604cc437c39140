"""slic_loss, simpo_loss, orpo_loss: numbers to check by hand, one identity and one limit each, refusals."""

import math

import pytest
import torch

from var_kernels.losses.margin import orpo_loss, simpo_loss, slic_loss
from var_kernels.losses.pair import dpo_loss


def log_probs(p=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [-20 + 3 * torch.randn(p, dtype=torch.float64, generator=generator) for _ in range(3)]


def lengths(p=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 9, (p,), generator=generator) for _ in range(2)]


CHOSEN, REJECTED = torch.tensor([-10.0, -10.0]), torch.tensor([-20.0, -9.0])


def test_slic_by_hand():
    # hinges max(0, 2 + 10 - 20) = 0 and max(0, 2 + 10 - 9) = 3; the target adds 0.5 * 10
    assert slic_loss(CHOSEN, REJECTED, delta=2.0, target_weight=0.5).tolist() == [5.0, 8.0]
    assert slic_loss(CHOSEN, REJECTED, torch.tensor([-4.0, -6.0]), delta=2.0, target_weight=0.5).tolist() == [2.0, 6.0]


def test_slic_identity_and_limits():
    chosen, rejected, target = log_probs()
    # delta only moves the hinge: rejected log-probs moved down by as much undo it
    moved = slic_loss(chosen, rejected - 3, target, delta=4.0, target_weight=0.3)
    torch.testing.assert_close(moved, slic_loss(chosen, rejected, target, delta=1.0, target_weight=0.3))
    # a pair far beyond its margin leaves SFT on the target
    torch.testing.assert_close(slic_loss(chosen, rejected - 1e4, target, delta=1.0, target_weight=0.3), -0.3 * target)


def test_slic_gradient_reaches_the_target():
    chosen, rejected, target = (value.requires_grad_() for value in log_probs())
    slic_loss(chosen, rejected, target, delta=1.0, target_weight=0.3).sum().backward()
    inside = (1.0 - chosen + rejected > 0).double()
    torch.testing.assert_close(target.grad, torch.full_like(target, -0.3))
    torch.testing.assert_close(chosen.grad, -inside)
    torch.testing.assert_close(rejected.grad, inside)


def test_simpo_by_hand():
    # means -10/5 = -2 and -20/4 = -5: 2 * 3 - 1 = 5
    got = simpo_loss(CHOSEN[:1], REJECTED[:1], torch.tensor([5]), torch.tensor([4]), beta=2.0, gamma=1.0)
    assert got.item() == pytest.approx(math.log1p(math.exp(-5)))


def test_simpo_identity_and_limit():
    chosen, rejected, _ = log_probs()
    ones, zeros = torch.ones(7, dtype=torch.int64), torch.zeros(7, dtype=torch.float64)
    # one token a sequence, no margin: DPO against a reference that gives every sequence the same log-prob
    torch.testing.assert_close(
        simpo_loss(chosen, rejected, ones, ones, beta=0.3, gamma=0.0),
        dpo_loss(chosen, rejected, zeros, zeros, beta=0.3),
    )
    # an enormous margin makes the loss linear in the gap
    some = lengths()
    gap = chosen / some[0] - rejected / some[1]
    torch.testing.assert_close(simpo_loss(chosen, rejected, *some, beta=2.0, gamma=1e4), 1e4 - 2 * gap)


def test_orpo_by_hand():
    # probabilities per token 0.5 (odds 1) and 0.2 (odds 1/4): log odds ratio log 4
    chosen, rejected = torch.tensor([2 * math.log(0.5)]), torch.tensor([3 * math.log(0.2)])
    got = orpo_loss(chosen, rejected, torch.tensor([2]), torch.tensor([3]), odds_weight=0.1)
    assert got.item() == pytest.approx(math.log(2) + 0.1 * math.log(1.25))


def test_orpo_identity_and_limits():
    chosen, rejected, _ = log_probs()
    some = lengths()
    p, q = (chosen / some[0]).exp(), (rejected / some[1]).exp()
    # sigmoid of a log odds ratio, written with probabilities
    share = p * (1 - q) / (p * (1 - q) + q * (1 - p))
    torch.testing.assert_close(
        orpo_loss(chosen, rejected, *some, odds_weight=0.7), -chosen / some[0] - 0.7 * share.log()
    )
    # rare sequences: odds are probabilities
    rare = orpo_loss(chosen - 1e3, rejected - 1e3, *[torch.ones(7, dtype=torch.int64)] * 2, odds_weight=1.0)
    torch.testing.assert_close(rare, 1e3 - chosen + torch.nn.functional.softplus(rejected - chosen))


def test_orpo_at_probability_one():
    certain = torch.tensor([0.0, -1e-12, -5.0], requires_grad=True)
    ones = torch.ones(3, dtype=torch.int64)
    for loss in (
        orpo_loss(certain, torch.tensor([-3.0, 0.0, 0.0]), ones, ones, odds_weight=1.0),
        orpo_loss(torch.tensor([-3.0, 0.0, 0.0]), certain, ones, ones, odds_weight=1.0),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), certain)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


ZERO, ONE = torch.zeros(3), torch.ones(3, dtype=torch.int64)
REFUSED = {
    "slic delta": (lambda: slic_loss(ZERO, ZERO, delta=-1.0, target_weight=0.1), "delta must be finite and >= 0"),
    "slic weight": (lambda: slic_loss(ZERO, ZERO, delta=1.0, target_weight=-0.1), "target_weight must be"),
    "slic target": (
        lambda: slic_loss(ZERO, ZERO, ZERO[:1], delta=1.0, target_weight=0.1),
        r"policy_target_logp must be \(3,\)",
    ),
    "simpo gamma": (lambda: simpo_loss(ZERO, ZERO, ONE, ONE, beta=1.0, gamma=-1), "gamma must be finite and >= 0"),
    "simpo lengths": (lambda: simpo_loss(ZERO, ZERO, None, ONE, beta=1.0, gamma=0.0), "chosen_lengths must be"),
    "orpo weight": (lambda: orpo_loss(ZERO, ZERO, ONE, ONE, odds_weight=math.nan), "odds_weight must be finite"),
    "orpo lengths": (lambda: orpo_loss(ZERO, ZERO, ONE, ONE[:1], odds_weight=1.0), "rejected_lengths must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
