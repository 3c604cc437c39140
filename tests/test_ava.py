# ruff: noqa: E501 (a table: one mistake a line)
"""AVA: numbers by hand, the documented gradients, finite differences, identities, limits; reward losses beside it."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.op_cases import Case
from tests.tolerance import assert_gradient, assert_result
from var_kernels.losses.ava import ava_d_loss, ava_p_loss, bradley_terry_loss, literal_q, pair_accuracy
from var_kernels.losses.registry import LOSSES
from var_kernels.ops import linear_logprob
from var_kernels.reference import logits_ref

FP64 = torch.float64
OPTIONS = {"beta": 0.7, "gamma": 0.9, "lam": 0.4}
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


def response(seed=0, dtype=FP64):
    """token_logp, mu, log_sigma (4, 5): a prompt, a gap, one token, none."""
    generator = torch.Generator().manual_seed(seed)
    q, mu, log_sigma = (torch.randn(MASK.shape, generator=generator, dtype=FP64) for _ in range(3))
    return [t.to(dtype) for t in (q - 2, mu, 0.5 * log_sigma)]


def leaves(seed=0):
    return [t.requires_grad_() for t in response(seed)]


def naive_terms(q, mu, log_sigma, mask, *, beta, gamma, lam):
    """(sum beta Q, sum of -KL + lam TD) of each sequence, token by token, from torch's own normal distributions."""
    likelihood, regulariser = [], []
    for i in range(q.shape[0]):
        likelihood.append(q.new_zeros(()))
        regulariser.append(q.new_zeros(()))
        for t in range(q.shape[1]):
            if not mask[i, t]:
                continue
            posterior = Normal(mu[i, t], log_sigma[i, t].exp())
            likelihood[i] = likelihood[i] + beta * q[i, t]
            regulariser[i] = regulariser[i] - kl_divergence(
                posterior, Normal(torch.zeros_like(mu[i, t]), torch.ones_like(mu[i, t]))
            )
            if t + 1 < q.shape[1] and mask[i, t + 1]:
                regulariser[i] = regulariser[i] + lam * posterior.log_prob(q[i, t] - gamma * q[i, t + 1])
    return torch.stack(likelihood), torch.stack(regulariser)


def test_as_printed_leaves_out_the_last_position():
    """Its likelihood and KL; the TD before it stays, with the reward head's last value of a pair."""
    q, mu, log_sigma = response()
    last = torch.tensor([4, 4, 2, 0])  # of each row of MASK; the last row has none
    kl = (((2 * log_sigma).exp() + mu.square() - 1) / 2 - log_sigma)[range(4), last]
    term = (OPTIONS["beta"] * q[range(4), last] - kl).where(MASK.any(1), 0.0)
    got = ava_d_loss(q, mu, log_sigma, MASK, **OPTIONS, as_printed=True)
    torch.testing.assert_close(got, ava_d_loss(q, mu, log_sigma, MASK, **OPTIONS) + term)
    other = [values.flip(0) for values in response(1)]
    arguments = [
        values for pair in zip((q, mu, log_sigma, MASK), (*other, MASK.flip(0)), strict=True) for values in pair
    ]
    change = ava_p_loss(*arguments, **OPTIONS, as_printed=True) - ava_p_loss(*arguments, **OPTIONS)
    lost = [
        ava_d_loss(*values, mask, **options, as_printed=True) - ava_d_loss(*values, mask, **options)
        for values, mask, options in (
            ((q, mu, log_sigma), MASK, OPTIONS), (other, MASK.flip(0), {**OPTIONS, "beta": 0.0}),
        )
    ]  # fmt: skip
    rejected = OPTIONS["beta"] * other[0][range(4), last.flip(0)].where(MASK.flip(0).any(1), 0.0)
    torch.testing.assert_close(change, lost[0] + lost[1] - rejected)
    assert torch.autograd.gradcheck(lambda *a: ava_d_loss(*a, MASK, **OPTIONS, as_printed=True), leaves())


def test_by_hand():
    # Q -1, -2; mu 1, 0; sigma 1, 2. delta_1 = -1 + 2 gamma = 0; KL 1/2 and 3/2 - ln 2; TD -1/2 - ln(2 pi)/2
    q, mu = torch.tensor([[-1.0, -2.0]], dtype=FP64), torch.tensor([[1.0, 0.0]], dtype=FP64)
    log_sigma = torch.tensor([[1.0, 2.0]], dtype=FP64).log()
    whole = torch.ones(1, 2, dtype=torch.bool)
    kl, td = 0.5 + 1.5 - math.log(2), -0.5 - math.log(2 * math.pi) / 2
    got = ava_d_loss(q, mu, log_sigma, whole, beta=2.0, gamma=0.5, lam=3.0)
    assert got.item() == pytest.approx(-(2 * -3 - kl + 3 * td), rel=1e-12)
    printed = ava_d_loss(q, mu, log_sigma, whole, beta=2.0, gamma=0.5, lam=3.0, as_printed=True)
    assert printed.item() == pytest.approx(-(2 * -1 - 0.5 + 3 * td), rel=1e-12)
    # against a rejected response of one token: Q -4, mu -1, sigma 1, KL 1/2; the last mu are 0 and -1
    one = torch.ones(1, 1, dtype=FP64)
    pair = ava_p_loss(q, -4 * one, mu, -one, log_sigma, 0 * one, whole, one.bool(), beta=2.0, gamma=0.5, lam=3.0)
    contrast = 1 / (1 + math.exp(-1))
    assert pair.item() == pytest.approx(-(2 * (-3 + 4) - kl + 3 * td - 0.5 + contrast), rel=1e-12)


def test_equals_the_naive_sum():
    inputs = response()
    likelihood, regulariser = naive_terms(*inputs, MASK, **OPTIONS)
    torch.testing.assert_close(ava_d_loss(*inputs, MASK, **OPTIONS), -(likelihood + regulariser))


@pytest.mark.parametrize("regularise", ["both", "chosen", "rejected"])
def test_pairs_equal_the_naive_sum(regularise):
    chosen, rejected = response(), response(1)
    rejected_mask = MASK.roll(1, 0)
    (lw, rw), (ll, rl) = naive_terms(*chosen, MASK, **OPTIONS), naive_terms(*rejected, rejected_mask, **OPTIONS)
    zero = torch.zeros(4, dtype=FP64)
    last = [
        torch.stack([mu[i][m[i]][-1] if m[i].any() else zero[0] for i in range(4)])
        for mu, m in ((chosen[1], MASK), (rejected[1], rejected_mask))
    ]
    expected = lw - ll + 0.3 * (last[0] - last[1]).sigmoid()
    expected = expected + (rw if regularise != "rejected" else 0) + (rl if regularise != "chosen" else 0)
    both = [t for pair in zip(chosen, rejected, strict=True) for t in pair]
    got = ava_p_loss(*both, MASK, rejected_mask, contrast=0.3, regularise=regularise, **OPTIONS)
    torch.testing.assert_close(got, -expected)


def test_documented_gradients():
    q, mu, log_sigma = leaves()
    ava_d_loss(q, mu, log_sigma, MASK, **OPTIONS).sum().backward()
    beta, gamma, lam = OPTIONS.values()
    with torch.no_grad():
        sigma = log_sigma.exp()
        for i, t in MASK.nonzero().tolist():

            def error(t, i=i):
                """e_t, 0 where a neighbour is missing."""
                if not (t >= 0 and t + 1 < 5 and MASK[i, t] and MASK[i, t + 1]):
                    return 0.0
                return (-(q[i, t] - gamma * q[i, t + 1] - mu[i, t]) / sigma[i, t] ** 2).item()

            e, s = error(t), sigma[i, t].item()
            dsigma = -(s - 1 / s) + (lam * (-1 / s + e**2 * s) if e else 0.0)  # (delta - mu)^2 / sigma^3 = e^2 sigma
            assert -q.grad[i, t].item() == pytest.approx(beta + lam * e - gamma * lam * error(t - 1))
            assert -mu.grad[i, t].item() == pytest.approx(-mu[i, t].item() - lam * e)
            assert -log_sigma.grad[i, t].item() == pytest.approx(dsigma * s)
    for leaf in (q, mu, log_sigma):
        assert leaf.grad[~MASK].count_nonzero() == 0


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *a: ava_d_loss(*a, MASK, **OPTIONS), leaves())
    both = [t for pair in zip(leaves(), leaves(1), strict=True) for t in pair]
    assert torch.autograd.gradcheck(lambda *a: ava_p_loss(*a, MASK, MASK.roll(1, 0), **OPTIONS), both)


def test_pass_class():
    """C: the slope of a token depends on its neighbours' log-probs, not on its own alone, and on no other sequence's."""
    assert LOSSES["ava_d"].pass_class == LOSSES["ava_p"].pass_class == "C"
    q, mu, log_sigma = leaves()

    def slope(q):
        return torch.autograd.grad(ava_d_loss(q, mu, log_sigma, MASK, **OPTIONS).sum(), q, create_graph=True)[0]

    hessian = torch.autograd.functional.jacobian(slope, q)
    assert hessian[0, 2, 0, 1] != 0
    assert hessian[0, 2, 0, 3] != 0
    assert hessian[0, 1, 0, 3] == 0
    assert hessian[0, :, 1:].count_nonzero() == 0


def test_identities():
    q, mu, log_sigma = response()
    # without regularisation: maximum likelihood, and its difference for pairs
    kept = q.where(MASK, 0.0).sum(1)
    prior = torch.zeros_like(mu), torch.zeros_like(mu)
    torch.testing.assert_close(ava_d_loss(q, *prior, MASK, lam=0.0, beta=2.0), -2 * kept)
    same = ava_p_loss(q, q, mu, mu, log_sigma, log_sigma, MASK, MASK, **OPTIONS)
    twice = ava_d_loss(q, mu, log_sigma, MASK, beta=0.0, gamma=0.9, lam=0.4)
    torch.testing.assert_close(same, 2 * twice - 0.5)
    # what does not count changes nothing, NaN included
    broken = [t.where(MASK, torch.nan).requires_grad_() for t in (q, mu, log_sigma)]
    loss = ava_d_loss(*broken, MASK, **OPTIONS)
    torch.testing.assert_close(loss, ava_d_loss(q, mu, log_sigma, MASK, **OPTIONS))
    loss.sum().backward()
    assert all(t.grad.isfinite().all() for t in broken)


def test_limits():
    q, _, _ = response()
    # the posterior that maximises F at lam -> infinity is the TD error itself, with sigma -> |delta - mu|
    mu = torch.zeros_like(q)
    mu[:, :-1] = q[:, :-1] - q[:, 1:]
    mu.requires_grad_()
    big = ava_d_loss(q, mu, torch.zeros_like(q), MASK, lam=1e6)
    big.sum().backward()
    both = MASK[:, 1:] & MASK[:, :-1]
    assert (mu.grad[:, :-1][both] / 1e6).abs().max() < 1e-5
    # nothing counts: no loss
    assert ava_d_loss(*response(), MASK, **OPTIONS)[3] == 0
    # and a row of one token has no temporal term
    one = ava_d_loss(*response(), MASK, **OPTIONS)[2]
    assert one == ava_d_loss(*response(), MASK, **{**OPTIONS, "lam": 9.0})[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_in_fp32(dtype):
    inputs = response(dtype=dtype)
    got = ava_d_loss(*inputs, MASK, **OPTIONS)
    assert got.dtype == torch.float32
    assert_result(got, ava_d_loss(*(t.double() for t in inputs), MASK, **OPTIONS))


def test_logits_reading_through_the_head():
    """Q at alpha is the log-prob at temperature 1 / alpha: log softmax(alpha z)[y]."""
    hidden, weight, labels, _ = Case("", dtype=FP64).inputs()
    alpha, kept = 2.5, labels != -100
    expected = (alpha * logits_ref(hidden, weight)).log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    q = linear_logprob(hidden, weight, labels, temperature=1 / alpha)
    torch.testing.assert_close(q[kept], expected[kept])
    mask, q, expected = kept.view(7, 9), q.view(7, 9), expected.where(kept, 0.0).view(7, 9)
    mu, log_sigma = (torch.randn(7, 9, generator=torch.Generator().manual_seed(s), dtype=FP64) / 2 for s in (1, 2))
    got = torch.autograd.grad(ava_d_loss(q, mu, log_sigma, mask, **OPTIONS).sum(), (hidden, weight))
    want = torch.autograd.grad(ava_d_loss(expected, mu, log_sigma, mask, **OPTIONS).sum(), (hidden, weight))
    for g, w in zip(got, want, strict=True):
        assert_gradient(g, w, w)


def test_literal_q():
    z = torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(0), dtype=FP64).requires_grad_()
    labels = torch.arange(12).view(3, 4) % 11
    p = z.softmax(-1)
    expected = (5 * p).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    logp = z.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    got = literal_q(logp, (5 * p).logsumexp(-1), alpha=5)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), z, retain_graph=True), torch.autograd.grad(expected.sum(), z)
    )
    # nearly constant at alpha 1: the reason why the reading matters
    assert literal_q(logp, p.logsumexp(-1), alpha=1.0).std() < 0.1 < logp.std()


def test_reward_losses():
    chosen = torch.tensor([math.log(3), 0.0, -1.0, 2.0], dtype=FP64).requires_grad_()
    rejected = torch.tensor([0.0, 0.0, 1.0, -1e5], dtype=FP64).requires_grad_()
    loss = bradley_terry_loss(chosen, rejected)
    assert loss.tolist() == pytest.approx([math.log(4 / 3), math.log(2), math.log1p(math.exp(2)), 0.0])
    assert torch.autograd.gradcheck(
        bradley_terry_loss, (chosen[:3].detach().requires_grad_(), rejected[:3].detach().requires_grad_())
    )
    assert pair_accuracy(chosen, rejected).item() == (1 + 0.5 + 0 + 1) / 4
    assert not pair_accuracy(chosen, rejected).requires_grad
    swapped = bradley_terry_loss(rejected, chosen)
    torch.testing.assert_close((-loss).exp() + (-swapped).exp(), torch.ones(4, dtype=FP64))


Z = torch.zeros(2, 3)
M = torch.ones(2, 3, dtype=torch.bool)
P = (Z, Z, Z, Z, Z, Z, M, M)
REFUSED = {
    "beta": (ValueError, "beta must be finite and >= 0, got -1", lambda: ava_d_loss(Z, Z, Z, M, beta=-1.0)),
    "gamma": (ValueError, r"gamma must be in \[0, 1\], got 1.5", lambda: ava_d_loss(Z, Z, Z, M, gamma=1.5)),
    "lam": (ValueError, "lam must be finite and >= 0, got inf", lambda: ava_p_loss(*P, lam=math.inf)),
    "contrast": (ValueError, "contrast must be", lambda: ava_p_loss(*P, contrast=-0.1)),
    "regularise": (ValueError, "regularise must be one of 'both', 'chosen', 'rejected', got 'none'", lambda: ava_p_loss(*P, regularise="none")),
    "alpha": (ValueError, "alpha must be finite and > 0", lambda: literal_q(Z, Z, alpha=0.0)),
    "sums": (ValueError, r"token_logp must be \(B, T\), got \(3,\)", lambda: ava_d_loss(Z[0], Z[0], Z[0], M[0])),
    "mu a sequence": (ValueError, r"mu must be \(B, T\) = \(2, 3\) like token_logp, got \(2, 1\)", lambda: ava_d_loss(Z, Z[:, :1], Z, M)),
    "labels": (TypeError, "mask must be a bool tensor.*labels != ignore_index", lambda: ava_d_loss(Z, Z, Z, M.long())),
    "rejected": (TypeError, "rejected_mu must be a floating-point tensor", lambda: ava_p_loss(Z, Z, Z, Z.long(), Z, Z, M, M)),
    "pairs": (ValueError, "rejected_token_logp must hold 2 rows", lambda: ava_p_loss(Z, Z[:1], Z, Z[:1], Z, Z[:1], M, M[:1])),
    "rewards": (ValueError, r"rejected_mu must be \(3,\)", lambda: bradley_terry_loss(Z[0], Z[0, :2])),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    error, message, call = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
