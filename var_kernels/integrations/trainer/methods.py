"""The methods by name: what an item of a batch is, and what is known before the forward pass.

A step is prepared once for all of its micro-batches on this rank (``prepare``), because normalisers span the global
batch. The micro-batch losses of a step, summed over accumulation steps and ranks, are the loss of the global batch.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from var_kernels.integrations.trainer import collator, row_weights
from var_kernels.integrations.trainer.reward_effect import z_over_batch
from var_kernels.integrations.trainer.row_weights import Prepared, Rows
from var_kernels.losses import LOSSES, MODEL_LOSSES, Loss, dft_loss, quantile_reward, register, soft_value
from var_kernels.losses.advantages import ADVANTAGES
from var_kernels.losses.checks import check_choice, check_range
from var_kernels.losses.token import LENGTH_NORMALIZATIONS
from var_kernels.losses.weights import DEFAULT_NORMALIZER, DEFAULT_REFERENCE
from var_kernels.ops.signatures import DIRECTIONS


@dataclass(frozen=True)
class Method:
    """A loss of the registry with what training it takes.

    items: (rows, config) -> the row numbers of each item. prepare: (step, config, group) -> what to add to the step's
    rows, "weight" (B,) among it, and metrics. columns: (rows, config, training rows) -> what to add to the data's rows
    once. settings: options of the method beside the loss's, name -> (type, default, meaning). head: what is had beside
    the lm_head: "" (nothing), "fitted" (a value, on the reference before training), "value" or "reward" (heads that
    learn with the policy). teacher: whose distributions over the whole vocabulary the loss reads: "given" (those of
    ``ref_model``, a teacher), "reference" (the reference's, which stays in memory) or "" nobody's.
    """

    loss: Loss
    items: Callable[[Any, Any], list[list[int]]]
    need_rewards: str
    prepare: Callable[[Rows, Any, dist.ProcessGroup | None], Prepared]
    settings: dict[str, tuple[type, object, str]] = field(default_factory=dict)
    columns: Callable[[Any, Any, Any], Rows] | None = None
    head: str = ""
    teacher: str = ""

    @property
    def reference(self) -> str:
        """The reference's part: "" (none), "sequence" sums or "token" log-probs."""
        reads = set(self.loss.inputs)
        if reads & {"ref_token_logp", "old_token_logp"}:
            return "token"
        return "sequence" if reads & {"ref_logp", "old_logp"} or self.loss.name == "var" else ""

    @property
    def own_settings(self) -> dict[str, tuple[object, object, str]]:
        """Name -> (type, default, meaning) of the config's fields that are this method's alone: the loss's options
        first."""
        meaning = f"option of the loss {self.loss.name!r}"
        types = self.loss.option_types
        options = {
            name: (types[name], self.loss.defaults.get(name, default), meaning)
            for name, default in self.loss.options.items()
        }
        return options | self.settings

    def check(self, config) -> None:
        """Settings out of range are refused before anything is read: by the loss itself, on no rows, and here."""
        for name in _CHOICES.keys() & self.settings.keys():
            check_choice(name, getattr(config, name), _CHOICES[name])
        if "head_learning_rate" in self.settings:
            check_range("head_learning_rate", config.head_learning_rate, closed=True, remedy="1e-3 is usual")
        if getattr(config, "value_temperature", None) is not None:
            check_range("value_temperature", config.value_temperature, remedy="None takes beta")
        self.loss.function(**self.loss.no_rows(), **self.loss.options_of(config))
        if getattr(config, "baseline", "none") != "none" and config.per_device_train_batch_size == 1:
            raise ValueError(
                f"per_device_train_batch_size must be at least 2 for baseline={config.baseline!r}, the mean over the "
                "other pairs of a micro-batch, got 1; raise it, or pass baseline='none'"
            )


# ---- columns that are known of the whole data set --------------------------------------------------------------------


def _desirable(rows, config, _train) -> Rows:
    """KTO: the chosen of a pair, and completions whose reward is above the threshold."""
    reward = torch.zeros(len(rows)) if rows.reward is None else rows.reward
    desirable = reward > config.desirable_above
    for group, is_pair in zip(rows.groups, rows.is_pair, strict=True):
        if is_pair:
            desirable[group] = torch.tensor([True, False])
    return {"desirable": desirable}


def _quantiles(rows, config, _train) -> Rows:
    """QRPO: each reward's quantile among those of its prompt's completions."""
    reward = rows.reward.clone()
    for group in rows.groups:
        reward[group] = quantile_reward(rows.reward[group], rows.reward[group].expand(len(group), -1))
    return {"reward": reward}


def _soft_values(rows, config, _train) -> Rows:
    """A*-PO: V of each prompt from the rewards of its completions, taken for draws of the reference."""
    temperature = config.beta if config.value_temperature is None else config.value_temperature
    return {"value": soft_value(rows.reward, rows.group, temperature=temperature)}


def _standardised(rows, config, train) -> Rows:
    """DRO: rewards of mean 0 and standard deviation 1 over the training set."""
    spread, mean = torch.std_mean(train.reward, correction=0)
    return {"reward": (rows.reward - mean) / spread.clamp(min=1e-8)} if config.standardise_rewards else {}


_CHOICES = {
    "sft_on": ("best", "all"),
    "label_by": ("draw", "higher"),
    "advantages": ADVANTAGES,
    "length_normalization": LENGTH_NORMALIZATIONS,
}
_LABEL_BY = {
    "label_by": (str, "draw", "online: the label is a draw from sigmoid(r_1 - r_2), or higher: the larger reward wins")
}
_HEAD_RATE = {"head_learning_rate": (float, 1e-3, "of the head beside the lm_head")}
_VAR = {
    "lam": (float, 1.0, "VAR's lambda, in reward units"),
    "normalizer": (str, DEFAULT_NORMALIZER, "VAR's Z: self_normalised, group, batch or batch_mean"),
    "reference": (str, DEFAULT_REFERENCE, "reference term in VAR's weights: none, mean or sum"),
}
_SFT_ON = {"sft_on": (str, "best", "likelihood of the best completion of each prompt (or the chosen one), or of all")}
_SFT = {"items": collator.sft_items, "need_rewards": "optional", "prepare": row_weights.tokens, "settings": _SFT_ON}
_ALOL = {"head": "fitted", "prepare": row_weights.alol}


def _policy_gradient(advantages: str = "group", length_normalization: str = "sequence") -> dict:
    """A policy gradient: advantages by name, and how tokens are weighed where the loss is no mean itself ("")."""
    named = f"from rewards: {', '.join(ADVANTAGES)}"
    settings = {"advantages": (str, advantages, named)}
    if length_normalization:
        of = "sequence (GRPO), token (DAPO), constant (Dr. GRPO) or sum (REINFORCE)"
        settings["length_normalization"] = (str, length_normalization, of)
    shared = {"items": collator.advantage_items, "need_rewards": "required", "prepare": row_weights.policy_gradient}
    return {**shared, "settings": settings}


def _of_loss(loss: Loss) -> dict:
    """The fields of a Method that follow from the loss's signature: items, need_rewards, prepare and head."""
    rated = "required" if {"reward", "advantage"} & set(loss.inputs) else "optional"
    items, need_rewards, prepare = {
        "sequence": (collator.single_rows, rated, row_weights.rows),
        "token": (collator.single_rows, rated, row_weights.tokens),
        "group": (collator.whole_prompts, "required", row_weights.groups),
        "pair": (collator.pairs, "required" if rated == "required" else "unless_pair", row_weights.pairs),
    }[loss.item]
    found = {"items": items, "need_rewards": need_rewards, "prepare": prepare}
    return found | ({"head": "reward", "settings": _HEAD_RATE} if "mu" in loss.inputs else {})


@register(
    "distill",
    pass_class="B",
    formula="KL(pi_T || pi), KL(pi || pi_T) or beta KL(pi_T || mix) + (1 - beta) KL(pi || mix), "
    "mix = beta pi_T + (1 - beta) pi",
    source="GKD, arXiv 2306.13649",
    evidence="derived",
    reads_draws=True,
    of_log_probs=False,
)
def _distillation(
    token_logp: Tensor, *, direction: str = "forward", beta: float = 0.5, teacher_temperature: float = 1.0
) -> Tensor:
    """Options of the divergence from a teacher, ``token_divergence``; the loss itself reads both models' heads."""
    check_choice("direction", direction, DIRECTIONS)
    check_range("beta", beta, high=1.0, remedy="its limits are direction 'forward' and 'reverse'")
    check_range("teacher_temperature", teacher_temperature, remedy="1.0 is the teacher itself")
    return token_logp


@register(
    "asft",
    pass_class="B",
    formula="dft + kl_coef KL(pi_ref || pi)",
    source="ASFT, arXiv 2509.23753",
    evidence="code",
    of_log_probs=False,
)
def _asft(token_logp: Tensor, *, kl_coef: float = 0.1) -> Tensor:
    """DFT's loss of a token; the trainer adds kl_coef times KL(reference || policy) of the whole distributions, as
    ``linear_asft_loss`` does. The reference is the model before training, or ``ref_model``.
    """
    check_range("kl_coef", kl_coef, closed=True, remedy="it weighs the distance from the reference")
    return dft_loss(token_logp)


# What does not follow from the loss: how its rows are chosen and weighed, settings of the method, heads, teachers.
_ENTRIES = {
    "var": {
        "items": collator.var_items,
        "need_rewards": "required",
        "prepare": row_weights.var,
        "settings": _VAR,
        "columns": z_over_batch,
    },
    **dict.fromkeys(("sft", "dft", "iw_sft", "iw_sft_token", "psft", "eaft", "chord_phi"), _SFT),
    "asft": {**_SFT, "teacher": "reference"},
    "distill": {**_SFT, "teacher": "given"},
    "ava_d": {**_SFT, "prepare": row_weights.rows, "settings": {**_SFT_ON, **_HEAD_RATE}},
    "awr": {"prepare": row_weights.awr},
    "sail_pr": {"settings": _LABEL_BY},
    "kto": {
        "items": collator.judged_rows,
        "need_rewards": "unless_pair",
        "columns": _desirable,
        "settings": {"desirable_above": (float, 0.0, "completions with a reward above this are desirable")},
    },
    "qrpo": {"columns": _quantiles},
    "astar_po": {
        "columns": _soft_values,
        "settings": {"value_temperature": (float | None, None, "of V, in reward units; None: beta")},
    },
    "dro": {
        "columns": _standardised,
        "head": "value",
        "settings": {
            "standardise_rewards": (bool, True, "rewards of mean 0 and standard deviation 1 over the training set"),
            **_HEAD_RATE,
        },
    },
    **dict.fromkeys(("alol", "alol_seq", "alol_ref_free", "alol_kl"), _ALOL),
    "rgold": {"prepare": row_weights.rgold},
    **dict.fromkeys(("ppo", "grpo", "sapo"), _policy_gradient()),
    **dict.fromkeys(("cispo", "vespo"), _policy_gradient(length_normalization="token")),
    "gspo": _policy_gradient(length_normalization=""),
    "reinforce": _policy_gradient("leave_one_out", "sum"),
    "topr": _policy_gradient("given", "sum"),
}


def _method(loss: Loss) -> Method:
    entry: Any = _ENTRIES.get(loss.name, {})
    return Method(**{"loss": loss, **_of_loss(loss), **entry})


# This library's own losses; one of the user's becomes a method by find_method.
METHODS = {
    name: _method(loss)
    for name, loss in sorted({**LOSSES, **MODEL_LOSSES}.items())
    if loss.function.__module__.startswith("var_kernels.")
}
# what a row of data has without a method's help
_IN_THE_DATA = frozenset(["reward", "ref_logp", "old_logp", "ref_token_logp", "old_token_logp", "group_ids"])


def find_method(name: str) -> Method:
    """The method of that name, or what a loss that was registered since (``register``) makes by its signature alone.

    Raises:
        ValueError: neither is there, or the loss reads what the data do not have.
    """
    if name in METHODS:
        return METHODS[name]
    if name not in LOSSES:
        raise ValueError(f"method must be one of {', '.join(sorted(METHODS))}, got {name!r}")
    if missing := sorted(set(LOSSES[name].inputs) - _IN_THE_DATA):
        raise ValueError(
            f"method: the inputs of {name!r} must be among the trainer's ({', '.join(sorted(_IN_THE_DATA))}), got "
            f"{', '.join(missing)}; make it of these, or call linear_loss in a loop of your own"
        )
    loss, empty = LOSSES[name], inspect.Parameter.empty
    if open_ones := [option for option, default in {**loss.options, **loss.defaults}.items() if default is empty]:
        raise ValueError(
            f"method: {name!r} needs a default for {', '.join(open_ones)}; give it in the loss's signature, or as "
            "defaults of register"
        )
    METHODS[name] = _method(loss)
    return METHODS[name]
