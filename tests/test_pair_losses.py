"""The pair losses with a reference, and implicit_reward: numbers to check by hand, the naive twin of DPO, identities,
limits, refusals. What holds for every loss alike is in test_loss_contract.py."""

import math

import pytest
import torch

from var_kernels.losses.pair import dpo_loss, hinge_loss, implicit_reward, ipo_loss, robust_dpo_loss
from var_kernels.reference import dpo_loss_ref

FP32 = 2**-17
LENGTHS = torch.tensor([3, 2])


def log_probs(p=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(-300 + 3 * torch.randn(p, dtype=torch.float64, generator=generator)).to(dtype) for _ in range(4)]


def by_hand():
    """D = (-10 + 12) - (-20 + 18) = 4."""
    return [torch.tensor([value], dtype=torch.float64) for value in (-10.0, -20.0, -12.0, -18.0)]


def test_dpo_by_hand():
    # margin beta ((-10 + 12) - (-20 + 18)) = 0.5 * 4 = 2
    inputs = by_hand()
    assert dpo_loss(*inputs, beta=0.5).item() == pytest.approx(math.log1p(math.exp(-2)))
    smoothed = 0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2))
    assert dpo_loss(*inputs, beta=0.5, label_smoothing=0.1).item() == pytest.approx(smoothed)
    assert implicit_reward(inputs[0], inputs[2], beta=0.5).item() == 1.0
    assert implicit_reward(inputs[1], inputs[3], beta=0.5).item() == -1.0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dpo_equal_to_the_naive_twin(dtype, label_smoothing):
    inputs = log_probs(dtype=dtype)
    inputs[0].requires_grad_()
    got = dpo_loss(*inputs, beta=0.3, label_smoothing=label_smoothing)
    want = dpo_loss_ref(*inputs, beta=0.3, label_smoothing=label_smoothing)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == (11,)
    assert (got - want).abs().max() <= FP32 * max(1.0, want.abs().max().item())


def test_dpo_gradient():
    chosen, rejected, ref_chosen, ref_rejected = (value.requires_grad_() for value in log_probs(p=5))
    dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3).sum().backward()
    # opposite and equal: only the margin counts
    torch.testing.assert_close(chosen.grad, -rejected.grad)
    margin = 0.3 * (chosen - rejected - ref_chosen + ref_rejected)
    torch.testing.assert_close(chosen.grad, (-0.3 * torch.sigmoid(-margin)).detach())


def test_dpo_identities():
    chosen, rejected, ref_chosen, ref_rejected = log_probs()
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    # a policy equal to its reference knows nothing yet
    torch.testing.assert_close(
        dpo_loss(ref_chosen, ref_rejected, ref_chosen, ref_rejected, beta=0.3),
        torch.full_like(chosen, math.log(2)),
    )
    # smoothing mixes the loss of the pair and of the swapped pair
    swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=0.3)
    smoothed = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, label_smoothing=0.2)
    torch.testing.assert_close(smoothed, 0.8 * loss + 0.2 * swapped)
    # and from the implicit rewards
    margin = implicit_reward(chosen, ref_chosen, beta=0.3) - implicit_reward(rejected, ref_rejected, beta=0.3)
    torch.testing.assert_close(loss, -margin.sigmoid().log())


def test_dpo_limits():
    zeros = torch.zeros(2)
    margin = torch.tensor([1e6, -1e6])
    loss = dpo_loss(margin, zeros, zeros, zeros, beta=1.0)
    assert loss.tolist() == [0.0, 1e6]  # linear, no overflow
    assert dpo_loss(margin, zeros, zeros, zeros, beta=1e-12).tolist() == pytest.approx([math.log(2)] * 2, rel=1e-5)


def test_robust_dpo_by_hand():
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    got = robust_dpo_loss(*by_hand(), beta=0.5, label_smoothing=0.1)
    assert got.item() == pytest.approx((0.9 * right - 0.1 * wrong) / 0.8)


def test_robust_dpo_is_dpo_in_the_mean_over_flipped_labels():
    chosen, rejected, ref_chosen, ref_rejected = log_probs()
    options = dict(beta=0.3, label_smoothing=0.2)
    kept = robust_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options)
    flipped = robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, **options)
    dpo = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    torch.testing.assert_close(0.8 * kept + 0.2 * flipped, dpo)


def test_robust_dpo_limits():
    inputs = log_probs()
    no_noise = robust_dpo_loss(*inputs, beta=0.3, label_smoothing=0.0)
    torch.testing.assert_close(no_noise, dpo_loss(*inputs, beta=0.3))
    # the slope of a satisfied pair: -e / (1 - 2e) = -1/3
    far = torch.tensor([1e4], requires_grad=True)
    robust_dpo_loss(far, *[torch.zeros(1)] * 3, beta=1.0, label_smoothing=0.2).sum().backward()
    assert far.grad.item() == pytest.approx(-1 / 3)


def test_ipo_by_hand():
    # sums: (4 - 1/(2 * 0.5))^2 = 9; means over 2 and 4 tokens: 2/2 + 2/4 = 1.5, (1.5 - 1)^2 = 0.25
    two, four = torch.tensor([2]), torch.tensor([4])
    assert ipo_loss(*by_hand(), tau=0.5, token_reduction="sum").item() == 9.0
    assert ipo_loss(*by_hand(), two, four, tau=0.5).item() == 0.25


def test_ipo_identity_and_limit():
    chosen, rejected, ref_chosen, ref_rejected = log_probs()
    margin = chosen - ref_chosen - rejected + ref_rejected
    # swapping the pair changes the square by 2 D / tau
    kept = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, tau=0.4, token_reduction="sum")
    swapped = ipo_loss(rejected, chosen, ref_rejected, ref_chosen, tau=0.4, token_reduction="sum")
    torch.testing.assert_close(swapped - kept, 2 * margin / 0.4)
    # sequences of one token have one reduction
    ones = torch.ones(11, dtype=torch.int64)
    torch.testing.assert_close(ipo_loss(chosen, rejected, ref_chosen, ref_rejected, ones, ones, tau=0.4), kept)
    # nothing to gain without an end of the scale: D -> 0
    no_target = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, tau=1e12, token_reduction="sum")
    torch.testing.assert_close(no_target, margin.square())


def test_ipo_of_a_sequence_without_tokens():
    zeros = torch.zeros(2)
    none = torch.tensor([0, 0])
    assert ipo_loss(zeros, zeros, zeros, zeros, none, none, tau=0.5).tolist() == [1.0, 1.0]  # no division by 0


def test_hinge_by_hand_and_limits():
    # D = 4: 1 - 0.1 * 4 = 0.6, and beyond the margin nothing
    assert hinge_loss(*by_hand(), beta=0.1).item() == pytest.approx(0.6)
    assert hinge_loss(*by_hand(), beta=0.5).item() == 0.0
    assert hinge_loss(*by_hand(), beta=1e-12).item() == pytest.approx(1.0)


def test_hinge_is_the_tangent_of_a_steep_logistic_loss():
    # log(1 + exp(k (1 - m))) / k -> relu(1 - m): DPO's loss with its margin moved by 1, k times as steep
    inputs = log_probs()
    k = 1e5
    margin = 0.3 * (inputs[0] - inputs[2] - inputs[1] + inputs[3])
    logistic = -torch.nn.functional.logsigmoid(k * (margin - 1)) / k
    torch.testing.assert_close(hinge_loss(*inputs, beta=0.3), logistic, atol=1e-5, rtol=0)


ZERO = torch.zeros(3)
NAN = torch.tensor([0.0, math.nan, 0.0])
REFUSED = {
    "beta 0": (ValueError, "beta must be finite and > 0", [ZERO] * 4, {"beta": 0.0}),
    "beta NaN": (ValueError, "beta must be finite", [ZERO] * 4, {"beta": float("nan")}),
    "beta a tensor": (TypeError, "beta must be a Python number, got Tensor", [ZERO] * 4, {"beta": torch.ones(())}),
    "smoothing": (ValueError, r"label_smoothing must be in \[0, 0.5\)", [ZERO] * 4, {"label_smoothing": 0.6}),
    "per token": (ValueError, "sequence_sum", [torch.zeros(3, 4)] * 4, {}),
    "one short": (ValueError, "ref_rejected_logp must be", [ZERO] * 3 + [ZERO[:2]], {}),
    "another device": (ValueError, "ref_chosen_logp must be on cpu", [ZERO, ZERO, ZERO.to("meta"), ZERO], {}),
    "integers": (TypeError, "policy_rejected_logp must be a floating", [ZERO, ZERO.long(), ZERO, ZERO], {}),
    "a list": (TypeError, "ref_chosen_logp must be .* got list", [ZERO, ZERO, [0.0] * 3, ZERO], {}),
    "a NaN": (ValueError, r"ref_chosen_logp must be finite, got nan at index \(1,\)", [ZERO, ZERO, NAN, ZERO], {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_dpo_refusals(case):
    error, message, inputs, options = REFUSED[case]
    with pytest.raises(error, match=message):
        dpo_loss(*inputs, **{"beta": 0.1, **options})


IPO_REFUSED = {
    "no lengths": (ValueError, "chosen_lengths must be .*token_reduction='mean', got None", (None, None), {}),
    "float lengths": (TypeError, "rejected_lengths must be an integer", (ZERO.long(), ZERO), {}),
    "lengths short": (ValueError, "chosen_lengths must be .3,. like policy_chosen", (LENGTHS, ZERO.long()), {}),
    "negative length": (ValueError, "chosen_lengths must be >= 0, got -1", (ZERO.long() - 1, ZERO.long()), {}),
    "reduction": (ValueError, "token_reduction must be one of", (None, None), {"token_reduction": "batchmean"}),
    "tau": (ValueError, "tau must be finite and > 0", (None, None), {"tau": -1.0}),
}


@pytest.mark.parametrize("case", IPO_REFUSED)
def test_ipo_refusals(case):
    error, message, lengths, options = IPO_REFUSED[case]
    with pytest.raises(error, match=message):
        ipo_loss(*[ZERO] * 4, *lengths, **{"tau": 0.1, **options})


def test_robust_dpo_and_hinge_refusals():
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\)"):
        robust_dpo_loss(*[ZERO] * 4, beta=0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="beta must be finite"):
        hinge_loss(*[ZERO] * 4, beta=math.inf)
