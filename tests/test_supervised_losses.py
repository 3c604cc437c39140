"""sft_loss, awr_loss and the standardised advantage: numbers to check by hand, limits, refusals, two ranks."""

import math

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from var_kernels.losses.advantages import standardised_advantage
from var_kernels.losses.supervised import awr_loss, sft_loss

ZERO = torch.zeros(3)


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


def test_sft_refusals():
    with pytest.raises(ValueError, match="token_reduction must be"):
        sft_loss(ZERO, token_reduction="batchmean")
    with pytest.raises(ValueError, match="lengths must be"):
        sft_loss(ZERO, token_reduction="mean")
    with pytest.raises(ValueError, match="sequence_sum"):
        sft_loss(torch.zeros(3, 4))


def test_awr_by_hand():
    logp = torch.tensor([-6.0, -1.0, -2.0], requires_grad=True)
    # exp(A / 0.5): exp(0) = 1, exp(2) = 7.389, exp(8) = 2981 -> 20
    loss = awr_loss(logp, torch.tensor([0.0, 1.0, 4.0]), beta=0.5)
    assert loss.tolist() == pytest.approx([6.0, math.exp(2), 40.0])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-1.0, -math.exp(2), -20.0])


def test_awr_identity_and_limits():
    logp, advantage = torch.tensor([-6.0, -1.0, -2.0]), torch.tensor([-3.0, 0.5, 2.0])
    # a constant in A is a factor of the loss, away from the clip
    shifted = awr_loss(logp, advantage + 0.25, beta=1.0, max_weight=1e6)
    torch.testing.assert_close(shifted, math.exp(0.25) * awr_loss(logp, advantage, beta=1.0, max_weight=1e6))
    # a high temperature is SFT; no overflow however low it is
    torch.testing.assert_close(awr_loss(logp, advantage, beta=1e9), sft_loss(logp))
    assert awr_loss(logp, 1e4 * advantage, beta=1e-3).tolist() == pytest.approx([0.0, 20.0, 40.0])


def test_awr_refusals():
    with pytest.raises(ValueError, match="beta must be finite and > 0"):
        awr_loss(ZERO, ZERO, beta=0.0)
    with pytest.raises(ValueError, match="max_weight must be finite and > 0"):
        awr_loss(ZERO, ZERO, beta=1.0, max_weight=0)
    with pytest.raises(ValueError, match="advantage must be finite, got inf"):
        awr_loss(ZERO, ZERO + math.inf, beta=1.0)
    with pytest.raises(ValueError, match=r"advantage must be \(3,\) like policy_logp"):
        awr_loss(ZERO, torch.zeros(1), beta=1.0)


def test_standardised_advantage_copies_no_number_to_the_device(monkeypatch):
    """Where it would be waited for."""
    monkeypatch.setattr(torch.Tensor, "new_tensor", None)
    assert standardised_advantage(REWARD).shape == REWARD.shape


def test_standardised_advantage_by_hand():
    # A = 1, 3: mean 2, population standard deviation 1
    got = standardised_advantage(torch.tensor([2.0, 5.0]), torch.tensor([1.0, 2.0]))
    assert got.tolist() == pytest.approx([-1.0, 1.0], rel=2e-5)
    assert standardised_advantage(torch.tensor([7.0, 7.0])).tolist() == [0.0, 0.0]  # all alike: no division by 0
    assert standardised_advantage(torch.zeros(0)).shape == (0,)


REWARD = torch.tensor([0.5, -2.0, 1.0, 4.0, 0.0], dtype=torch.float64)
SPLIT = (slice(0, 4), slice(4, 5))


def standardise(rank, world, folder):
    torch.save(standardised_advantage(REWARD[SPLIT[rank]], process_group=dist.group.WORLD), folder / f"{rank}.pt")


def test_standardised_advantage_spans_the_ranks(tmp_path):
    run_ranks(standardise, 2, tmp_path)
    got = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    torch.testing.assert_close(got, standardised_advantage(REWARD))
