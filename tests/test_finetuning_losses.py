"""SFT by weights of the policy's own: numbers by hand, identities, limits, one pass with the entropy of the head."""

import math

import pytest
import torch

from tests.tolerance import assert_gradient, assert_result
from var_kernels import linear_loss
from var_kernels.losses import (
    alol_seq_loss,
    chord_phi_loss,
    cispo_loss,
    dft_loss,
    eaft_loss,
    iw_sft_loss,
    iw_sft_token_loss,
    linear_asft_loss,
    ppo_loss,
    psft_loss,
    sft_loss,
)
from var_kernels.reference import linear_logprob_ref

FP64 = torch.float64
LN2 = math.log(2)


def tensor(*values):
    return torch.tensor(values, dtype=FP64)


BY_HAND = {
    # mean log-ratios of ln 2 and 3 ln 2 (8, held at 4)
    "iw_sft": (
        iw_sft_loss(tensor(-4, -9), tensor(-4 - 2 * LN2, -9 - 3 * LN2), torch.tensor([2, 1]), max_weight=4.0),
        [8.0, 36.0],
    ),
    "iw_sft_token": (iw_sft_token_loss(tensor(-1, -1, -1), tensor(-1 - LN2, -1, 2.0)), [1.8, 1.0, 0.2]),
    "psft": (psft_loss(tensor(LN2, -LN2), tensor(0, 0)), [-1.2, -0.5]),
    "eaft": (eaft_loss(tensor(-2, -2, -2), tensor(3, 1.5, 0), alpha=2.0), [2.0, 0.5, 0.0]),
    "chord_phi": (chord_phi_loss(tensor(-LN2, -math.log(4), 0)), [LN2 / 4, 3 * math.log(4) / 16, 0.0]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    got, expected = BY_HAND[name]
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


LOGP = tensor(-0.3, -1.0, -2.5, -4.0, -0.7)
REF = LOGP + tensor(-0.4, 0.4, 2.0, -0.2, 0.0)
ONES, LENGTHS = torch.ones(5, dtype=FP64), torch.tensor([3, 1, 2, 4, 7])


def test_identities():
    # at the reference the importance is 1, and all are SFT
    torch.testing.assert_close(iw_sft_loss(LOGP, LOGP, LENGTHS), sft_loss(LOGP))
    torch.testing.assert_close(iw_sft_token_loss(LOGP, LOGP), -LOGP)
    leaf = LOGP.clone().requires_grad_()
    assert torch.autograd.grad(psft_loss(leaf, LOGP).sum(), leaf)[0].tolist() == [-1.0] * 5
    # other losses at an advantage of 1
    torch.testing.assert_close(psft_loss(LOGP, REF), ppo_loss(LOGP, REF, ONES))
    torch.testing.assert_close(iw_sft_token_loss(LOGP, REF), alol_seq_loss(LOGP, REF, ONES, clip_range=0.8))
    token = {"ratio_min": 0.3, "ratio_max": 1.1}
    torch.testing.assert_close(iw_sft_token_loss(LOGP, REF, **token), cispo_loss(LOGP, REF, ONES, **token))
    # phi is DFT less what the policy knows already
    torch.testing.assert_close(chord_phi_loss(LOGP), dft_loss(LOGP) * (1 - LOGP.exp()))
    torch.testing.assert_close(eaft_loss(LOGP, 3 * ONES), -LOGP)


def test_limits():
    torch.testing.assert_close(iw_sft_loss(LOGP, REF, LENGTHS, temperature=0.0), sft_loss(LOGP))
    torch.testing.assert_close(iw_sft_loss(LOGP, REF - 1e4, LENGTHS), 16 * sft_loss(LOGP))
    assert iw_sft_loss(LOGP - 1e5, REF, LENGTHS).abs().max() == 0
    torch.testing.assert_close(eaft_loss(LOGP, REF.abs(), alpha=0.0), -LOGP)
    torch.testing.assert_close(psft_loss(LOGP, REF, clip_high=1e9), -(LOGP - REF).exp())
    leaf = LOGP.clone().requires_grad_()
    far = psft_loss(leaf, LOGP - 1.0)  # beyond the clip
    assert torch.autograd.grad(far.sum(), leaf)[0].abs().max() == 0


def test_weights_are_constants():
    for loss in (chord_phi_loss, lambda lp: iw_sft_token_loss(lp, REF), lambda lp: iw_sft_loss(lp, REF, LENGTHS)):
        leaf = LOGP.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf).sum(), leaf)
        torch.testing.assert_close(slope, loss(LOGP) / LOGP)
    leaf, entropy = LOGP.clone().requires_grad_(), REF.abs().requires_grad_()
    eaft_loss(leaf, entropy).sum().backward()
    assert entropy.grad is None
    torch.testing.assert_close(leaf.grad, -entropy.detach() / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_entropy_comes_from_the_same_pass(dtype):
    """Against autograd over fp64 logits with the entropy held constant."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 24, generator=draw).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(131, 24, generator=draw)).to(dtype).requires_grad_()
    labels = torch.randint(0, 131, (3, 5), generator=draw)
    labels[:, 0] = -100
    loss = linear_loss("eaft", hidden, weight, labels, alpha=1.5, engine="one_pass")
    got = torch.autograd.grad(loss, (hidden, weight))

    def naive(precision):
        leaves = [t.detach().to(precision).requires_grad_() for t in (hidden, weight)]
        logp, entropy = linear_logprob_ref(*leaves, labels, dtype=precision, return_entropy=True)
        value = (-((entropy.detach() / 3) ** 1.5) * logp)[labels != -100].sum()
        return value, torch.autograd.grad(value, leaves)

    (truth, exact), (_, own) = naive(FP64), naive(dtype)
    assert_result(loss / 40, truth / 40, "loss")
    for g, t, o in zip(got, exact, own, strict=True):
        assert_gradient(g, t, o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_asft_is_dft_and_a_kl(dtype):
    """Against autograd over fp64 logits of both models; DFT at coefficient 0, and in its gradient at the reference."""
    draw = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(3, 5, 24, generator=draw).to(dtype) for _ in range(2))
    weight, ref_weight = (0.3 * torch.randn(131, 24, generator=draw).to(dtype) for _ in range(2))
    labels = torch.randint(0, 131, (3, 5), generator=draw)
    labels[:, 0] = -100
    share, kept = torch.rand(3, 5, generator=draw), labels != -100

    def naive(precision):
        leaves = [t.detach().to(precision).requires_grad_() for t in (hidden, weight)]
        logp, q = leaves[0] @ leaves[1].T, (ref_hidden.to(precision) @ ref_weight.to(precision).T).log_softmax(-1)
        logp = logp.log_softmax(-1)
        lp = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        kl = (q.exp() * (q - logp)).sum(-1)
        value = (share.to(precision) * (0.1 * kl - lp.detach().exp() * lp))[kept].sum()
        return value, torch.autograd.grad(value, leaves)

    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    loss = linear_asft_loss(*leaves, ref_hidden, ref_weight, labels, token_weight=share)
    (truth, exact), (_, own) = naive(FP64), naive(dtype)
    assert_result(loss, truth, "loss")
    for g, t, o in zip(torch.autograd.grad(loss, leaves), exact, own, strict=True):
        assert_gradient(g, t, o)
    dft = linear_loss("dft", *leaves, labels)
    torch.testing.assert_close(linear_asft_loss(*leaves, ref_hidden, ref_weight, labels, kl_coef=0.0), dft)
    own_reference = linear_asft_loss(*leaves, hidden, weight, labels, kl_coef=3.0)
    for got, want in zip(torch.autograd.grad(own_reference, leaves), torch.autograd.grad(dft, leaves), strict=True):
        assert_gradient(got, want.double(), want)
    with pytest.raises(ValueError, match="kl_coef must be finite and >= 0, got -1"):
        linear_asft_loss(*leaves, ref_hidden, ref_weight, labels, kl_coef=-1.0)


REFUSED = {
    "temperature": ("temperature must be finite and >= 0", lambda: iw_sft_loss(LOGP, REF, LENGTHS, temperature=-1.0)),
    "lengths": ("lengths must be", lambda: iw_sft_loss(LOGP, REF, None)),
    "bounds": ("ratio_max must be finite and >= 2", lambda: iw_sft_token_loss(LOGP, REF, ratio_min=2, ratio_max=1)),
    "clip": ("clip_high must be finite and >= 0", lambda: psft_loss(LOGP, REF, clip_high=-0.1)),
    "alpha": ("alpha must be finite and >= 0", lambda: eaft_loss(LOGP, REF, alpha=math.nan)),
    "max_entropy": ("max_entropy must be finite and > 0", lambda: eaft_loss(LOGP, REF, max_entropy=0.0)),
    "entropy": ("entropy must be", lambda: eaft_loss(LOGP, REF[:2])),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    message, call = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
