"""dpo_loss, implicit_reward and sft_loss: numbers to check by hand, the naive twin, identities, limits, refusals."""

import math

import pytest
import torch

from var_kernels import dpo_loss, sft_loss
from var_kernels.losses import implicit_reward
from var_kernels.reference import dpo_loss_ref

FP32 = 2**-17


def log_probs(p=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(-300 + 3 * torch.randn(p, dtype=torch.float64, generator=generator)).to(dtype) for _ in range(4)]


def test_dpo_by_hand():
    # margin beta ((-10 + 12) - (-20 + 18)) = 0.5 * 4 = 2
    inputs = [torch.tensor([value], dtype=torch.float64) for value in (-10.0, -20.0, -12.0, -18.0)]
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


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_gradients(label_smoothing):
    inputs = [value.requires_grad_() for value in log_probs(p=5)]
    chosen, rejected, ref_chosen, ref_rejected = inputs

    def loss(chosen, rejected):
        return dpo_loss(
            chosen, rejected, ref_chosen, ref_rejected, beta=0.3, label_smoothing=label_smoothing
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (chosen, rejected))
    loss(chosen, rejected).sum().backward()
    assert ref_chosen.grad is None  # frozen even when handed over with a graph
    assert ref_rejected.grad is None
    # opposite and equal: only the margin counts
    torch.testing.assert_close(chosen.grad, -rejected.grad)
    if label_smoothing == 0:
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


def test_sft_by_hand_and_gradient():
    logp = torch.tensor([-6.0, -1.0], requires_grad=True)
    lengths = torch.tensor([3, 2])
    assert sft_loss(logp).tolist() == [6.0, 1.0]
    assert sft_loss(logp, lengths, token_reduction="mean").tolist() == [2.0, 0.5]
    sft_loss(logp, lengths, token_reduction="mean").sum().backward()
    assert logp.grad.tolist() == pytest.approx([-1 / 3, -1 / 2])
    assert sft_loss(logp.detach().bfloat16()).dtype == torch.float32


def test_sft_limits():
    logp = torch.tensor([0.0, -5.0])
    assert sft_loss(logp).tolist() == [0.0, 5.0]  # certain of its data: nothing to learn
    assert sft_loss(logp, torch.tensor([0, 1]), token_reduction="mean").tolist() == [0.0, 5.0]  # no token: no division


ZERO = torch.zeros(3)
REFUSED = {
    "beta 0": (ValueError, "beta must be finite and > 0", [ZERO] * 4, {"beta": 0.0}),
    "beta NaN": (ValueError, "beta must be finite", [ZERO] * 4, {"beta": float("nan")}),
    "smoothing": (ValueError, r"label_smoothing must be in \[0, 0.5\)", [ZERO] * 4, {"label_smoothing": 0.6}),
    "per token": (ValueError, "sequence_sum", [torch.zeros(3, 4)] * 4, {}),
    "one short": (ValueError, "ref_rejected_logp must be", [ZERO] * 3 + [ZERO[:2]], {}),
    "integers": (TypeError, "policy_rejected_logp must be a floating", [ZERO, ZERO.long(), ZERO, ZERO], {}),
    "a list": (TypeError, "ref_chosen_logp must be .* got list", [ZERO, ZERO, [0.0] * 3, ZERO], {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_dpo_refusals(case):
    error, message, inputs, options = REFUSED[case]
    with pytest.raises(error, match=message):
        dpo_loss(*inputs, **{"beta": 0.1, **options})


def test_sft_refusals():
    with pytest.raises(ValueError, match="token_reduction must be"):
        sft_loss(ZERO, token_reduction="batchmean")
    with pytest.raises(ValueError, match="lengths must be"):
        sft_loss(ZERO, token_reduction="mean")
