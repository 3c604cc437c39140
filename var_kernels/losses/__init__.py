"""Losses as pure functions of log-probs and rewards; ``var_loss`` alone also takes the hidden states, for its one
pass."""

from var_kernels.losses.pair import dpo_loss, implicit_reward
from var_kernels.losses.sequences import sequence_lengths, sequence_sum
from var_kernels.losses.supervised import sft_loss
from var_kernels.losses.var import VARLoss, VARStats, var_loss, weighted_sequence_nll
from var_kernels.losses.weights import (
    CollapsedWeightsWarning,
    VARWeights,
    effective_sample_size,
    var_weights,
    warn_if_collapsed,
)

__all__ = [
    "CollapsedWeightsWarning",
    "VARLoss",
    "VARStats",
    "VARWeights",
    "dpo_loss",
    "effective_sample_size",
    "implicit_reward",
    "sequence_lengths",
    "sequence_sum",
    "sft_loss",
    "var_loss",
    "var_weights",
    "warn_if_collapsed",
    "weighted_sequence_nll",
]
