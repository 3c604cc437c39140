"""Where the losses end, in exact arithmetic: a policy that is a table over all responses, every pair or completion in
the batch as often as its distribution says. KTO, SimPO, ORPO and SLiC have no such optimum to be checked against."""

import math

import pytest
import torch

from var_kernels.losses.group import exo_loss, lire_loss, raft_loss
from var_kernels.losses.listwise import gvpo_loss, info_nca_loss, nca_loss, target_po_loss
from var_kernels.losses.pair import dpo_loss, ipo_loss, robust_dpo_loss
from var_kernels.losses.regression import (
    astar_po_loss,
    dro_loss,
    dro_value_loss,
    qrpo_loss,
    quantile_reward,
    rebel_loss,
    soft_value,
)
from var_kernels.losses.supervised import awr_loss

R = 6  # responses
LAM = 0.6
WORLD = torch.Generator().manual_seed(5)
REF_LOGP = torch.randn(R, dtype=torch.float64, generator=WORLD).log_softmax(0)
REWARD = torch.randn(R, dtype=torch.float64, generator=WORLD)
PI_REF = REF_LOGP.exp()
WIN, LOSE = (index.flatten() for index in torch.meshgrid(torch.arange(R), torch.arange(R), indexing="ij"))
BRADLEY_TERRY = torch.sigmoid(REWARD[WIN] - REWARD[LOSE])
ONE_PROMPT = torch.zeros(R, dtype=torch.int64)


def tilted(reward, lam=LAM, prior=PI_REF):
    mass = prior * (reward / lam).exp()
    return mass / mass.sum()


PI_STAR = tilted(REWARD)
LOG_Z = (PI_REF * (REWARD / LAM).exp()).sum().log()
UNIFORM = torch.full((R,), -math.log(R), dtype=torch.float64)
MU = torch.rand(R, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(0)  # whoever drew them


def minimise(loss_of) -> torch.Tensor:
    """The policy, (R,), that minimises loss_of(logp)."""
    theta = torch.zeros(R, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(theta.log_softmax(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach().softmax(0)


def of_pairs(loss, logp, *rest, **options):
    return loss(logp[WIN], logp[LOSE], REF_LOGP[WIN], REF_LOGP[LOSE], *rest, **options)


def flip(probability, rate):
    return (1 - rate) * probability + rate * (1 - probability)


# loss of a policy and the policy that it ends at
OPTIMA = {
    "DPO, Bradley-Terry labels": (lambda logp: (BRADLEY_TERRY * of_pairs(dpo_loss, logp, beta=LAM)).sum(), PI_STAR),
    "robust DPO, labels flipped at the rate it is told": (
        lambda logp: (flip(BRADLEY_TERRY, 0.2) * of_pairs(robust_dpo_loss, logp, beta=LAM, label_smoothing=0.2)).sum(),
        PI_STAR,
    ),
    "IPO on sums: the win rate is the reward": (
        lambda logp: (BRADLEY_TERRY * of_pairs(ipo_loss, logp, tau=LAM, token_reduction="sum")).sum(),
        tilted(BRADLEY_TERRY.view(R, R).mean(1)),
    ),
    "REBEL, eta = 1 / lam": (
        lambda logp: of_pairs(rebel_loss, logp, REWARD[WIN], REWARD[LOSE], eta=1 / LAM).sum(),
        PI_STAR,
    ),
    "EXO, beta * reward_temperature = lam": (
        lambda logp: exo_loss(logp, REF_LOGP, REWARD, ONE_PROMPT, beta=0.4, reward_temperature=LAM / 0.4).sum(),
        PI_STAR,
    ),
    "QRPO with its Z": (
        lambda logp: qrpo_loss(
            logp, REF_LOGP, REWARD, beta=LAM, log_z=(PI_REF * (REWARD / LAM).exp()).sum().log().item()
        ).sum(),
        PI_STAR,
    ),
    "InfoNCA, beta * reward_temperature = lam": (
        lambda logp: info_nca_loss(logp, REF_LOGP, REWARD, ONE_PROMPT, beta=0.4, reward_temperature=LAM / 0.4).sum(),
        PI_STAR,
    ),
    "NCA on draws of a uniform reference, beta 1": (
        lambda logp: nca_loss(logp, UNIFORM, REWARD, ONE_PROMPT, beta=1.0, reward_temperature=LAM).sum(),
        tilted(REWARD, prior=UNIFORM.exp()),
    ),
    "GVPO": (lambda logp: gvpo_loss(logp, REF_LOGP, REWARD, ONE_PROMPT, beta=LAM).sum(), PI_STAR),
    "target PO, eta = lam / std r": (
        lambda logp: target_po_loss(logp, REF_LOGP, REWARD, ONE_PROMPT, eta=LAM / (REWARD.std().item() + 1e-4)).sum(),
        PI_STAR,
    ),
    "A*-PO with the reference's value": (
        lambda logp: (MU * astar_po_loss(logp, REF_LOGP, REWARD, LAM * LOG_Z.expand(R), beta=LAM)).sum(),
        PI_STAR,
    ),
    "A*-PO with the value of a uniform reference's draws": (
        lambda logp: astar_po_loss(
            logp, UNIFORM, REWARD, soft_value(REWARD, ONE_PROMPT, temperature=LAM), beta=LAM
        ).sum(),
        tilted(REWARD, prior=UNIFORM.exp()),
    ),
    "AWR on the reference's draws, below its clip": (
        lambda logp: (PI_REF * awr_loss(logp, REWARD, beta=LAM, max_weight=1e9)).sum(),
        PI_STAR,
    ),
}


@pytest.mark.parametrize("case", OPTIMA)
def test_optimum(case):
    loss_of, target = OPTIMA[case]
    assert 0.5 * (minimise(loss_of) - target).abs().sum() < 1e-4
    assert 0.5 * (PI_REF - target).abs().sum() > 0.05  # the reference itself would not do


WRONG = {
    "cDPO where labels are clean": lambda logp: (
        BRADLEY_TERRY * of_pairs(dpo_loss, logp, beta=LAM, label_smoothing=0.2)
    ).sum(),
    "DPO where labels are flipped": lambda logp: (flip(BRADLEY_TERRY, 0.2) * of_pairs(dpo_loss, logp, beta=LAM)).sum(),
    "IPO": lambda logp: (BRADLEY_TERRY * of_pairs(ipo_loss, logp, tau=LAM, token_reduction="sum")).sum(),
    "REBEL, eta = lam": lambda logp: of_pairs(rebel_loss, logp, REWARD[WIN], REWARD[LOSE], eta=LAM).sum(),
    "GVPO, beta = 1 / lam": lambda logp: gvpo_loss(logp, REF_LOGP, REWARD, ONE_PROMPT, beta=1 / LAM).sum(),
    "A*-PO with the mean reward for its value": lambda logp: (
        MU * astar_po_loss(logp, REF_LOGP, REWARD, (PI_REF * REWARD).sum().expand(R), beta=LAM)
    ).sum(),
    "NCA where the reference is not uniform": lambda logp: nca_loss(
        logp, REF_LOGP, REWARD, ONE_PROMPT, beta=1.0, reward_temperature=LAM
    ).sum(),
    "QRPO with Z of quantiles on raw rewards": lambda logp: qrpo_loss(logp, REF_LOGP, REWARD, beta=LAM).sum(),
    "AWR on every response once": lambda logp: awr_loss(logp, REWARD, beta=LAM, max_weight=1e9).sum(),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_targets_are_told_apart(case):
    assert 0.5 * (minimise(WRONG[case]) - PI_STAR).abs().sum() > 0.01  # 100 x what the optima are held to


def test_dro_ends_at_the_aligned_policy_and_its_value_at_tau_log_z():
    log_z = (PI_REF * (REWARD / LAM).exp()).sum().log()
    mu = torch.rand(R, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(0)  # whoever drew them
    theta = torch.zeros(R, dtype=torch.float64, requires_grad=True)
    value = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def gradients():
        logp = theta.log_softmax(0)
        policy_loss = (mu * dro_loss(logp, REF_LOGP, REWARD, value.expand(R), tau=LAM)).sum()
        value_loss = (mu * dro_value_loss(value.expand(R), logp, REF_LOGP, REWARD, tau=LAM)).sum()
        return torch.autograd.grad(policy_loss + value_loss, (theta, value))

    for _ in range(1500):
        dtheta, dvalue = gradients()
        with torch.no_grad():
            theta -= 2.0 * dtheta
            value -= 0.5 * dvalue
    assert 0.5 * (theta.detach().softmax(0) - PI_STAR).abs().sum() < 1e-4
    assert value.item() == pytest.approx(LAM * log_z.item(), abs=1e-4)
    # there, and not only near: both residuals are 0
    with torch.no_grad():
        theta.copy_(PI_STAR.log())
        value.fill_(LAM * log_z)
    assert max(gradient.abs().max().item() for gradient in gradients()) < 1e-14


def test_qrpo_needs_no_rewards_of_others_where_quantiles_are_uniform():
    # many equally likely responses: q is uniform on the reference's draws, and the closed-form Z is right
    many = 4000
    reward = torch.randn(many, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ref_logp = torch.full((many,), -math.log(many), dtype=torch.float64)
    quantile = quantile_reward(reward, reward.expand(many, many))
    target = tilted(quantile, LAM, ref_logp.exp())
    residual = qrpo_loss(target.log(), ref_logp, quantile, beta=LAM)
    assert residual.max() < 1e-6
    assert qrpo_loss(ref_logp, ref_logp, quantile, beta=LAM).max() > 0.1


def test_lire_and_raft_end_at_the_best_response():
    # no reference: nothing holds them back
    best = torch.nn.functional.one_hot(REWARD.argmax(), R).double()
    theta = torch.zeros(R, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        loss = lire_loss(theta.log_softmax(0), REWARD, ONE_PROMPT, temperature=1.0).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            theta -= 5.0 * gradient
    assert 0.5 * (theta.detach().softmax(0) - best).abs().sum() < 0.01
    assert 0.5 * (minimise(lambda logp: raft_loss(logp, REWARD, ONE_PROMPT).sum()) - best).abs().sum() < 0.01
