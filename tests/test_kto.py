"""kto_loss and its baseline: numbers to check by hand, shift invariance, limits, refusals."""

import math

import pytest
import torch

from var_kernels.losses.kto import kto_baseline, kto_loss

DESIRABLE = torch.tensor([True, False, True, True, False])


def log_probs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    policy, ref = (-20 + 3 * torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(2))
    return policy + 3, ref  # the mean log-ratio is positive, as a KL is


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_by_hand():
    # rho = (3, -1), mean 1 = z0: gains 0.5 * 2 = 1 and 0.5 * (1 + 1) = 1 for both
    policy, ref = torch.tensor([-10.0, -20.0]), torch.tensor([-13.0, -19.0])
    flags = torch.tensor([True, False])
    loss = kto_loss(policy, ref, flags, beta=0.5, undesirable_weight=2.0)
    assert loss.tolist() == pytest.approx([1 - sigmoid(1), 2 * (1 - sigmoid(1))])
    given = kto_loss(policy, ref, flags, torch.tensor(3.0), beta=0.5, desirable_weight=4.0)
    assert given.tolist() == pytest.approx([2.0, 1 - sigmoid(2)])


def test_baseline_is_the_mean_and_never_negative():
    zero = torch.zeros(2)
    assert kto_baseline(torch.tensor([3.0, -1.0]), zero).item() == 1.0
    assert kto_baseline(torch.tensor([-3.0, 1.0]), zero).item() == 0.0
    assert kto_baseline(zero[:0], zero[:0]).item() == 0.0
    assert not kto_baseline(zero.requires_grad_(), zero).requires_grad


def test_gradient_stops_at_the_baseline():
    policy, ref = log_probs()
    policy.requires_grad_()
    own = torch.autograd.grad(kto_loss(policy, ref, DESIRABLE, beta=0.3).sum(), policy)[0]
    z0 = kto_baseline(policy, ref)
    given = torch.autograd.grad(kto_loss(policy, ref, DESIRABLE, z0, beta=0.3).sum(), policy)[0]
    assert torch.equal(own, given)
    gain = 0.3 * (policy - ref - z0).detach()
    slope = 0.3 * gain.sigmoid() * (-gain).sigmoid()
    torch.testing.assert_close(own, torch.where(DESIRABLE, -slope, slope))


def test_two_halves_with_the_global_baseline_are_the_whole():
    policy, ref = log_probs()
    whole = kto_loss(policy, ref, DESIRABLE, beta=0.3)
    z0 = kto_baseline(policy, ref)
    assert z0 > 0
    halves = [kto_loss(policy[part], ref[part], DESIRABLE[part], z0, beta=0.3) for part in (slice(2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(halves), whole)
    own = [kto_loss(policy[part], ref[part], DESIRABLE[part], beta=0.3) for part in (slice(2), slice(2, 5))]
    assert (torch.cat(own) - whole).abs().max() > 0.01  # what the docstring warns of


def test_shift_invariance():
    policy, ref = log_probs()
    assert kto_baseline(policy, ref) > 0
    torch.testing.assert_close(
        kto_loss(policy + 5, ref, DESIRABLE, beta=0.3), kto_loss(policy, ref, DESIRABLE, beta=0.3)
    )


def test_flags_and_sign_identity():
    policy, ref = log_probs()
    z0 = torch.tensor(0.0, dtype=torch.float64)
    # what is gained where desirable is lost where not
    both = kto_loss(policy, ref, DESIRABLE, z0, beta=0.3) + kto_loss(policy, ref, ~DESIRABLE, z0, beta=0.3)
    torch.testing.assert_close(both, torch.ones_like(both))
    mirrored = kto_loss(2 * ref - policy, ref, ~DESIRABLE, z0, beta=0.3)
    torch.testing.assert_close(mirrored, kto_loss(policy, ref, DESIRABLE, z0, beta=0.3))


def test_limits():
    far, zero, yes = torch.tensor([1e4, -1e4]), torch.zeros(2), torch.tensor([True, True])
    z0 = torch.tensor(0.0)
    assert kto_loss(far, zero, yes, z0, beta=1.0).tolist() == [0.0, 1.0]
    assert kto_loss(far, zero, ~yes, z0, beta=1.0).tolist() == [1.0, 0.0]
    # 1 - sigmoid(20) = 2e-9 is below fp32's eps and must not be rounded to 0
    near_one = kto_loss(torch.tensor([20.0]), zero[:1], yes[:1], z0, beta=1.0)
    assert near_one.item() == pytest.approx(math.exp(-20), rel=1e-5)


ZERO, YES = torch.zeros(3), torch.ones(3, dtype=torch.bool)
REFUSED = {
    "beta": (dict(beta=0.0), ValueError, "beta must be finite and > 0"),
    "weight": (dict(desirable_weight=-1.0), ValueError, "desirable_weight must be finite and >= 0"),
    "integer flags": (dict(desirable=YES.long()), TypeError, "desirable must be a bool tensor .*got torch.int64"),
    "flags short": (dict(desirable=YES[:2]), ValueError, r"desirable must be \(3,\) like policy_logp"),
    "baseline per row": (dict(kl_baseline=ZERO), TypeError, r"kl_baseline must be .*\(\), got \(3,\)"),
    "baseline a float": (dict(kl_baseline=0.5), TypeError, "kl_baseline must be .* got float"),
    "baseline NaN": (dict(kl_baseline=torch.tensor(math.nan)), ValueError, "kl_baseline must be finite"),
    "reference": (dict(ref_logp=ZERO - math.inf), ValueError, r"ref_logp must be finite, got -inf at index \(0,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    changes, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        kto_loss(**{"policy_logp": ZERO, "ref_logp": ZERO, "desirable": YES, "beta": 0.1, **changes})
