"""rebel_loss, qrpo_loss, dro_loss and its value: numbers to check by hand, identities, limits, refusals."""

import math

import pytest
import torch

from var_kernels.losses.pair import ipo_loss
from var_kernels.losses.regression import dro_loss, dro_value_loss, qrpo_loss, quantile_reward, rebel_loss


def vectors(count, p=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(p, dtype=torch.float64, generator=generator) for _ in range(count)]


def scalars(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def test_rebel_by_hand():
    # D = (-10 + 12) - (-20 + 18) = 4, rewards 3 and 1: (4 - 0.5 * 2)^2 = 9
    assert rebel_loss(*scalars(-10, -20, -12, -18, 3, 1), eta=0.5).item() == 9.0


def test_rebel_identities_and_limit():
    chosen, rejected, ref_chosen, ref_rejected, r1, r2 = vectors(6)
    got = rebel_loss(chosen, rejected, ref_chosen, ref_rejected, r1, r2, eta=0.5)
    # no winner and no loser, and a reward known up to a constant
    torch.testing.assert_close(rebel_loss(rejected, chosen, ref_rejected, ref_chosen, r2, r1, eta=0.5), got)
    torch.testing.assert_close(rebel_loss(chosen, rejected, ref_chosen, ref_rejected, r1 + 9, r2 + 9, eta=0.5), got)
    # IPO on sums is REBEL with a gap of 1 between the rewards and eta = 1 / (2 tau)
    one, zero = torch.ones_like(r1), torch.zeros_like(r1)
    torch.testing.assert_close(
        rebel_loss(chosen, rejected, ref_chosen, ref_rejected, one, zero, eta=1 / (2 * 0.4)),
        ipo_loss(chosen, rejected, ref_chosen, ref_rejected, tau=0.4, token_reduction="sum"),
    )
    # rewards without weight: stay at the reference
    still = rebel_loss(chosen, rejected, ref_chosen, ref_rejected, r1, r2, eta=1e-12)
    torch.testing.assert_close(still, (chosen - ref_chosen - rejected + ref_rejected).square())


def test_qrpo_by_hand():
    # beta 1: Z = e - 1; (0.75 - log(e - 1) - 1 * (-10 + 11))^2
    policy, ref, quantile = scalars(-10, -11, 0.75)
    want = (0.75 - math.log(math.e - 1) - 1) ** 2
    assert qrpo_loss(policy, ref, quantile, beta=1.0).item() == pytest.approx(want)
    assert qrpo_loss(policy, ref, quantile, beta=0.5, log_z=0.25).item() == pytest.approx((0.75 - 0.125 - 0.5) ** 2)


def test_qrpo_identities_and_limits():
    policy, ref, _ = vectors(3)
    quantile = torch.linspace(0, 1, 7, dtype=torch.float64)
    # Z by quadrature: the mean of exp(q / beta) over uniform q
    for beta in (0.2, 1.0, 5.0):
        grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        log_z = (grid / beta).exp().mean().log().item()
        torch.testing.assert_close(
            qrpo_loss(policy, ref, quantile, beta=beta), qrpo_loss(policy, ref, quantile, beta=beta, log_z=log_z)
        )
    # small beta: beta log Z -> 1 + beta log beta, the authors' simplification, and no overflow of exp(1 / beta)
    torch.testing.assert_close(
        qrpo_loss(policy, ref, quantile, beta=1e-4),
        (quantile - 1e-4 * math.log(1e-4) - 1 - 1e-4 * (policy - ref)).square(),
    )
    # large beta: beta log Z -> 1/2 + 1 / (24 beta)
    one = torch.ones(1, dtype=torch.float64)
    assert qrpo_loss(one, one, 0 * one, beta=1e6).item() == pytest.approx((0.5 + 1 / 24e6) ** 2, abs=1e-8)
    # and what is left is the log-ratio
    torch.testing.assert_close(
        qrpo_loss(policy, ref, quantile, beta=1e8) / 1e16, (policy - ref).square(), atol=1e-6, rtol=0
    )


def test_quantile_reward_by_hand():
    ref_rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    got = quantile_reward(torch.tensor([2.5, 1.0, 0.0]), ref_rewards)
    assert got.tolist() == [0.5, 0.75, 0.0]
    assert quantile_reward(torch.tensor([9.0, 9.0, 9.0]), ref_rewards).tolist() == [1.0] * 3


def test_dro_by_hand():
    # r - V - tau rho = 2 - 0.5 - 0.5 * 1 = 1
    policy, ref, reward, value = scalars(-10, -11, 2, 0.5)
    policy.requires_grad_()
    value.requires_grad_()
    loss = dro_loss(policy, ref, reward, value, tau=0.5)
    assert loss.item() == 1.0  # 1 / (2 * 0.5)
    loss.backward()
    assert policy.grad.item() == -1.0  # -(r - V - tau rho)
    assert value.grad is None
    value_loss = dro_value_loss(value, policy, ref, reward, tau=0.5)
    assert value_loss.item() == 0.5
    policy.grad = None
    value_loss.backward()
    assert value.grad.item() == -1.0
    assert policy.grad is None


def test_dro_identities_and_limits():
    policy, ref, reward, value = vectors(4)
    torch.testing.assert_close(
        dro_loss(policy, ref, reward, value, tau=0.3) * 0.3, dro_value_loss(value, policy, ref, reward, tau=0.3)
    )
    # only r - V counts
    shifted = dro_loss(policy, ref, reward + 2, value + 2, tau=0.3)
    torch.testing.assert_close(shifted, dro_loss(policy, ref, reward, value, tau=0.3))
    # QRPO is DRO-V with the value that quantile rewards have: twice the squared residual
    q = torch.linspace(0, 1, 7, dtype=torch.float64)
    known = torch.full_like(q, 0.3 * math.log(0.3 * (math.exp(1 / 0.3) - 1)))
    torch.testing.assert_close(qrpo_loss(policy, ref, q, beta=0.3), 2 * dro_value_loss(known, policy, ref, q, tau=0.3))
    # small tau: the policy's gradient is REINFORCE with a baseline
    policy.requires_grad_()
    (gradient,) = torch.autograd.grad(dro_loss(policy, ref, reward, value, tau=1e-10).sum(), policy)
    torch.testing.assert_close(gradient, -(reward - value))


def test_dro_value_loss_by_finite_differences():
    policy, ref, reward, value = vectors(4)
    value.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: dro_value_loss(v, policy, ref, reward, tau=0.3), (value,))


ZERO, NAN = torch.zeros(3), torch.tensor([0.0, 1.0, math.nan])
REFUSED = {
    "eta": (lambda: rebel_loss(*[ZERO] * 6, eta=0.0), ValueError, "eta must be finite and > 0"),
    "rebel reward": (lambda: rebel_loss(*[ZERO] * 4, NAN, ZERO, eta=1.0), ValueError, "chosen_reward must be finite"),
    "reward shape": (
        lambda: rebel_loss(*[ZERO] * 5, torch.zeros(()), eta=1.0),
        ValueError,
        r"rejected_reward must be \(3,\)",
    ),
    "qrpo beta": (lambda: qrpo_loss(ZERO, ZERO, ZERO, beta=-1.0), ValueError, "beta must be finite and > 0"),
    "log_z": (lambda: qrpo_loss(ZERO, ZERO, ZERO, beta=1.0, log_z=math.inf), ValueError, "log_z must be finite"),
    "log_z a tensor": (
        lambda: qrpo_loss(ZERO, ZERO, ZERO, beta=1.0, log_z=ZERO),
        TypeError,
        "log_z must be a Python number, got Tensor",
    ),
    "tau": (lambda: dro_loss(ZERO, ZERO, ZERO, ZERO, tau=0.0), ValueError, "tau must be finite and > 0"),
    "value": (lambda: dro_loss(ZERO, ZERO, ZERO, NAN, tau=1.0), ValueError, r"value must be finite, got nan .*\(2,\)"),
    "value per token": (
        lambda: dro_value_loss(torch.zeros(3, 4), ZERO, ZERO, ZERO, tau=1.0),
        ValueError,
        r"value must be \(3,\) like policy_logp, got \(3, 4\)",
    ),
    "no reference": (lambda: quantile_reward(ZERO, torch.zeros(3, 0)), ValueError, "at least one completion"),
    "NaN among draws": (
        lambda: quantile_reward(ZERO, torch.full((3, 2), torch.nan)),
        ValueError,
        "ref_rewards must be finite, got nan",
    ),
    "NaN to rank": (lambda: quantile_reward(ZERO / 0, torch.zeros(3, 2)), ValueError, "reward must be finite, got nan"),
    "flat reference": (lambda: quantile_reward(ZERO, ZERO), ValueError, r"ref_rewards must be \(B, M\) with B = 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
