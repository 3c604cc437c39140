"""SAIL: online alignment as a bilevel problem, reduced to one loss per source of responses and of labels. Class C."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from var_kernels.losses.checks import check_beside, check_choice, check_kind, check_range, times, wide
from var_kernels.losses.registry import register

BASELINES = ("none", "leave_one_out")


@register(
    "sail_dp",
    pass_class="C",
    formula="-F - squared_coef/2 F^2, F = log sigmoid(beta D)",
    source="arXiv 2406.15567",
    evidence="code",
    defaults={"beta": 0.1},
    policy_labels=True,
)
def sail_dp_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    *,
    beta: float,
    squared_coef: float = 1.0,
    revkl_coef: float = 0.0,
) -> Tensor:
    """SAIL on responses of a data set, with labels that the policy itself would give (DP).

        m = beta ((s_w - sr_w) - (s_l - sr_l)),   F = log sigmoid(m)
        loss = -F - squared_coef/2 F^2
        dloss/ds_w = -a,   dloss/ds_l = a,   a = beta sigmoid(-m) (1 + squared_coef F)

    Draw the label before the call: swap the pair where ``draw_preference(m, generator)`` says so. In expectation over
    labels so drawn, squared_coef = 1 gives the exact gradient of -E[F], the label's own dependence on the policy
    included.

    The loss is not bounded below: of use for its gradient. The exactness, without revkl_coef, is checked by
    enumeration. SAIL-RevKL: arXiv 2606.31524.

    Args:
        chosen_lengths, rejected_lengths: (P,) integers, tokens that carry loss; for revkl_coef.
        beta: > 0. Released: 0.1.
        squared_coef: >= 0, c. 1 is exact; 0 is DPO; released: 0.2, on a share of 0.4 of the pairs.
        revkl_coef: >= 0, of SAIL-RevKL's term, the mean of lp_ref - lp over the label tokens of both responses: it
            keeps the likelihood of both from falling. 1e-3 in its authors' code; 0: without.
    """
    tensors = (policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    options: Any = {"beta": beta, "squared_coef": squared_coef, "score_coef": 0.0, "revkl_coef": revkl_coef}
    return sail_pp_loss(*tensors, chosen_lengths, rejected_lengths, **options)


@register(
    "sail_pp",
    pass_class="C",
    formula="-F - squared_coef/2 F^2 - score_coef sg(F - b) (s_w + s_l), F = log sigmoid(beta D), b = 0 or others' F",
    source="arXiv 2406.15567",
    evidence="code",
    defaults={"beta": 0.1},
    reads_draws=True,
    policy_labels=True,
)
def sail_pp_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    counted: Tensor | None = None,
    *,
    beta: float,
    squared_coef: float = 1.0,
    score_coef: float = 1.0,
    baseline: str = "none",
    revkl_coef: float = 0.0,
) -> Tensor:
    """SAIL on responses of the policy, with labels of the policy (PP).

        loss = -F - squared_coef/2 F^2 - score_coef sg(F - b) (s_w + s_l)
        dloss/ds_w = -a - score_coef (F - b),   dloss/ds_l = a - score_coef (F - b),   a as in ``sail_dp_loss``

    sg stops the gradient: the last term is the score function of the responses' own distribution. Draw both responses
    from the current policy, then the label with ``draw_preference``. Coefficients of 1 give the exact gradient.

    b is 0, or the mean of F over the OTHER pairs of the call. The score s_w + s_l has no gradient on average over the
    policy's own draws, so a b that does not depend on the pair leaves the expected gradient as it is; and F hovers
    about log 1/2, so nearly all of the score term's variance goes with it.

    The baseline "leave_one_out" is REINFORCE's (arXiv 2402.14740).

    Args:
        chosen_lengths, rejected_lengths, beta, squared_coef, revkl_coef: see ``sail_dp_loss``.
        counted: (P,) bool, the pairs whose F enters the others' baseline; None: all.
        score_coef: >= 0, k. 1 is exact. Released: one coefficient of 0.2 for both terms, on a share of 0.3. That code
            divides the score by the sequence's log-prob, which flips its sign, and takes it 8 times (pairs a
            device times accumulation) as large as a loss a pair has it; its prompts and responses are mispaired
            there. That form is not offered: it is no gradient of the objective.
        baseline: "none", as derived, b = 0; or "leave_one_out", b_i = sum_{j != i} F_j / (P - 1), 0 for a single pair.
            It couples the pairs of a call (of a micro-batch of a rank); each call by itself stays unbiased.
    """
    check_range("beta", beta, remedy="swap chosen and rejected to reverse the preference")
    check_range("squared_coef", squared_coef, closed=True, remedy="1 is exact, 0 leaves the term out")
    check_range("score_coef", score_coef, closed=True, remedy="1 is exact, 0 leaves the term out")
    check_range("revkl_coef", revkl_coef, closed=True, remedy="0 leaves the term out")
    check_choice("baseline", baseline, BASELINES)
    chosen_P, rejected_P = policy_chosen_logp - ref_chosen_logp, policy_rejected_logp - ref_rejected_logp
    log_win_P = logsigmoid(beta * (chosen_P - rejected_P))
    loss_P = -log_win_P * (1 + times(0.5 * squared_coef, log_win_P))
    if revkl_coef:
        loss_P = loss_P - revkl_coef * (chosen_P + rejected_P) / _tokens(chosen_P, chosen_lengths, rejected_lengths)
    if score_coef == 0:
        return loss_P
    factor_P = log_win_P.detach()
    if baseline == "leave_one_out":
        counted_P = torch.ones_like(factor_P, dtype=torch.bool) if counted is None else counted
        part_P = factor_P.where(counted_P, 0.0)
        factor_P = factor_P - (part_P.sum() - part_P) / (counted_P.sum() - counted_P.long()).clamp(min=1)
    return loss_P - times(score_coef * factor_P, policy_chosen_logp + policy_rejected_logp)


@register(
    "sail_pr",
    pass_class="C",
    formula="-F - score_coef sg(F - b) (s_w + s_l), F = log sigmoid(beta D), b = 0 or others' F",
    source="arXiv 2406.15567",
    evidence="code",
    defaults={"beta": 0.1},
    reads_draws=True,
)
def sail_pr_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    counted: Tensor | None = None,
    *,
    beta: float,
    score_coef: float = 1.0,
    baseline: str = "none",
    revkl_coef: float = 0.0,
) -> Tensor:
    """SAIL on responses of the policy, with labels of a reward model (PR).

        loss = -F - score_coef sg(F - b) (s_w + s_l)
        dloss/ds_w = -beta sigmoid(-m) - score_coef (F - b),   dloss/ds_l = beta sigmoid(-m) - score_coef (F - b)

    Draw both responses from the current policy; the label from sigmoid(r_w - r_l) or by the higher reward.
    score_coef = 1 gives the exact gradient. Released: share 0.3, score_coef 0.3.

    Args:
        chosen_lengths, rejected_lengths, counted, beta, score_coef, baseline, revkl_coef: see ``sail_pp_loss``.
    """
    tensors = (policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    options: Any = {"beta": beta, "score_coef": score_coef, "baseline": baseline, "revkl_coef": revkl_coef}
    return sail_pp_loss(*tensors, chosen_lengths, rejected_lengths, counted, squared_coef=0.0, **options)


def draw_preference(margin: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(P,) bool: where to swap winner and loser, each with probability 1 - sigmoid(margin). No gradient.

        swapped = draw_preference(beta * D, generator)
        policy_w, policy_l = torch.where(swapped, policy_l, policy_w), torch.where(swapped, policy_w, policy_l)

    and the reference's log-probs likewise.

    Args:
        margin: (P,) floating point, m = beta D of the pairs as they stand; detached here.
        generator: on margin's device. Ranks that hold different pairs need different seeds.

    Source: arXiv 2406.15567.
    """
    check_kind("margin", margin, "floating-point", "(P,)", "beta times the differences of the log-ratios")
    chance = torch.rand(margin.shape, generator=generator, device=margin.device, dtype=wide(margin).dtype)
    return chance >= wide(margin.detach()).sigmoid()


def _tokens(like_P: Tensor, chosen_lengths: Tensor | None, rejected_lengths: Tensor | None) -> Tensor:
    """(P,) the label tokens of both responses, at least one."""
    lengths: dict[str, Any] = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    for name, values in lengths.items():
        if values is None:
            raise ValueError(f"{name} must be ({len(like_P)},) for revkl_coef, got None; count each response's labels")
    check_beside("policy_chosen_logp", like_P, **lengths)
    return (lengths["chosen_lengths"] + lengths["rejected_lengths"]).clamp(min=1)
