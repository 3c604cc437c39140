# ruff: noqa: E501 (a table: one mistake a line)
"""Losses of a token's own log-prob: numbers by hand, one pass against autograd over full fp64 logits, identities."""

import math
from functools import partial

import pytest
import torch

from tests.op_cases import Case
from tests.tolerance import assert_gradient, assert_result
from var_kernels.losses.finetuning import chord_phi_loss, iw_sft_token_loss, psft_loss
from var_kernels.losses.policy_gradient import cispo_loss, sapo_loss
from var_kernels.losses.registry import LOSSES
from var_kernels.losses.token import (
    dft_loss,
    grpo_loss,
    kl_k1,
    kl_k2,
    kl_k3,
    length_weights,
    ppo_clipped,
    ppo_loss,
    token_objective,
)
from var_kernels.ops import linear_token_loss
from var_kernels.reference import linear_logprob_ref

FP64 = torch.float64
LN2 = math.log(2)


def tensor(*values):
    return torch.tensor(values, dtype=FP64)


ZERO = tensor(0.0)
BY_HAND = {
    "dft": (dft_loss(tensor(-LN2, 0.0)), [LN2 / 2, 0.0]),
    # ratios 2, 2, 1/2, 1/2 with advantages of both signs: clipped at 1.3 and 0.8, where that is the smaller gain
    "ppo": (
        ppo_loss(tensor(LN2, LN2, -LN2, -LN2), tensor(*[0.0] * 4), tensor(1, -1, 1, -1), clip_low=0.2, clip_high=0.3),
        [-1.3, 2.0, -0.5, 0.8],
    ),
    "grpo": (grpo_loss(ZERO, ZERO, tensor(LN2), tensor(3.0), beta=0.5), [-3 + 0.5 * (2 - 1 - LN2)]),
    "k1": (kl_k1(tensor(-1.0), tensor(-3.0)), [2.0]),
    "k2": (kl_k2(tensor(-1.0), tensor(-3.0)), [2.0]),
    "k3": (kl_k3(tensor(-LN2, 0.0), tensor(0.0, -LN2)), [1 - LN2, LN2 - 0.5]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    got, expected = BY_HAND[name]
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


# ---- one pass over the head against autograd over the full logits, with the losses written out again -----------------


def naive_dft(logp, entropy, old, ref, advantage):
    return -logp.exp().detach() * logp


def naive_ppo(logp, entropy, old, ref, advantage):
    ratio = logp.exp() / old.exp()
    upper, lower = advantage * 1.28, advantage * 0.8
    gain = torch.where(
        advantage > 0,
        torch.where(ratio > 1.28, upper, ratio * advantage),
        torch.where(ratio < 0.8, lower, ratio * advantage),
    )
    return -gain


def naive_grpo(logp, entropy, old, ref, advantage):
    ratio = ref.exp() / logp.exp()
    return naive_ppo(logp, entropy, old, ref, advantage) + 0.3 * (ratio - ratio.log() - 1)


def naive_bonus(logp, entropy, old, ref, advantage):
    return naive_ppo(logp, entropy, old, ref, advantage) - 0.1 * entropy


PPO = partial(token_objective, ppo_loss, clip_high=0.28)
HEADS = {
    "dft": (token_objective(dft_loss), (), False, naive_dft),
    "ppo": (PPO(), ("old", "advantage"), False, naive_ppo),
    "grpo": (
        token_objective(grpo_loss, beta=0.3, clip_high=0.28),
        ("old", "ref", "advantage"),
        False,
        naive_grpo,
    ),
    "ppo, entropy bonus": (PPO(entropy_bonus=0.1), ("old", "advantage"), True, naive_bonus),
}
CASES = [Case("fp32"), Case("fp64", dtype=FP64, bias=True), Case("bf16", dtype=torch.bfloat16)]


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_through_the_head(case, name, engine):
    f, names, entropy, naive = HEADS[name]
    hidden, weight, labels, bias = case.inputs()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        now = linear_logprob_ref(hidden, weight, labels, bias)
    given = {
        key: (now + 0.3 * torch.randn(labels.shape, generator=generator, dtype=FP64)).to(torch.float32)
        for key in ("old", "ref")
    }
    given["advantage"] = torch.randn(labels.shape, generator=generator)
    token_weight = length_weights(labels.view(7, 9), normalization="sequence").view(-1)
    if case.dtype == FP64:
        given, token_weight = {key: t.double() for key, t in given.items()}, token_weight.double()
    got = linear_token_loss(
        hidden, weight, labels, f, (*(given[n] for n in names), token_weight), bias, entropy=entropy, engine=engine
    )
    got.backward()

    def reference(dtype):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        logp, h = linear_logprob_ref(*leaves[:2], labels, leaves[2], dtype=dtype, return_entropy=True)
        per_token = naive(logp, h, *(given[n].to(dtype) for n in ("old", "ref", "advantage")))
        loss = (token_weight.to(dtype) * per_token)[labels != -100].sum()
        loss.backward()
        return loss, leaves

    truth, truth_leaves = reference(FP64)
    _, own_leaves = reference(case.dtype)
    assert_result(got, truth, "loss")
    for leaf, expected, own in zip((hidden, weight, bias), truth_leaves, own_leaves, strict=True):
        if leaf is not None:
            assert_gradient(leaf.grad, expected.grad, own.grad)


# ---- gradients, pass class, identities, limits -----------------------------------------------------------------------

LOGP = tensor(-0.3, -1.0, -2.5, -4.0, -0.7)
OLD = LOGP + tensor(0.1, -0.6, 0.5, 0.05, -0.1)
REF = LOGP + tensor(-1.0, 0.4, 2.0, -0.2, 0.0)
ADVANTAGE = tensor(1.0, -2.0, 0.5, 0.3, -0.4)
CALLS = {
    "dft": dft_loss,
    "ppo": lambda logp: ppo_loss(logp, OLD, ADVANTAGE),
    "grpo": lambda logp: grpo_loss(logp, OLD, REF, ADVANTAGE, beta=0.3),
    "cispo": lambda logp: cispo_loss(logp, OLD, ADVANTAGE),
    "sapo": lambda logp: sapo_loss(logp, OLD, ADVANTAGE),
    "iw_sft_token": lambda logp: iw_sft_token_loss(logp, REF),
    "psft": lambda logp: psft_loss(logp, OLD),
    "chord_phi": chord_phi_loss,
}


@pytest.mark.parametrize(
    "call", [CALLS["ppo"], CALLS["grpo"], *(partial(k, ref_token_logp=REF) for k in (kl_k1, kl_k2, kl_k3))]
)
def test_gradcheck(call):
    assert torch.autograd.gradcheck(call, (LOGP.clone().requires_grad_(),))


def test_the_probability_of_dft_is_a_constant():
    """d/dlp = -p: the slope of the probability itself."""
    logp = LOGP.clone().requires_grad_()
    dft_loss(logp).sum().backward()
    torch.testing.assert_close(logp.grad, -LOGP.exp())


@pytest.mark.parametrize("name", CALLS)
def test_pass_class(name):
    """B: the slope of a token depends on its own log-prob, and on no other's."""
    assert (LOSSES[name].pass_class, LOSSES[name].item) == ("B", "token")
    jacobian = torch.autograd.functional.jacobian(CALLS[name], LOGP)
    assert jacobian.count_nonzero() == jacobian.diagonal().count_nonzero()
    moved = torch.autograd.functional.jacobian(CALLS[name], LOGP - 0.05)
    assert not torch.equal(jacobian, moved)


def test_only_the_policy_learns():
    old, ref, advantage = (t.clone().requires_grad_() for t in (OLD, REF, ADVANTAGE))
    grpo_loss(LOGP.clone().requires_grad_(), old, ref, advantage, beta=0.3).sum().backward()
    assert old.grad is ref.grad is advantage.grad is None


def test_identities():
    # on policy the surrogate's gradient is the policy gradient's, -A
    logp = LOGP.clone().requires_grad_()
    ppo_loss(logp, LOGP, ADVANTAGE).sum().backward()
    torch.testing.assert_close(logp.grad, -ADVANTAGE)
    # a reference that is the policy adds nothing, nor does beta 0
    torch.testing.assert_close(grpo_loss(LOGP, OLD, LOGP, ADVANTAGE, beta=9.0), ppo_loss(LOGP, OLD, ADVANTAGE))
    torch.testing.assert_close(grpo_loss(LOGP, OLD, REF, ADVANTAGE, beta=0.0), ppo_loss(LOGP, OLD, ADVANTAGE))


def test_limits():
    # an unbounded clip range: the plain importance-weighted gain
    wide = ppo_loss(LOGP, OLD, ADVANTAGE, clip_low=1 - 1e-12, clip_high=1e9)
    torch.testing.assert_close(wide, -(LOGP - OLD).exp() * ADVANTAGE)
    # a thousand nats apart, in fp32: finite, and still pointing the right way
    logp = torch.tensor([-1000.0, -0.5], requires_grad=True)
    loss = grpo_loss(logp, torch.tensor([-0.5, -1000.0]), torch.tensor([-0.5, -1000.0]), -torch.ones(2), beta=0.1)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logp.grad.isfinite().all()
    assert logp.grad[0] < 0 < logp.grad[1]


def test_kl_estimators_by_enumeration():
    """Expectations over every token of a small vocabulary: the values and the gradients that the docstrings claim."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(9, generator=generator, dtype=FP64).requires_grad_()
    logq = torch.randn(9, generator=generator, dtype=FP64).log_softmax(0)
    logp = z.log_softmax(0)
    p = logp.detach().exp()
    forward, backward = (logp.exp() * (logp - logq)).sum(), (logq.exp() * (logq - logp)).sum()
    torch.testing.assert_close((p * kl_k1(logp, logq)).sum(), forward)
    torch.testing.assert_close((p * kl_k3(logp, logq)).sum(), forward)

    def slope(value):
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    torch.testing.assert_close(slope((p * kl_k1(logp, logq)).sum()), torch.zeros_like(z))
    torch.testing.assert_close(slope((p * kl_k2(logp, logq)).sum()), slope(forward))
    torch.testing.assert_close(slope((p * kl_k3(logp, logq)).sum()), slope(backward))
    assert kl_k3(logp, logq).min() >= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_in_fp32(dtype):
    logp, old, ref, advantage = (t.to(dtype) for t in (LOGP, OLD, REF, ADVANTAGE))
    got = grpo_loss(logp, old, ref, advantage, beta=0.3)
    assert got.dtype == torch.float32
    assert_result(got, grpo_loss(*(t.double() for t in (logp, old, ref, advantage)), beta=0.3))


# ---- weights ---------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([[4, 5, -100, 6], [-100, 7, -100, -100], [-100] * 4])  # lengths 3, 1, 0


def test_length_weights_by_hand():
    def rows(**options):
        return length_weights(LABELS, **options).tolist()

    sixth = torch.tensor(1 / 6).item()
    assert rows(normalization="sequence") == [[sixth, sixth, 0, sixth], [0, 0.5, 0, 0], [0] * 4]
    assert rows(normalization="token") == [[0.25, 0.25, 0, 0.25], [0, 0.25, 0, 0], [0] * 4]
    assert rows(normalization="constant", num_items=2 * 4) == [[0.125, 0.125, 0, 0.125], [0, 0.125, 0, 0], [0] * 4]
    # of a global batch of 8 sequences, of 40 tokens
    assert rows(normalization="sequence", num_items=8)[1] == [0, 0.125, 0, 0]
    assert rows(normalization="token", num_items=40)[1] == pytest.approx([0, 0.025, 0, 0])
    assert length_weights(torch.full((2, 3), -100), normalization="token").tolist() == [[0.0] * 3] * 2
    for normalization in ("sequence", "token", "constant"):  # a step without a token
        nothing = length_weights(torch.full((2, 3), -100), normalization=normalization, num_items=0)
        assert nothing.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_length_weights_packed(normalization):
    kept = LABELS != -100
    packed = length_weights(LABELS[kept], normalization=normalization, cu_seqlens=torch.tensor([0, 3, 4, 4]))
    assert torch.equal(packed, length_weights(LABELS, normalization=normalization)[kept])


def test_weights_turn_the_sum_into_the_mean():
    """GRPO's mean over sequences of the mean over tokens, DAPO's mean over all tokens."""
    values = torch.arange(12.0).view(3, 4)
    by_sequence = (values * length_weights(LABELS, normalization="sequence")).sum()
    assert by_sequence.item() == pytest.approx(((0 + 1 + 3) / 3 + 5) / 2)
    by_token = (values * length_weights(LABELS, normalization="token")).sum()
    assert by_token.item() == pytest.approx((0 + 1 + 3 + 5) / 4)


REFUSED = {
    "clip_low": (ValueError, r"clip_low must be in \[0, 1\), got 1", lambda: ppo_loss(ZERO, ZERO, ZERO, clip_low=1.0)),
    "clip_high": (ValueError, "clip_high must be finite and >= 0, got -0.1", lambda: ppo_loss(ZERO, ZERO, ZERO, clip_high=-0.1)),
    "beta": (ValueError, "beta must be finite and >= 0, got nan", lambda: grpo_loss(*[ZERO] * 4, beta=math.nan)),
    "a sequence's advantage": (ValueError, r"advantage must be \(2, 3\) like token_logp, got \(2,\).*expand", lambda: ppo_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))),
    "reference": (ValueError, r"ref_token_logp must be \(1,\)", lambda: grpo_loss(ZERO, ZERO, torch.zeros(2), ZERO, beta=0.1)),
    "integers": (TypeError, "token_logp must be a floating-point tensor.*int64", lambda: dft_loss(torch.zeros(3).long())),
    "a list": (TypeError, "old_token_logp must be .* got list", lambda: ppo_loss(ZERO, [0.0], ZERO)),
    "normalization": (ValueError, "normalization must be one of", lambda: length_weights(LABELS, normalization="mean")),
    "no constant": (ValueError, "num_items must be given", lambda: length_weights(LABELS, normalization="constant")),
    "num_items": (ValueError, "num_items must be finite and > 0", lambda: length_weights(LABELS, normalization="token", num_items=0)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    error, message, call = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_ppo_clipped_is_where_the_gradient_stops():
    old = torch.zeros(8, dtype=torch.float64)
    logp = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.1, 0.9, 1.3, 0.7], dtype=torch.float64).log().requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    clipped = ppo_clipped(logp, old, advantage, clip_low=0.2, clip_high=0.25)
    assert clipped.tolist() == [True, False, False, True, False, False, False, False]
    (gradient,) = torch.autograd.grad(ppo_loss(logp, old, advantage, clip_low=0.2, clip_high=0.25).sum(), logp)
    assert torch.equal(gradient[:6] == 0, clipped[:6])
    assert not ppo_clipped(logp, old, advantage, clip_low=0.2, clip_high=0.31)[0]
    with pytest.raises(ValueError, match="clip_low must be"):
        ppo_clipped(logp, old, advantage, clip_low=1.0)
