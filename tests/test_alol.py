# ruff: noqa: E501 (a table: one mistake a line)
"""The A-LoL family: numbers to check by hand, gradients, identities, limits, pass classes, refusals."""

import math

import pytest
import torch

from tests.op_cases import Case
from tests.tolerance import assert_gradient, assert_result
from var_kernels.losses.alol import (
    alol_advantage,
    alol_kl_loss,
    alol_loss,
    alol_ref_free_loss,
    alol_seq_loss,
    rgold_loss,
    rlol_loss,
    weighted_bc_loss,
)
from var_kernels.losses.registry import LOSSES
from var_kernels.losses.sequences import expand_to_tokens, sequence_sum
from var_kernels.ops import linear_logprob, linear_token_loss, linear_weighted_nll
from var_kernels.reference import linear_logprob_ref

FP64 = torch.float64
LN3 = math.log(3)


def tensor(*values):
    return torch.tensor(values, dtype=FP64)


def inputs(b=7, seed=0, dtype=FP64):
    """policy_logp, ref_logp a nat or so apart, reward, value: both signs of the advantage, both sides of the clip."""
    generator = torch.Generator().manual_seed(seed)
    policy, reward = (torch.randn(b, generator=generator, dtype=FP64) for _ in range(2))
    value = torch.rand(b, generator=generator, dtype=FP64)
    ref = policy + torch.linspace(-3, 3, b, dtype=FP64)
    return [t.to(dtype) for t in (policy - 200, ref - 200, 2 * reward, value)]


# sigmoid(ln 3) = 3/4; exp(ln 3) = 3, clipped to 1.9; exp(-ln 3) = 1/3
BY_HAND = {
    "advantage": (alol_advantage(tensor(LN3, -LN3), tensor(0.5, 0.5)), [0.25, 0.0]),
    "advantage of probabilities": (alol_advantage(tensor(0.75, 0.5), tensor(0.5, 0.6), squash=False), [0.25, 0.0]),
    "alol": (
        alol_loss(tensor(-4, -4 - LN3, -4), tensor(-4 - LN3, -4, 1e4), *[tensor(*[x] * 3) for x in (LN3, 0.25)]),
        [0.5 * 1.9 * 4, 0.5 / 3 * (4 + LN3), 0.5 * 0.1 * 4],
    ),
    "alol_seq": (
        alol_seq_loss(tensor(-1, -1 - LN3), tensor(-1 - LN3, -1), tensor(0.5, 0.5)),
        [0.95, 0.5 / 3 * (1 + LN3)],
    ),
    "alol_ref_free": (alol_ref_free_loss(tensor(-4, -4), tensor(LN3, -LN3), tensor(0.25, 0.25)), [2.0, 0.0]),
    "alol_kl": (alol_kl_loss(tensor(-4), tensor(-6), tensor(LN3), tensor(0.25), beta=0.1), [2.0 + 0.2]),
    "rlol": (rlol_loss(tensor(-4, -4), tensor(-4, -4 - LN3), tensor(LN3, LN3)), [3.0, 5.7]),
    "rgold": (rgold_loss(tensor(math.log(0.5), math.log(0.01)), tensor(2.0, 2.0)), [math.log(2), 0.2 * math.log(100)]),
    "weighted_bc": (weighted_bc_loss(tensor(-4, -4), tensor(LN3, -LN3)), [3.0, 1.0]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    got, expected = BY_HAND[name]
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


POLICY, REF, REWARD, VALUE = inputs()
CALLS = {
    "alol": lambda s: alol_loss(s, REF, REWARD, VALUE),
    "alol_ref_free": lambda s: alol_ref_free_loss(s, REWARD, VALUE),
    "alol_kl": lambda s: alol_kl_loss(s, REF, REWARD, VALUE, beta=0.2),
    "rlol": lambda s: rlol_loss(s, REF, REWARD),
    "weighted_bc": lambda s: weighted_bc_loss(s, REWARD),
    "alol_seq": lambda s: alol_seq_loss(s, REF, REWARD),
    "rgold": lambda s: rgold_loss(s, REWARD),
}
A_PLUS = (REWARD.sigmoid() - VALUE).clamp(min=0)
RATIO = (POLICY - REF).exp().clamp(0.1, 1.9)
SLOPES = {
    "alol": -A_PLUS * RATIO,
    "alol_ref_free": -A_PLUS,
    "alol_kl": 0.2 - A_PLUS,
    "rlol": -REWARD.sigmoid() * RATIO,
    "weighted_bc": -REWARD.sigmoid(),
    "alol_seq": -REWARD * RATIO,
    "rgold": -REWARD * 0.1,  # the probability of -200 nats is bounded from below
}


def slope(name, at):
    """The gradient; not gradcheck's: a detached ratio is a function of s that the gradient must not see."""
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(CALLS[name](leaf).sum(), leaf)[0]


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
    torch.testing.assert_close(slope(name, POLICY), SLOPES[name])


def test_the_probability_of_rgold_is_a_constant():
    """-R p log p, detached: the slope at p = 1/2 and R = 2 is -1, where the whole function's would be -1 + ln 2."""
    logp = tensor(math.log(0.5)).requires_grad_()
    rgold_loss(logp, tensor(2.0)).backward(torch.ones(1, dtype=FP64))
    assert logp.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("name", [n for n in CALLS if LOSSES[n].pass_class == "A"])
def test_gradcheck_where_nothing_is_detached(name):
    assert torch.autograd.gradcheck(CALLS[name], (POLICY.clone().requires_grad_(),))


@pytest.mark.parametrize("name", CALLS)
def test_pass_class(name):
    """A: a slope that the policy does not enter. C: it enters, and by the sequence's sum. B: element by element."""
    moved = POLICY + torch.where(torch.arange(7) % 2 == 0, 0.5, 199.0)
    constant = torch.equal(slope(name, POLICY), slope(name, moved))
    assert constant == (LOSSES[name].pass_class == "A")
    if LOSSES[name].pass_class == "B":
        assert LOSSES[name].item == "token"
        jacobian = torch.autograd.functional.jacobian(CALLS[name], POLICY)
        assert jacobian.count_nonzero() == jacobian.diagonal().count_nonzero()


def test_the_gradient_of_a_token_needs_the_sum():
    """Two sequences that share a token and its ratio: class C's slope differs by the rest, class B's does not."""
    token = tensor(-1.0, -1.0).requires_grad_()
    rest, ref, reward, value = tensor(-2.0, -2.5), tensor(-3.0, -3.0), tensor(1.0, 1.0), tensor(0.1, 0.1)
    alol_loss(token + rest, ref, reward, value).sum().backward()
    assert token.grad[0] != token.grad[1]
    token.grad = None
    alol_seq_loss(token, tensor(-1.2, -1.2), reward).sum().backward()
    assert token.grad[0] == token.grad[1]


def test_identities():
    zero = torch.zeros_like(VALUE)
    torch.testing.assert_close(alol_loss(POLICY, REF, REWARD, zero), rlol_loss(POLICY, REF, REWARD))
    torch.testing.assert_close(alol_ref_free_loss(POLICY, REWARD, zero), weighted_bc_loss(POLICY, REWARD))
    torch.testing.assert_close(
        alol_kl_loss(POLICY, REF, REWARD, VALUE, beta=0.0), alol_ref_free_loss(POLICY, REWARD, VALUE)
    )
    # a policy that is its reference has ratio 1
    torch.testing.assert_close(alol_loss(POLICY, POLICY, REWARD, VALUE), alol_ref_free_loss(POLICY, REWARD, VALUE))
    # one token a sequence: the sequence's ratio is the token's
    torch.testing.assert_close(alol_seq_loss(POLICY, REF, A_PLUS), alol_loss(POLICY, REF, REWARD, VALUE))
    squashed = REWARD.sigmoid()
    torch.testing.assert_close(
        alol_loss(POLICY, REF, squashed, VALUE, squash=False), alol_loss(POLICY, REF, REWARD, VALUE)
    )


def test_limits():
    # no clip range: no importance weight; min_prob 1: behaviour cloning
    torch.testing.assert_close(
        alol_loss(POLICY, REF, REWARD, VALUE, clip_range=0.0), alol_ref_free_loss(POLICY, REWARD, VALUE)
    )
    torch.testing.assert_close(rgold_loss(POLICY, REWARD.sigmoid(), min_prob=1.0), weighted_bc_loss(POLICY, REWARD))
    # hundreds of nats apart: finite in fp32, and 0 where the range allows a ratio of 0
    far, near = torch.tensor([-50.0, -900.0]), torch.tensor([-900.0, -50.0])
    loss = alol_loss(far, near, torch.zeros(2), torch.zeros(2), clip_range=1.0)
    assert loss.tolist() == [0.5 * 2 * 50, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_in_fp32(dtype):
    policy, ref, reward, value = (t.to(dtype) for t in inputs())
    got = alol_loss(policy, ref, reward, value)
    assert got.dtype == torch.float32
    assert_result(got, alol_loss(*(t.double() for t in (policy, ref, reward, value))))


def test_only_the_policy_learns():
    ref, reward, value = (t.clone().requires_grad_() for t in (REF, REWARD, VALUE))
    for loss in (
        alol_loss(POLICY.clone().requires_grad_(), ref, reward, value),
        alol_kl_loss(POLICY.clone().requires_grad_(), ref, reward, value, beta=0.1),
        rlol_loss(POLICY.clone().requires_grad_(), ref, reward),
        alol_seq_loss(POLICY.clone().requires_grad_(), ref, reward),
        rgold_loss(POLICY.clone().requires_grad_(), reward),
        weighted_bc_loss(POLICY.clone().requires_grad_(), reward),
    ):
        loss.sum().backward()
    assert all(t.grad is None for t in (ref, reward, value))
    assert not alol_advantage(reward, value).requires_grad


# ---- through the head ------------------------------------------------------------------------------------------------


def padded(case, b=7):
    """(B, T, D) hidden, W, labels (B, T), reference log-probs (B, T) near the policy's, rewards and values (B,)."""
    hidden, weight, labels, _ = case.inputs()
    hidden = hidden.detach().view(b, -1, hidden.shape[-1]).requires_grad_()
    labels = labels.view(b, -1)
    with torch.no_grad():
        now = linear_logprob_ref(hidden, weight, labels)
    ref = now + 0.5 * torch.randn(now.shape, generator=torch.Generator().manual_seed(4), dtype=FP64)
    _, _, reward, value = inputs(b)
    return hidden, weight, labels, ref.where(labels != -100, 0.0), reward, value


@pytest.mark.parametrize("dtype", [torch.float32, FP64], ids=str)
@pytest.mark.parametrize("name", ["alol_seq", "rgold"])
def test_class_b_in_one_pass(name, dtype):
    hidden, weight, labels, ref, reward, value = padded(Case("", dtype=dtype))
    advantage = expand_to_tokens(alol_advantage(reward, value) + 0.1, labels)
    given = (ref, advantage) if name == "alol_seq" else (advantage,)
    f = LOSSES[name].function
    got = linear_token_loss(hidden, weight, labels, f, tuple(t.to(dtype) for t in given), engine="one_pass")
    got.backward()
    grads = {}
    for reference in (FP64, dtype):
        leaves = [t.detach().to(reference).requires_grad_() for t in (hidden, weight)]
        logp = linear_logprob_ref(*leaves, labels, dtype=reference)
        loss = f(logp, *(t.to(dtype).to(reference) for t in given)).where(labels != -100, 0.0).sum()
        loss.backward()
        grads[reference] = leaves
        if reference == FP64:
            assert_result(got / labels.numel(), loss / labels.numel(), "loss")
    for leaf, truth, own in zip((hidden, weight), grads[FP64], grads[dtype], strict=True):
        assert_gradient(leaf.grad, truth.grad, own.grad)


@pytest.mark.parametrize("name", ["alol_ref_free", "alol_kl", "weighted_bc"])
def test_class_a_is_a_weighted_nll(name):
    """One pass with the weights of the docstring gives the gradient of the loss of the summed log-probs."""
    hidden, weight, labels, _, reward, value = padded(Case("", dtype=FP64))
    advantage = alol_advantage(reward, value)
    per_sequence = {"alol_ref_free": advantage, "alol_kl": advantage - 0.2, "weighted_bc": reward.sigmoid()}[name]
    one_pass = linear_weighted_nll(hidden, weight, labels, expand_to_tokens(per_sequence, labels), engine="one_pass")
    got = torch.autograd.grad(one_pass, (hidden, weight))
    expected = torch.autograd.grad(
        CALLS[name](sequence_sum(linear_logprob(hidden, weight, labels), labels)).sum(), (hidden, weight)
    )
    for g, e in zip(got, expected, strict=True):
        assert_gradient(g, e, e)


ZERO = torch.zeros(3)
REFUSED = {
    "clip_range": (ValueError, r"clip_range must be in \[0, 1\], got 1.5", lambda: alol_loss(*[ZERO] * 4, clip_range=1.5)),
    "min_prob": (ValueError, r"min_prob must be in \[0, 1\]", lambda: rgold_loss(ZERO, ZERO, min_prob=-0.1)),
    "text": (TypeError, "clip_range must be a Python number, got str", lambda: alol_loss(*[ZERO] * 4, clip_range="0.5")),
    "beta": (ValueError, "beta must be finite and >= 0, got -1", lambda: alol_kl_loss(*[ZERO] * 4, beta=-1.0)),
    "per token": (ValueError, r"policy_logp must be \(B,\).*sequence_sum", lambda: rlol_loss(*[torch.zeros(3, 4)] * 3)),
    "value short": (ValueError, r"value must be \(3,\) like policy_logp", lambda: alol_loss(ZERO, ZERO, ZERO, ZERO[:2])),
    "advantage a sequence": (ValueError, r"advantage must be \(3, 4\).*expand_to_tokens", lambda: rgold_loss(torch.zeros(3, 4), ZERO)),
    "integer reward": (TypeError, "reward must be a floating-point tensor.*int64", lambda: weighted_bc_loss(ZERO, ZERO.long())),
    "reward NaN": (ValueError, "reward must be finite, got nan at index", lambda: weighted_bc_loss(ZERO, ZERO / 0)),
    "a number": (TypeError, "value must be .* got float", lambda: alol_ref_free_loss(ZERO, ZERO, 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    error, message, call = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
