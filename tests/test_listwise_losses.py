"""InfoNCA, NCA, GVPO, target PO and A*-PO's value: numbers by hand, identities, limits. Optima: test_loss_optima.py."""

import math

import pytest
import torch

from var_kernels.losses import (
    astar_po_loss,
    dpo_loss,
    dro_loss,
    exo_loss,
    gvpo_loss,
    info_nca_loss,
    nca_loss,
    rebel_loss,
    soft_value,
    target_po_loss,
    var_weights,
)

FP64 = torch.float64
LN2, LN3 = math.log(2), math.log(3)
IDS = torch.tensor([7, 4, 7, 7, 4, 9])  # groups of 3, 2 and 1, interleaved
PAIR = torch.tensor([0, 0])


def tensor(*values):
    return torch.tensor(values, dtype=FP64)


def rows(seed=0):
    """policy_logp, ref_logp, reward."""
    generator = torch.Generator().manual_seed(seed)
    policy, ref, reward = (torch.randn(6, dtype=FP64, generator=generator) for _ in range(3))
    return -20 + policy, -20 + ref, reward


# log-ratios ln 3 and 0, rewards whose softmax is (2/3, 1/3)
GIVEN = (tensor(LN3, 0), tensor(0, 0), tensor(LN2, 0), PAIR)
ONE = {"beta": 1.0, "reward_temperature": 1.0}
BY_HAND = {
    "info_nca": (info_nca_loss(*GIVEN, **ONE), [2 / 3 * math.log(4 / 3), math.log(4) / 3]),
    # sigmoid(ln 3) = 3/4
    "nca": (nca_loss(*GIVEN, **ONE), [math.log(4) / 2 + 2 / 3 * math.log(4 / 3), LN2 / 2 + LN2 / 3]),
    # what is missed: 2 - 3 and 0 - 1 of rewards 3 and 1: equal, no variance; 4 and 1: -2 and -1
    "gvpo": (gvpo_loss(tensor(2, 0), tensor(0, 0), tensor(4, 1), PAIR, beta=1.0), [0.125, 0.125]),
    "gvpo, met": (gvpo_loss(tensor(2, 0), tensor(0, 0), tensor(3, 1), PAIR, beta=1.0), [0, 0]),
    # u = -+1 / sqrt(2): (r - mean) / (std + 1e-4) of 0 and 2 is 1 / (sqrt(2) + 1e-4); an eta that makes 2 u / eta ln 2
    "target_po": (
        target_po_loss(tensor(LN3, 0), tensor(LN2, 0), tensor(2, 0), PAIR, eta=2 / (2**0.5 + 1e-4) / LN2),
        [0.8 * math.log(4 / 3), 0.2 * math.log(4)],  # target 4 : 1
    ),
    "soft_value": (soft_value(tensor(LN3, 0, 5), torch.tensor([1, 1, 2]), temperature=1.0), [LN2, LN2, 5]),
    "astar_po": (astar_po_loss(tensor(-1, -2), tensor(-3, -2), tensor(1, 4), tensor(0.5, 1), beta=0.5), [0.25, 9]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    got, expected = BY_HAND[name]
    assert got.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_identities():
    policy, ref, reward = rows()
    # forward and reverse KL of the same two softmaxes: equal to second order where they meet
    near = ref + reward / 0.3 + 1e-4 * policy
    options = {"beta": 0.3, "reward_temperature": 1.0}
    entropy = info_nca_loss(ref + reward / 0.3, ref, reward, IDS, **options).sum()
    forward = info_nca_loss(near, ref, reward, IDS, **options).sum() - entropy
    assert forward.item() == pytest.approx(exo_loss(near, ref, reward, IDS, **options).sum().item(), rel=1e-3)
    # a hard preference between two: DPO
    pair = (policy[:2], ref[:2], tensor(1e3, -1e3), PAIR)
    got = info_nca_loss(*pair, **options).sum()
    torch.testing.assert_close(got, dpo_loss(policy[:1], policy[1:2], ref[:1], ref[1:2], beta=0.3)[0])
    # two completions: REBEL
    got = gvpo_loss(policy[:2], ref[:2], reward[:2], PAIR, beta=0.3).sum()
    pair = (policy[:1], policy[1:2], ref[:1], ref[1:2], reward[:1], reward[1:2])
    torch.testing.assert_close(got, rebel_loss(*pair, eta=1 / 0.3)[0] * 0.3**2 / 4)
    # a prompt's Z cancels: neither a reward nor a log-ratio is changed by a constant
    shift = 5.0 * IDS
    torch.testing.assert_close(
        gvpo_loss(policy + shift, ref, reward - shift, IDS, beta=0.3), gvpo_loss(policy, ref, reward, IDS, beta=0.3)
    )
    # DRO-V with a given value
    value = soft_value(reward, IDS, temperature=0.3)
    given = (policy, ref, reward, value)
    torch.testing.assert_close(astar_po_loss(*given, beta=0.3), 0.6 * dro_loss(*given, tau=0.3))
    # its value is lam times VAR's log Z without a reference term
    log_z = var_weights(reward, lam=0.3, group_ids=IDS, normalizer="self_normalised").log_z
    torch.testing.assert_close(value, 0.3 * log_z)


def test_trl_nca_pair():
    """TRL's nca_pair, read again: a preference without rewards, that is with the target (1, 0)."""
    policy, ref, _ = rows(1)
    chosen, rejected = 0.3 * (policy - ref)[:2]
    theirs = -torch.nn.functional.logsigmoid(chosen) - 0.5 * sum(
        torch.nn.functional.logsigmoid(-ratio) for ratio in (chosen, rejected)
    )
    hard = nca_loss(policy[:2], ref[:2], tensor(1e3, -1e3), PAIR, beta=0.3, reward_temperature=1.0)
    torch.testing.assert_close(hard.sum(), theirs)


def test_the_gradient_of_target_po_is_the_distance_from_the_target():
    policy, old, reward = rows(2)
    leaf = policy.clone().requires_grad_()
    target_po_loss(leaf, old, reward, torch.zeros(6, dtype=torch.int64), eta=0.7).sum().backward()
    tilt = (reward - reward.mean()) / (reward.std() + 1e-4) / 0.7
    torch.testing.assert_close(leaf.grad, policy.softmax(0) - (old + tilt).softmax(0))


def test_limits():
    policy, ref, reward = rows()
    alone = torch.arange(6)
    for loss in (info_nca_loss, gvpo_loss):
        options = {"beta": 0.3} | ({"reward_temperature": 1.0} if loss is info_nca_loss else {})
        assert loss(policy, ref, reward, alone, **options).abs().max() == 0  # nothing to compare
    # at high temperatures rewards are forgotten: the target is the old policy
    got = target_po_loss(policy, policy, reward, IDS, eta=1e9)
    leaf = policy.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(target_po_loss(leaf, policy, reward, IDS, eta=1e9).sum(), leaf)
    assert got.isfinite().all()
    assert gradient.abs().max() < 1e-8
    # V: the mean of hot rewards, the best of cold ones, no overflow on the way
    mean = torch.stack([reward[i == IDS].mean() for i in IDS])
    best = torch.stack([reward[i == IDS].max() for i in IDS])
    torch.testing.assert_close(soft_value(reward, IDS, temperature=1e7), mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(soft_value(1e5 + reward, IDS, temperature=1e-7), 1e5 + best, atol=1e-6, rtol=0)


REFUSED = {
    "eta": ("eta must be finite and > 0, got 0", lambda p, r, w: target_po_loss(p, r, w, IDS, eta=0)),
    "beta": ("beta must be finite and > 0", lambda p, r, w: gvpo_loss(p, r, w, IDS, beta=-1.0)),
    "temperature": ("temperature must be finite and > 0", lambda p, r, w: soft_value(w, IDS, temperature=0.0)),
    "ids": ("group_ids must be", lambda p, r, w: gvpo_loss(p, r, w, IDS[:2], beta=1.0)),
    "reward": ("reward must be finite, got -?inf at index", lambda p, r, w: soft_value(w / 0, IDS, temperature=1.0)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    message, call = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(*rows(1))
