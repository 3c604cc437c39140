"""Losses as pure functions of log-probs and rewards; ``var_loss``, ``linear_loss`` and ``linear_asft_loss`` alone take
the hidden states, for their passes over the head.

Importing the modules fills ``LOSSES``.
"""

from var_kernels.losses.advantages import (
    ADVANTAGES,
    advantages_by_name,
    group_advantage,
    leave_one_out_advantage,
    standardised_advantage,
)
from var_kernels.losses.alol import (
    alol_advantage,
    alol_kl_loss,
    alol_loss,
    alol_ref_free_loss,
    alol_seq_loss,
    rgold_loss,
    rlol_loss,
    weighted_bc_loss,
)
from var_kernels.losses.anchored import linear_asft_loss
from var_kernels.losses.ava import ava_d_loss, ava_p_loss, bradley_terry_loss, literal_q, pair_accuracy
from var_kernels.losses.finetuning import chord_phi_loss, eaft_loss, iw_sft_loss, iw_sft_token_loss, psft_loss
from var_kernels.losses.group import best_of_group, exo_loss, lire_loss, raft_loss
from var_kernels.losses.kto import kto_baseline, kto_loss
from var_kernels.losses.linear import linear_loss
from var_kernels.losses.listwise import gvpo_loss, info_nca_loss, nca_loss, target_po_loss
from var_kernels.losses.margin import orpo_loss, simpo_loss, slic_loss
from var_kernels.losses.pair import dpo_loss, hinge_loss, implicit_reward, ipo_loss, robust_dpo_loss
from var_kernels.losses.policy_gradient import cispo_loss, gspo_loss, reinforce_loss, sapo_loss, topr_loss, vespo_loss
from var_kernels.losses.registry import LOSSES, MODEL_LOSSES, PASS_CLASSES, Loss, find_loss, register, single_name
from var_kernels.losses.regression import (
    astar_po_loss,
    dro_loss,
    dro_value_loss,
    qrpo_loss,
    quantile_reward,
    rebel_loss,
    soft_value,
)
from var_kernels.losses.sail import draw_preference, sail_dp_loss, sail_pp_loss, sail_pr_loss
from var_kernels.losses.sequences import sequence_lengths, sequence_sum
from var_kernels.losses.sparse import sparse_token_kl
from var_kernels.losses.supervised import awr_loss, reweighted_loss, sft_loss
from var_kernels.losses.token import (
    dft_loss,
    grpo_loss,
    kl_k1,
    kl_k2,
    kl_k3,
    length_weights,
    ppo_clipped,
    ppo_loss,
    token_objective,
)
from var_kernels.losses.var import VARLoss, VARStats, var_loss, weighted_sequence_nll
from var_kernels.losses.variants import VARIANTS, Variant
from var_kernels.losses.weights import (
    CollapsedWeightsWarning,
    IgnoredRewardsWarning,
    VARWeights,
    effective_sample_size,
    var_weights,
    warn_if_collapsed,
    warn_if_rewards_ignored,
)

__all__ = [
    "ADVANTAGES", "LOSSES", "MODEL_LOSSES", "PASS_CLASSES", "VARIANTS", "CollapsedWeightsWarning",
    "IgnoredRewardsWarning", "Loss", "VARLoss", "VARStats", "VARWeights", "Variant", "advantages_by_name",
    "alol_advantage", "alol_kl_loss", "alol_loss", "alol_ref_free_loss", "alol_seq_loss", "astar_po_loss", "ava_d_loss",
    "ava_p_loss", "awr_loss", "best_of_group", "bradley_terry_loss", "chord_phi_loss", "cispo_loss", "dft_loss",
    "dpo_loss", "draw_preference", "dro_loss", "dro_value_loss", "eaft_loss", "effective_sample_size", "exo_loss",
    "find_loss", "group_advantage", "grpo_loss", "gspo_loss", "gvpo_loss", "hinge_loss", "implicit_reward",
    "info_nca_loss", "ipo_loss", "iw_sft_loss", "iw_sft_token_loss", "kl_k1", "kl_k2", "kl_k3", "kto_baseline",
    "kto_loss", "leave_one_out_advantage", "length_weights", "linear_asft_loss", "linear_loss", "lire_loss",
    "literal_q", "nca_loss", "orpo_loss", "pair_accuracy", "ppo_clipped", "ppo_loss", "psft_loss", "qrpo_loss",
    "quantile_reward", "raft_loss", "rebel_loss", "register", "reinforce_loss", "reweighted_loss", "rgold_loss",
    "rlol_loss", "robust_dpo_loss", "sail_dp_loss", "sail_pp_loss", "sail_pr_loss", "sapo_loss", "sequence_lengths",
    "sequence_sum", "sft_loss", "simpo_loss", "single_name", "slic_loss", "soft_value", "sparse_token_kl",
    "standardised_advantage", "target_po_loss", "token_objective", "topr_loss", "var_loss", "var_weights", "vespo_loss",
    "warn_if_collapsed", "warn_if_rewards_ignored", "weighted_bc_loss", "weighted_sequence_nll",
]  # fmt: skip
