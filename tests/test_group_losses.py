"""exo_loss, lire_loss, raft_loss: numbers to check by hand, ragged groups, identities, limits, refusals."""

import math

import pytest
import torch

from var_kernels.losses.advantages import ADVANTAGES, advantages_by_name, group_advantage, leave_one_out_advantage
from var_kernels.losses.group import (
    best_of_group,
    exo_loss,
    group_log_softmax,
    lire_loss,
    raft_loss,
)
from var_kernels.losses.segments import group_rows
from var_kernels.losses.supervised import sft_loss
from var_kernels.losses.weights import var_weights
from var_kernels.measure import peak_extra_bytes

LOG2, LOG3 = math.log(2), math.log(3)
IDS = torch.tensor([7, 4, 7, 7, 4, 9])  # groups of 3, 2 and 1, interleaved
GROUPS = group_rows(IDS)


def rows(seed=0):
    """policy_logp, ref_logp, reward."""
    generator = torch.Generator().manual_seed(seed)
    policy, ref, reward = (torch.randn(6, dtype=torch.float64, generator=generator) for _ in range(3))
    return -20 + 3 * policy, -20 + 3 * ref, reward


def by_loop(score, ids=IDS):
    """log softmax within each group, one group at a time."""
    out = torch.empty_like(score)
    for group in ids.unique():
        out[ids == group] = score[ids == group].log_softmax(0)
    return out


def test_group_log_softmax_equals_a_loop_over_groups():
    score, _, _ = rows()
    torch.testing.assert_close(group_log_softmax(score, GROUPS), by_loop(score))
    assert group_log_softmax(score, GROUPS)[5] == 0


def test_group_log_softmax_of_large_fp32_scores_keeps_its_digits():
    near = torch.tensor([-1.0, 2.0, 0.0, -3.0, 1.0, 5.0])
    torch.testing.assert_close(
        group_log_softmax(near - 4096, GROUPS), group_log_softmax(near, GROUPS), atol=1e-6, rtol=0
    )


def test_group_log_softmax_of_rows_that_the_policy_forbids():
    score = torch.tensor([-torch.inf, 1.0, -torch.inf, 2.0, 1.0, -torch.inf], requires_grad=True)  # group 7: 0, 2, 3
    got = group_log_softmax(score, GROUPS)
    assert got.tolist() == [-torch.inf, pytest.approx(-LOG2), -torch.inf, 0.0, pytest.approx(-LOG2), 0.0]
    (gradient,) = torch.autograd.grad(got.exp().sum(), score)
    assert gradient.isfinite().all()


def test_sums_over_groups_are_their_own_derivative():
    groups, values = group_rows(IDS), torch.randn(6, dtype=torch.float64, requires_grad=True)
    want = torch.stack([values.detach()[own == IDS].sum() for own in IDS])
    torch.testing.assert_close(groups.sum(values).detach(), want)
    assert groups.max(values).tolist() == [values[own == IDS].max().item() for own in IDS]
    assert groups.count() == 3
    assert group_rows(IDS[:0]).count() == 0
    assert torch.autograd.gradcheck(groups.sum, values)
    assert torch.autograd.gradgradcheck(lambda x: groups.sum(x.exp()).log(), values)


def test_memory_is_that_of_the_rows_and_not_of_their_pairs():
    size = 4096
    s, r = torch.randn(2, size).unbind(0)
    s, ids = s.requires_grad_(), torch.arange(size) // 8
    calls = {
        "exo": lambda: exo_loss(s, r, r, ids, beta=1.0, reward_temperature=1.0).sum().backward(),
        "lire": lambda: lire_loss(s, r, ids, temperature=1.0).sum().backward(),
        "raft": lambda: raft_loss(s, r, ids).sum().backward(),
        "var": lambda: var_weights(r, lam=1.0, normalizer="self_normalised", group_ids=ids),
    }
    for name, call in calls.items():
        assert peak_extra_bytes(call) < 256 * size, name  # pairs would take 4096 bytes a row in bool alone


def test_group_advantage_by_hand():
    reward = torch.tensor([1.0, 5.0, 2.0, 6.0, 5.0, 9.0])  # groups (1, 2, 6), (5, 5), (9)
    assert group_advantage(reward, IDS, divide_by_std=False).tolist() == [-2.0, 0.0, -1.0, 3.0, 0.0, 0.0]
    want = torch.tensor([-2.0, 0.0, -1.0, 3.0, 0.0, 0.0]) / (math.sqrt(7) + 1e-4)  # (4 + 1 + 9) / 2
    torch.testing.assert_close(group_advantage(reward, IDS), want)
    # far from 0, in fp32: the difference is formed in fp64
    torch.testing.assert_close(group_advantage(reward + 4096, IDS), want)


def test_advantages_by_name_by_hand():
    reward = torch.tensor(
        [1.0, 0.0, 4.0, 1.0, 2.0, 3.0], dtype=torch.float64
    )  # group 7: 1 4 1, group 4: 0 2, group 9: 3
    mean = torch.tensor([-1.0, -1.0, 2.0, -1.0, 1.0, 0.0], dtype=torch.float64)
    got = {name: advantages_by_name(name, reward, IDS) for name in ADVANTAGES}
    assert got["given"].tolist() == reward.tolist()
    assert got["group_mean"].tolist() == mean.tolist()
    assert got["leave_one_out"].tolist() == [-1.5, -2.0, 3.0, -1.5, 2.0, 0.0]  # 1 - (4 + 1) / 2, 0 - 2, ...
    torch.testing.assert_close(got["group"], group_advantage(reward, IDS))
    torch.testing.assert_close(got["batch"], (reward - reward.mean()) / (reward.std(correction=0) + 1e-5))
    torch.testing.assert_close(got["group_mean_batch_std"], mean / (mean.square().mean().sqrt() + 1e-5))
    with pytest.raises(ValueError, match=r"advantages must be one of 'group', .*, got 'std'"):
        advantages_by_name("std", reward, IDS)


def test_leave_one_out_is_without_bias():
    """Over all pairs of draws: the expected gradient is that of the expected reward, whatever the policy."""
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reward = torch.arange(5.0, dtype=torch.float64).square()
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * reward).sum(), logits, retain_graph=True)
    first, second = (index.flatten() for index in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    pairs = torch.stack([first, second], 1)  # every outcome of two draws
    chance = logp.detach().exp()[pairs].prod(1)
    advantage = leave_one_out_advantage(reward[pairs].flatten(), torch.arange(25).repeat_interleave(2)).view(25, 2)
    (got,) = torch.autograd.grad((chance * (advantage * logp[pairs]).mean(1)).sum(), logits)
    torch.testing.assert_close(got, exact)


def test_exo_by_hand():
    # rho = (log 3, 0) twice beta 0.5 -> f = (3, 1)/4 at beta 1; r/b = (0, 0) -> p = (1, 1)/2
    policy = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    ref = policy - torch.tensor([2 * LOG3, 0.0], dtype=torch.float64)
    zeros, ids = torch.zeros(2, dtype=torch.float64), torch.tensor([0, 0])
    got = exo_loss(policy, ref, zeros, ids, beta=0.5, reward_temperature=1.0)
    assert got.tolist() == pytest.approx([0.75 * math.log(1.5), 0.25 * math.log(0.5)])
    # the reward that the policy already has
    reward = torch.tensor([2 * LOG3, 0.0], dtype=torch.float64)
    assert exo_loss(policy, ref, reward, ids, beta=0.5, reward_temperature=2.0).abs().max() < 1e-15


def test_exo_is_a_reverse_kl_per_group():
    policy, ref, reward = rows()
    got = exo_loss(policy, ref, reward, IDS, beta=0.3, reward_temperature=0.5)
    f, p = by_loop(0.3 * (policy - ref)), by_loop(reward / 0.5)
    for group in IDS.unique():
        own = group == IDS
        kl = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=f[own]), torch.distributions.Categorical(logits=p[own])
        )
        torch.testing.assert_close(got[own].sum(), kl)


def test_exo_of_a_pair_is_written_with_sigmoids():
    policy, ref, reward = (values[:2] for values in rows())
    got = exo_loss(policy, ref, reward, torch.tensor([1, 1]), beta=0.3, reward_temperature=0.5).sum()
    m = 0.3 * (policy - ref).diff().neg()
    d = (reward / 0.5).diff().neg()
    logsigmoid = torch.nn.functional.logsigmoid
    want = m.sigmoid() * (logsigmoid(m) - logsigmoid(d)) + (-m).sigmoid() * (logsigmoid(-m) - logsigmoid(-d))
    torch.testing.assert_close(got, want.squeeze())


def test_exo_invariances_and_limit():
    policy, ref, reward = rows()
    options = dict(beta=0.3, reward_temperature=0.5)
    per_group = torch.tensor([2.0, -5.0, 2.0, 2.0, -5.0, 1.0], dtype=torch.float64)
    got = exo_loss(policy, ref, reward, IDS, **options)
    torch.testing.assert_close(exo_loss(policy + per_group, ref, reward - per_group, IDS, **options), got)
    # a high temperature on both sides: two uniform distributions
    assert exo_loss(policy, ref, reward, IDS, beta=1e-9, reward_temperature=1e9).abs().max() < 1e-7


def test_lire_by_hand():
    # s = (log 3 + c, c): f = (3, 1)/4; r = (log 2, 0): R = (2, 1)/3
    policy = torch.tensor([LOG3 - 5, -5.0], dtype=torch.float64)
    reward = torch.tensor([LOG2, 0.0], dtype=torch.float64)
    ids = torch.tensor([0, 0])
    assert lire_loss(policy, reward, ids, temperature=1.0).tolist() == pytest.approx([-0.5, -1 / 12])
    # means over (1, 5) tokens, (log 3 - 5, -1), at temperature 2
    gap = (LOG3 - 5 + 1) / 2
    got = lire_loss(policy, reward, ids, torch.tensor([1, 5]), temperature=2.0, token_reduction="mean")
    f = 1 / (1 + math.exp(-gap))
    assert got.tolist() == pytest.approx([-f * 2 / 3, -(1 - f) / 3])


def test_lire_limits():
    policy, _, reward = rows()
    size = torch.tensor([3, 2, 3, 3, 2, 1], dtype=torch.float64)
    # a high temperature: uniform f; equal rewards: nothing to choose, no gradient
    torch.testing.assert_close(lire_loss(policy, reward, IDS, temperature=1e12), -by_loop(reward).exp() / size)
    policy.requires_grad_()
    indifferent = lire_loss(policy, torch.zeros_like(reward), IDS, temperature=1.0)
    torch.testing.assert_close(indifferent.sum(), torch.tensor(-11 / 6, dtype=torch.float64))  # -1/3, -1/2, -1
    (gradient,) = torch.autograd.grad(indifferent.sum(), policy)
    assert gradient.abs().max() < 1e-15
    # a low one: the reward's share of the likeliest completion, and -1 where it is alone
    cold = lire_loss(policy, reward, IDS, temperature=1e-6)
    likeliest = best_of_group(policy.detach(), IDS)
    torch.testing.assert_close(cold, -by_loop(reward).exp() * likeliest)


def test_lire_gradient_is_the_covariance_with_the_reward():
    policy, _, reward = rows()
    policy.requires_grad_()
    (gradient,) = torch.autograd.grad(lire_loss(policy, reward, IDS, temperature=2.0).sum(), policy)
    f, r = by_loop(policy.detach() / 2).exp(), by_loop(reward).exp()
    mean = torch.stack([(f * r)[group == IDS].sum() for group in IDS])
    torch.testing.assert_close(gradient, -f * (r - mean) / 2)


def test_raft_by_hand():
    policy = torch.tensor([-6.0, -1.0, -2.0, -8.0, -3.0, -4.0], requires_grad=True)
    reward = torch.tensor([0.0, 1.0, 2.0, 2.0, -1.0, -9.0])  # best: row 2 (before its equal, row 3), 1, 5
    assert raft_loss(policy, reward, IDS).tolist() == [0.0, 1.0, 2.0, 0.0, 0.0, 4.0]
    lengths = torch.tensor([1, 1, 2, 1, 1, 4])
    loss = raft_loss(policy, reward, IDS, lengths, token_reduction="mean")
    assert loss.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    loss.sum().backward()
    assert policy.grad.tolist() == [0.0, -1.0, -0.5, 0.0, 0.0, -0.25]


def test_raft_identity_and_limit():
    policy, _, reward = rows()
    best = best_of_group(reward, IDS)
    assert best.sum() == 3
    torch.testing.assert_close(raft_loss(policy, reward, IDS)[best], sft_loss(policy[best]))
    # any increasing function of the reward keeps the choice
    torch.testing.assert_close(raft_loss(policy, reward.exp() * 5, IDS), raft_loss(policy, reward, IDS))
    # groups of one: SFT
    torch.testing.assert_close(raft_loss(policy, reward, torch.arange(6)), sft_loss(policy))
    # a completion that the policy calls impossible is left out, not multiplied by 0
    policy[~best] = -torch.inf
    assert raft_loss(policy, reward, IDS).isfinite().all()


def test_a_step_without_rows():
    none, ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert exo_loss(none, none, none, ids, beta=1.0, reward_temperature=1.0).shape == (0,)
    assert lire_loss(none, none, ids, temperature=1.0).shape == (0,)
    assert raft_loss(none, none, ids).shape == (0,)


ZERO, IDS3 = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
REFUSED = {
    "exo beta": (
        lambda: exo_loss(ZERO, ZERO, ZERO, IDS3, beta=0.0, reward_temperature=1.0),
        ValueError,
        "beta must be finite and > 0",
    ),
    "exo temperature": (
        lambda: exo_loss(ZERO, ZERO, ZERO, IDS3, beta=1.0, reward_temperature=-1.0),
        ValueError,
        "reward_temperature must be finite and > 0",
    ),
    "exo rewards": (
        lambda: exo_loss(ZERO, ZERO, ZERO / 0, IDS3, beta=1.0, reward_temperature=1.0),
        ValueError,
        "reward must be finite, got nan",
    ),
    "float ids": (lambda: raft_loss(ZERO, ZERO, ZERO), TypeError, "group_ids must be an integer tensor .*use .long()"),
    "ids short": (
        lambda: lire_loss(ZERO, ZERO, IDS3[:2], temperature=1.0),
        ValueError,
        r"group_ids must be \(3,\) like policy_logp, got \(2,\)",
    ),
    "lire temperature": (
        lambda: lire_loss(ZERO, ZERO, IDS3, temperature=0),
        ValueError,
        "temperature must be finite and > 0",
    ),
    "lire lengths": (
        lambda: lire_loss(ZERO, ZERO, IDS3, temperature=1.0, token_reduction="mean"),
        ValueError,
        "lengths must be",
    ),
    "raft rewards": (lambda: raft_loss(ZERO, ZERO[:2], IDS3), ValueError, r"reward must be \(3,\) like policy_logp"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
