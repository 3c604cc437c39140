"""SAIL: the gradients by hand and by formula, against the exact gradients of the bilevel objectives on a policy whose
responses are all written down, the reverse KL, and the draw of a label."""

import math

import pytest
import torch

from var_kernels.losses.pair import dpo_loss
from var_kernels.losses.sail import draw_preference, sail_dp_loss, sail_pp_loss, sail_pr_loss

BETA = 0.3
LOSSES = {"DP": sail_dp_loss, "PP": sail_pp_loss, "PR": sail_pr_loss}


def log_probs(p=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [-20 + 3 * torch.randn(p, dtype=torch.float64, generator=generator) for _ in range(4)]


def gradients(loss, *logps, **options):
    """dloss/ds_w, dloss/ds_l."""
    chosen, rejected = (logp.clone().requires_grad_() for logp in logps[:2])
    return torch.autograd.grad(loss(chosen, rejected, *logps[2:], **options).sum(), (chosen, rejected))


def test_by_hand():
    # D = (-10 + 12) - (-20 + 18) = 4, m = 0.5 * 4 = 2, F = log sigmoid(2) = -0.126928
    inputs = [torch.tensor([value], dtype=torch.float64) for value in (-10.0, -20.0, -12.0, -18.0)]
    f = -math.log1p(math.exp(-2))
    assert sail_dp_loss(*inputs, beta=0.5).item() == pytest.approx(-f - f * f / 2)
    assert sail_dp_loss(*inputs, beta=0.5, squared_coef=0.2).item() == pytest.approx(-f - 0.1 * f * f)
    assert sail_pr_loss(*inputs, beta=0.5).item() == pytest.approx(-f + 30 * f)
    assert sail_pr_loss(*inputs, beta=0.5, score_coef=0.3).item() == pytest.approx(-f + 9 * f)
    assert sail_pp_loss(*inputs, beta=0.5).item() == pytest.approx(-f - f * f / 2 + 30 * f)
    # 3 and 5 tokens, log-ratios of 2 and -2: no change in all; of 2 and 6: one nat a token
    lengths = torch.tensor([3]), torch.tensor([5])
    for name, loss in LOSSES.items():
        kept = loss(*inputs, *lengths, beta=0.5, revkl_coef=0.1)
        assert kept.item() == pytest.approx(loss(*inputs, beta=0.5).item()), name
    above = [inputs[0], inputs[1] + 8, *inputs[2:]]
    shift = sail_dp_loss(*above, *lengths, beta=0.5, revkl_coef=0.1) - sail_dp_loss(*above, beta=0.5)
    assert shift.item() == pytest.approx(-0.1 * 1.0)


FORMULA = {
    "DP exact": ("DP", {}, 1.0, 0.0),
    "DP released share": ("DP", {"squared_coef": 0.2}, 0.2, 0.0),
    "PP exact": ("PP", {}, 1.0, 1.0),
    "PP c and k": ("PP", {"squared_coef": 0.2, "score_coef": 0.3}, 0.2, 0.3),
    "PR exact": ("PR", {}, 0.0, 1.0),
    "PR k": ("PR", {"score_coef": 0.3}, 0.0, 0.3),
}


@pytest.mark.parametrize("case", FORMULA)
def test_gradient_of_each_sequence(case):
    name, options, c, k = FORMULA[case]
    logps = log_probs()
    margin = BETA * (logps[0] - logps[2] - logps[1] + logps[3])
    f = margin.sigmoid().log()
    a = BETA * torch.sigmoid(-margin) * (1 + c * f)
    dchosen, drejected = gradients(LOSSES[name], *logps, beta=BETA, **options)
    torch.testing.assert_close(dchosen, -a - k * f)
    torch.testing.assert_close(drejected, a - k * f)


@pytest.mark.parametrize("revkl", [0.0, 0.4])
def test_gradient_by_finite_differences_of_the_loss_with_its_factors_frozen(revkl):
    # what stands behind a stopped gradient is a number here, so differences see what autograd must see
    logps = log_probs()
    margin = BETA * (logps[0] - logps[2] - logps[1] + logps[3])
    factor = margin.sigmoid().log()
    lengths = torch.full((len(margin),), 3), torch.full((len(margin),), 4)

    def frozen(chosen, rejected):
        f = (BETA * (chosen - logps[2] - rejected + logps[3])).sigmoid().log()
        change = chosen - logps[2] + rejected - logps[3]
        return -f - 0.1 * f * f - 0.3 * factor * (chosen + rejected) - revkl * change / 7

    h = 1e-6
    chosen, rejected = logps[:2]
    options = {"beta": BETA, "squared_coef": 0.2, "score_coef": 0.3, "revkl_coef": revkl}
    dchosen, drejected = gradients(sail_pp_loss, *logps, *lengths, **options)
    near = dict(rtol=1e-6, atol=1e-8)
    by_chosen = (frozen(chosen + h, rejected) - frozen(chosen - h, rejected)) / (2 * h)
    by_rejected = (frozen(chosen, rejected + h) - frozen(chosen, rejected - h)) / (2 * h)
    torch.testing.assert_close(dchosen, by_chosen, **near)
    torch.testing.assert_close(drejected, by_rejected, **near)


def test_identities_and_limits():
    logps = log_probs()
    dpo = dpo_loss(*logps, beta=BETA)
    torch.testing.assert_close(sail_dp_loss(*logps, beta=BETA, squared_coef=0.0), dpo)
    torch.testing.assert_close(sail_pr_loss(*logps, beta=BETA, score_coef=0.0), dpo)
    torch.testing.assert_close(sail_pp_loss(*logps, beta=BETA, squared_coef=0.0), sail_pr_loss(*logps, beta=BETA))
    torch.testing.assert_close(sail_pp_loss(*logps, beta=BETA, score_coef=0.0), sail_dp_loss(*logps, beta=BETA))
    # a pair that is settled has nothing more to give, in any form
    settled = [logps[0] + 1e4, logps[1] - 1e4, *logps[2:]]
    for loss in LOSSES.values():
        for gradient in gradients(loss, *settled, beta=BETA):
            assert gradient.abs().max() == 0


# ---- the objectives, enumerated --------------------------------------------------------------------------------------

R = 5  # responses
WORLD = torch.Generator().manual_seed(3)
THETA = torch.randn(R, dtype=torch.float64, generator=WORLD)  # the policy's logits
REF_LOGP = torch.randn(R, dtype=torch.float64, generator=WORLD).log_softmax(0)
REWARD = torch.randn(R, dtype=torch.float64, generator=WORLD)
DATA = torch.rand(R, R, dtype=torch.float64, generator=WORLD)
DATA = DATA / DATA.sum()  # a data set of response pairs
WIN, LOSE = (index.flatten() for index in torch.meshgrid(torch.arange(R), torch.arange(R), indexing="ij"))


def probability_of_pairs(theta, case):
    """Of (winner, loser), (R * R,): two responses are drawn, in either order, and one is labelled the winner."""
    logp = theta.log_softmax(0)
    margin = BETA * ((logp - REF_LOGP)[WIN] - (logp - REF_LOGP)[LOSE])
    label = torch.sigmoid(REWARD[WIN] - REWARD[LOSE]) if case == "PR" else torch.sigmoid(margin)
    pairs = DATA + DATA.T if case == "DP" else 2 * logp.exp()[:, None] * logp.exp()
    return pairs.flatten() * label, margin


def exact_gradient(case):
    """Of -E[log sigmoid(m)], the expectation over pairs and labels that depend on the policy: by autograd."""
    theta = THETA.clone().requires_grad_()
    probability, margin = probability_of_pairs(theta, case)
    assert probability.sum().item() == pytest.approx(1.0)
    objective = (probability * margin.sigmoid().log()).sum()
    return torch.autograd.grad(-objective, theta)[0]


def expected_gradient_of_the_loss(case, **options):
    theta = THETA.clone().requires_grad_()
    logp = theta.log_softmax(0)
    loss = LOSSES[case](logp[WIN], logp[LOSE], REF_LOGP[WIN], REF_LOGP[LOSE], beta=BETA, **options)
    probability, _ = probability_of_pairs(THETA, case)  # drawn: no gradient
    return torch.autograd.grad((probability * loss).sum(), theta)[0]


@pytest.mark.parametrize("case", LOSSES)
def test_expected_gradient_is_the_exact_gradient_of_the_bilevel_objective(case):
    error = expected_gradient_of_the_loss(case) - exact_gradient(case)
    assert error.abs().max() < 1e-12 < 1e-6 < exact_gradient(case).abs().max()


WRONG = {
    "DP without the square (DPO)": ("DP", {"squared_coef": 0.0}),
    "PP without the square": ("PP", {"squared_coef": 0.0}),
    "PP without the score": ("PP", {"score_coef": 0.0}),
    "PR without the score (DPO)": ("PR", {"score_coef": 0.0}),
    "PP with the released coefficients": ("PP", {"squared_coef": 0.2, "score_coef": 0.2}),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_coefficients_are_not_exact(case):
    name, options = WRONG[case]
    error = expected_gradient_of_the_loss(name, **options) - exact_gradient(name)
    assert error.abs().max() > 0.01 * exact_gradient(name).abs().max()


# ---- the draw --------------------------------------------------------------------------------------------------------


def test_draw_swaps_with_the_complement_of_the_sigmoid():
    margin = torch.tensor([-2.0, 0.0, 1.0]).repeat_interleave(40_000).requires_grad_()
    swapped = draw_preference(margin, torch.Generator().manual_seed(0))
    assert swapped.dtype == torch.bool
    assert not swapped.requires_grad
    shares = swapped.view(3, -1).double().mean(1)
    # standard error 0.0025 at the most
    assert (shares - (1 - torch.tensor([-2.0, 0.0, 1.0]).sigmoid())).abs().max() < 0.01


def test_draw_limits_and_seed():
    sure = torch.tensor([1e4, -1e4]).repeat(500)
    assert draw_preference(sure).view(-1, 2).all(0).tolist() == [False, True]
    assert not draw_preference(sure)[::2].any()
    margin = torch.zeros(64, dtype=torch.bfloat16)
    first, again = (draw_preference(margin, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert 0 < first.sum() < 64


ZERO = torch.zeros(3)


def test_refusals():
    with pytest.raises(ValueError, match=r"chosen_lengths must be \(3,\) for revkl_coef, got None; count"):
        sail_pr_loss(*[ZERO] * 4, beta=0.1, revkl_coef=1e-3)
    with pytest.raises(ValueError, match="revkl_coef must be finite and >= 0"):
        sail_dp_loss(*[ZERO] * 4, beta=0.1, revkl_coef=-1.0)
    with pytest.raises(ValueError, match="squared_coef must be finite and >= 0"):
        sail_dp_loss(*[ZERO] * 4, beta=0.1, squared_coef=-1)
    with pytest.raises(ValueError, match="score_coef must be finite and >= 0"):
        sail_pp_loss(*[ZERO] * 4, beta=0.1, score_coef=math.inf)
    with pytest.raises(ValueError, match="beta must be finite and > 0"):
        sail_pp_loss(*[ZERO] * 4, beta=0.0)


# ---- the baseline of the score term ----------------------------------------------------------------------------------

PAIRS_A_CALL = 2
CALLS = torch.cartesian_prod(*[torch.arange(R * R)] * PAIRS_A_CALL)  # every call of two pairs that can be drawn


def gradients_of_calls(case, **options):
    """Probability of each call, (C,), and the gradient that it gives, the mean over its pairs, (C, R)."""
    probability, _ = probability_of_pairs(THETA, case)
    probability = probability.view(R, R)[WIN, LOSE]
    theta = THETA.clone().requires_grad_()
    logp = theta.log_softmax(0)
    jacobian = torch.stack([torch.autograd.grad(logp[y], theta, retain_graph=True)[0] for y in range(R)])  # (R, R)
    rows = []
    for call in CALLS:
        chosen, rejected = logp.detach()[WIN[call]], logp.detach()[LOSE[call]]
        reference = (REF_LOGP[WIN[call]], REF_LOGP[LOSE[call]])
        dchosen, drejected = gradients(LOSSES[case], chosen, rejected, *reference, beta=BETA, **options)
        rows.append((dchosen @ jacobian[WIN[call]] + drejected @ jacobian[LOSE[call]]) / PAIRS_A_CALL)
    return probability[CALLS].prod(-1), torch.stack(rows)


@pytest.mark.parametrize("case", ["PP", "PR"])
def test_baseline_keeps_the_expected_gradient_and_takes_the_variance(case):
    spread = {}
    for baseline in ("none", "leave_one_out"):
        probability, rows = gradients_of_calls(case, baseline=baseline)
        assert probability.sum().item() == pytest.approx(1.0)
        mean = probability @ rows
        assert (mean - exact_gradient(case)).abs().max() < 1e-12
        spread[baseline] = (probability @ (rows - mean).square().sum(-1)).item()
    assert spread["leave_one_out"] < 0.3 * spread["none"]


def test_baseline_by_hand():
    logps = log_probs(p=3)
    margin = BETA * (logps[0] - logps[2] - logps[1] + logps[3])
    f = margin.sigmoid().log()
    others = torch.stack([(f[1] + f[2]) / 2, (f[0] + f[2]) / 2, (f[0] + f[1]) / 2])
    exact, reduced = (
        gradients(sail_pp_loss, *logps, beta=BETA, score_coef=0.3, baseline=baseline)
        for baseline in ("none", "leave_one_out")
    )
    for before, after in zip(exact, reduced, strict=True):
        torch.testing.assert_close(after, before + 0.3 * others)
    alone = [logp[:1] for logp in logps]  # no other pair: no baseline
    kept = sail_pr_loss(*alone, beta=BETA, baseline="leave_one_out")
    assert torch.equal(kept, sail_pr_loss(*alone, beta=BETA))


def test_a_baseline_of_all_pairs_would_be_biased():
    """With the pair itself in the mean, (1 - 1/P) of the score term is left: the enumeration above can tell."""
    probability, left_out = gradients_of_calls("PR", baseline="leave_one_out")
    _, without = gradients_of_calls("PR", score_coef=0.0)
    all_pairs = without + (left_out - without) * (1 - 1 / PAIRS_A_CALL)
    assert (probability @ all_pairs - exact_gradient("PR")).abs().max() > 1e-3


def test_baseline_refusals():
    with pytest.raises(ValueError, match="baseline must be one of 'none', 'leave_one_out', got 'mean'"):
        sail_pr_loss(*[ZERO] * 4, beta=0.1, baseline="mean")
