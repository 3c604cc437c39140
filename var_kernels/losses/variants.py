"""Rows of the papers' tables that are no function of their own: a loss of the registry with other options or another
source of data, or a function of another kind than one loss an item.

Those of the first kind are methods of ``var-kernels train`` by their names: a loss and settings beside its defaults.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from var_kernels.losses.ava import literal_q
from var_kernels.losses.registry import LOSSES
from var_kernels.losses.var import var_loss
from var_kernels.ops import linear_token_kl

VARIANTS: dict[str, "Variant"] = {}
"""Name -> ``Variant``: rows of the papers that are a loss of ``LOSSES`` with other settings."""


@dataclass(frozen=True)
class Variant:
    """A row of the table that points to another.

    loss: a name of ``LOSSES`` and settings: those of its method that make the variant (``linear_loss`` takes the loss's
    own among them, ``VARTrainer`` all); or loss "" and function: what to call.
    """

    name: str
    formula: str
    source: str
    evidence: str
    loss: str
    settings: Mapping[str, object]
    function: Callable[..., Any] | None
    pass_class: str

    @property
    def use(self) -> str:
        """The command's options for it, or the function's name."""
        if self.function is not None:
            return f"{self.function.__name__}(...)"
        words = [f"--{name.replace('_', '-')}" + ("" if v is True else f" {v}") for name, v in self.settings.items()]
        return " ".join([f"--method {self.loss}", *words])


def _enter(
    name: str,
    formula: str,
    source: str,
    evidence: str,
    loss: str = "",
    function: Callable[..., Any] | None = None,
    pass_class: str = "",
    **settings: Any,
) -> None:
    known = MappingProxyType(settings)
    VARIANTS[name] = Variant(
        name, formula, source, evidence, loss, known, function, pass_class or LOSSES[loss].pass_class
    )


_VAR, _SAIL, _DERIVED = "arXiv 2502.11026", "arXiv 2406.15567", "derived"
_RELEASED = "with the coefficients of the first author's code, each on a share of the pairs there"
_enter("var_batch", "log Z = LSE_j a_j over the batch", _VAR, _DERIVED, "var", normalizer="batch")
_enter("var_batch_mean", "log Z = LSE_j a_j - log B", _VAR, _DERIVED, "var", normalizer="batch_mean")
_enter("var_group", "log Z = LSE of a over the prompt's completions", _VAR, _DERIVED, "var", normalizer="group")
_enter("var_self_normalised", "log Z = log mean_k exp(r_k / lam); right where y ~ pi_ref", _VAR, _DERIVED, "var",
       normalizer="self_normalised")  # fmt: skip
_enter("var_cross", 'log Z_i = LSE_j a_ij, a_ij of y_j under x_i: var_loss(..., normalizer="cross")', _VAR, _DERIVED,
       function=var_loss, pass_class="A")  # fmt: skip
_enter("online_var", "var_self_normalised on draws of the policy, which is the iteration's reference", _VAR, _DERIVED,
       "var", online=True, normalizer="self_normalised")  # fmt: skip
_enter("best_of_n", "-s of each prompt's best completion, per token of the batch", "best-of-n SFT", _DERIVED, "sft",
       sft_on="best")  # fmt: skip
_enter("cdpo", "dpo with e > 0: labels are wrong at the rate e", "the DPO authors' code", "code", "dpo",
       label_smoothing=0.1)  # fmt: skip
_enter("ipo_sum", "(D - 1/(2 tau))^2, D of sums", "the DPO authors' code", "code", "ipo", token_reduction="sum")
_enter("iterative_dpo", "dpo on the best against the worst of K = 8 draws; the reference is the iteration's policy",
       "online iterative DPO", "code", "dpo", online=True, generations_per_prompt=8,
       refresh_reference=True)  # fmt: skip
_enter("online_sail_pp", "sail_pp on two draws of the policy at T = 0.9", _SAIL, "code", "sail_pp", online=True)
_enter("online_sail_pr", "sail_pr on two draws of the policy at T = 0.9", _SAIL, "code", "sail_pr", online=True)
_enter("sail_dp_released", _RELEASED, _SAIL, "code", "sail_dp", squared_coef=0.2)
_enter("sail_pp_released", _RELEASED, _SAIL, "code", "sail_pp", squared_coef=0.2, score_coef=0.2)
_enter("sail_pr_released", _RELEASED, _SAIL, "code", "sail_pr", score_coef=0.3)
_enter("sail_revkl", "sail_dp + 1e-3 mean (lp_ref - lp) of both", "arXiv 2606.31524", "code", "sail_dp",
       revkl_coef=1e-3)  # fmt: skip
_enter("ava_d_printed", "ava_d, the likelihood and KL of the last position left out, as in equations 5 and 13",
       "arXiv 2411.09341", "paper", "ava_d", as_printed=True)  # fmt: skip
_enter("ava_literal", "Q = alpha p_y - log sum_v exp(alpha p_v), for ava_d and ava_p in place of lp",
       "arXiv 2411.09341, read literally", "paper", function=literal_q, pass_class="C")  # fmt: skip
_enter("dapo", "ppo, mean over the batch's tokens, upper clip 0.28", "arXiv 2503.14476", "third-party code", "ppo",
       length_normalization="token", clip_high=0.28)  # fmt: skip
_enter("dr_grpo", "ppo, sums over a constant length, advantages not divided by their deviation", "arXiv 2503.20783",
       "third-party code", "ppo", length_normalization="constant", advantages="group_mean")  # fmt: skip
_enter("dual_clip", "ppo, whose loss at a negative advantage is at most 3 |A|", "arXiv 1912.09729", "third-party code",
       "ppo", dual_clip=3.0)  # fmt: skip
_enter("oapl", "astar_po on draws of the lagged policy, which is the reference, V over the same draws",
       "arXiv 2602.19362", "paper", "astar_po", online=True)  # fmt: skip
_enter("cispo_clipped", "cispo, the ratio clipped on both sides, as verl has it", "arXiv 2506.13585",
       "third-party code", "cispo", ratio_min=0.8, ratio_max=1.2)  # fmt: skip
_enter("rloo", "reinforce, r minus the mean over the prompt's other completions", "arXiv 2402.14740",
       "third-party code", "reinforce", advantages="leave_one_out")  # fmt: skip
_enter("reinforce_plus_plus", "reinforce, rewards standardised over the global batch, mean over its tokens",
       "arXiv 2501.03262", "third-party code", "reinforce", advantages="batch",
       length_normalization="token")  # fmt: skip
_enter("reinforce_plus_plus_baseline",
       "reinforce, r minus the prompt's mean, standardised over the global batch, mean over its tokens",
       "arXiv 2501.03262", "third-party code", "reinforce", advantages="group_mean_batch_std",
       length_normalization="token")  # fmt: skip
_enter("weighted_sft",
       "-w nll of each sequence, w the reward column as it is, of any sign; mean over the batch's tokens",
       "maximum likelihood", _DERIVED, "reinforce", advantages="given", length_normalization="token")  # fmt: skip
_enter("token_kl", "KL(p || q) or KL(q || p) of each token over the vocabulary, q the reference's", "the definition",
       _DERIVED, function=linear_token_kl, pass_class="B")  # fmt: skip
