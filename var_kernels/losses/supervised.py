"""Supervised fine-tuning and its weighted kin: -w s with a weight known beforehand. Class A: one pass of the head."""

import math

from torch import Tensor

from var_kernels.losses.checks import TokenReduction, check_range, per_token, times
from var_kernels.losses.registry import register


@register("sft", pass_class="A", formula="-s, or -s / len", source="maximum likelihood", evidence="derived")
def sft_loss(policy_logp: Tensor, lengths: Tensor | None = None, *, token_reduction: TokenReduction = "sum") -> Tensor:
    """Negative log-likelihood of each sequence: -s ("sum") or -s / len ("mean"). VAR with all weights 1.

    From log-probs that are there already. To train by SFT alone, ``linear_weighted_nll(hidden, lm_head_weight, labels,
    None)`` does the same in one pass (class A: the gradient per token, -1, is known beforehand).

    Args:
        token_reduction: "sum" or "mean" over the sequence's tokens, for which it needs lengths.
    """
    return -per_token(policy_logp, lengths, token_reduction)


@register(
    "awr",
    pass_class="A",
    formula="-min(exp(A / beta), max_weight) s",
    source="arXiv 1910.00177",
    evidence="code",
    defaults={"beta": 1.0},
    compares="step",
)
def awr_loss(policy_logp: Tensor, advantage: Tensor, *, beta: float, max_weight: float = 20.0) -> Tensor:
    """Advantage-weighted regression: SFT weighted by exp(A / beta), clipped.

        loss = -min(exp(A / beta), max_weight) s

    The authors' code standardises A over the whole buffer first: over the GLOBAL batch, which this function cannot see.
    Pass it standardised (``standardised_advantage``).

    Args:
        advantage: (B,) A = r - V, standardised; constants.
        beta: > 0, the temperature, in units of A.
        max_weight: > 0.
    """
    check_range("beta", beta, remedy="negate the advantage to minimise the reward")
    check_range("max_weight", max_weight, remedy="1e9 hardly clips")
    log_weight_B = (advantage / beta).clamp(max=math.log(max_weight))  # clipped before exp can overflow
    return times(-log_weight_B.exp(), policy_logp)


@register(
    "var",
    pass_class="A",
    formula="-w s, w = var_weights(rewards, ref_logp), a constant",
    source="arXiv 2502.11026",
    evidence="summary",
    compares="step",
    reads_draws=True,
)
def reweighted_loss(policy_logp: Tensor, sample_weight: Tensor) -> Tensor:
    """Reward-weighted likelihood, VAR's loss once its weights are known: -w s.

    The weights belong to the global batch: ``var_weights`` makes them, ``var_loss`` does both. Minimised over all
    responses by pi = w / sum w. Which estimator of Z the paper runs is open (docs/var.md).
    """
    return times(-sample_weight, policy_logp)
