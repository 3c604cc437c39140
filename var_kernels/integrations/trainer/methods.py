"""The methods by name: what an item of a batch is, what is known before the forward pass, and the loss inside the
lm_head.

A step is prepared once for all of its micro-batches on this rank (``prepare``), because normalisers span the global
batch. The micro-batch losses of a step, summed over accumulation steps and ranks, are the loss of the global batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from var_kernels.integrations.hf.logprobs import IGNORE_INDEX
from var_kernels.integrations.trainer import items
from var_kernels.integrations.trainer.values import prompt_end
from var_kernels.losses import (
    LOSSES,
    Loss,
    alol_advantage,
    bradley_terry_loss,
    dro_value_loss,
    group_advantage,
    linear_loss,
    quantile_reward,
    single_name,
    standardised_advantage,
    var_weights,
)
from var_kernels.losses.ava import last_value
from var_kernels.losses.segments import group_rows
from var_kernels.losses.sequences import sequence_sum
from var_kernels.losses.token import LENGTH_NORMALIZATIONS

Rows = dict[str, Tensor]  # of a micro-batch or a whole step: "reward", "ref_logp", "group", "length", "weight" (B,)
Prepared = tuple[Rows, dict[str, Tensor]]  # what to add to the step's rows, metrics: () of the global batch, or (B,)


@dataclass(frozen=True)
class Method:
    """How a loss of the registry is trained.

    items: (rows, config) -> the row numbers of each item. prepare: (step, config, group) -> what to add to the step's
    rows, "weight" (B,) among it, and metrics. columns: (rows, config, training rows) -> what to add to the data's rows
    once. defaults: of the loss's options that have none. settings: options of the method beside the loss's, name ->
    (type, default, meaning). head: what is had beside the lm_head: "" (nothing), "fitted" (a value, on the reference
    before training), "value" or "reward" (heads that learn with the policy). policy_labels: chosen and rejected change
    places as the policy itself would label them.
    """

    loss: Loss
    items: Callable[[Any, Any], list[list[int]]]
    need_rewards: str
    prepare: Callable[[Rows, Any, dist.ProcessGroup | None], Prepared]
    defaults: dict[str, object] = field(default_factory=dict)
    settings: dict[str, tuple[type, object, str]] = field(default_factory=dict)
    columns: Callable[[Any, Any, Any], Rows] | None = None
    head: str = ""
    policy_labels: bool = False

    @property
    def reference(self) -> str:
        """What of the reference is read: "" (nothing), "sequence" sums or "token" log-probs."""
        reads = set(self.loss.inputs)
        if reads & {"ref_token_logp", "old_token_logp"}:
            return "token"
        return "sequence" if "ref_logp" in reads or self.loss.name == "var" else ""

    @property
    def reads_policy(self) -> bool:
        """Whether the loss reads log-probs of the lm_head, and not the head beside it alone."""
        return any(single_name(name)[0] in ("policy_logp", "token_logp") for name in self.loss.tensors)

    @property
    def own_settings(self) -> dict[str, tuple[object, object, str]]:
        """Name -> (type, default, meaning) of the config's fields that are this method's alone: the loss's options
        first."""
        meaning = f"option of {self.loss.function.__name__}"
        types = self.loss.option_types
        options = {
            name: (types[name], self.defaults.get(name, default), meaning)
            for name, default in self.loss.options.items()
        }
        return options | self.settings

    def check(self, config) -> None:
        """Settings out of range are refused before anything is read: by the loss itself, on no rows, and here."""
        if "sft_on" in self.settings and config.sft_on not in ("best", "all"):
            raise ValueError(f"sft_on: expected 'best' or 'all', got {config.sft_on!r}")
        if "label_by" in self.settings and config.label_by not in ("draw", "higher"):
            raise ValueError(f"label_by: expected 'draw' or 'higher', got {config.label_by!r}")
        if "length_normalization" in self.settings and config.length_normalization not in LENGTH_NORMALIZATIONS:
            raise ValueError(
                f"length_normalization: expected one of {LENGTH_NORMALIZATIONS}, got {config.length_normalization!r}"
            )
        self.loss.function(**self.loss.no_rows(), **self.loss_options(config))
        if getattr(config, "baseline", "none") != "none" and config.per_device_train_batch_size == 1:
            raise ValueError(
                f"baseline: {config.baseline!r} is the mean over the other pairs of a micro-batch, and "
                "per_device_train_batch_size=1 leaves none; take 2 or more"
            )

    def loss_options(self, config) -> dict[str, object]:
        return {name: getattr(config, name) for name in self.loss.options}


# ---- what is known before the forward pass ---------------------------------------------------------------------------


def _total(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def _equal_weights(step: Rows, group, number_of_items: Tensor | None = None) -> Tensor:
    """(B,) fp64: 1 / number of items of the global batch; rows unless told otherwise."""
    length = step["length"]
    count = torch.tensor(len(length), device=length.device) if number_of_items is None else number_of_items
    return (1.0 / _total(count.double(), group).clamp(min=1)).expand(len(length))


def _prepare_var(step: Rows, config, group) -> Prepared:
    grouped = config.normalizer in ("group", "self_normalised")
    weights = var_weights(
        step["reward"],
        step["ref_logp"] if config.reference != "none" else None,
        lam=config.lam,
        normalizer=config.normalizer,
        reference=config.reference,
        lengths=step["length"],
        group_ids=step["group"] if grouped else None,
        process_group=group,
    )
    weight, log_z = weights.weight.double(), weights.log_z.double()
    log_z_sum = log_z.sum() if log_z.dim() else log_z * len(weight)
    size, total, log_z_total = _total(torch.stack([weight.new_tensor(len(weight)), weight.sum(), log_z_sum]), group)
    # The estimators differ in sum w (1, B, the number of prompts); divided by it, lam alone decides and not the batch
    # size.
    share = weight / total
    entropy = _total(torch.special.entr(share).sum(), group)
    metrics = {
        "ess": weights.ess,
        "ess_share": weights.ess / size,
        "log_z": log_z_total / size,
        "weight_entropy": entropy,
    }
    return {"weight": share, "sample_weight": torch.ones_like(share)}, metrics


def _prepare_tokens(step: Rows, config, group) -> Prepared:
    """Mean over the tokens of the global batch."""
    return {"weight": _equal_weights(step, group, step["length"].sum())}, {}


def _prepare_rows(step: Rows, config, group) -> Prepared:
    return {"weight": _equal_weights(step, group)}, {}


def _prepare_pairs(step: Rows, config, group) -> Prepared:
    return {"weight": 2.0 * _equal_weights(step, group)}, {}


def _prepare_groups(step: Rows, config, group) -> Prepared:
    """A row's term is its part of the prompt's loss: mean over the prompts of the global batch."""
    return {"weight": _equal_weights(step, group, group_rows(step["group"]).count())}, {}


def _prepare_awr(step: Rows, config, group) -> Prepared:
    advantage = standardised_advantage(step["reward"], process_group=group)
    return {"weight": _equal_weights(step, group), "advantage": advantage}, {}


def _prepare_alol(step: Rows, config, group) -> Prepared:
    advantage = alol_advantage(step["reward"], step["value"], squash=getattr(config, "squash", True))
    return {"weight": _equal_weights(step, group), "advantage": advantage}, {"kept_share": advantage > 0}


def _prepare_rgold(step: Rows, config, group) -> Prepared:
    return {"weight": _equal_weights(step, group), "advantage": step["reward"].sigmoid()}, {}


def _prepare_group_relative(step: Rows, config, group) -> Prepared:
    """Advantages within a prompt, (r - mean) / std, and the weights of GRPO, DAPO or Dr. GRPO."""
    groups = group_rows(step["group"])
    tied = groups.max(step["reward"]) == -groups.max(-step["reward"])
    advantage = group_advantage(step["reward"], step["group"], divide_by_std=config.advantage_std)
    length = step["length"].clamp(min=1)
    if config.length_normalization == "sequence":
        weight = _equal_weights(step, group) / length
    elif config.length_normalization == "token":
        weight = _equal_weights(step, group, step["length"].sum())
    else:
        longest = config.max_new_tokens if config.online else config.max_length
        weight = _equal_weights(step, group) / longest
    return {"weight": weight, "advantage": advantage}, {"tied_share": tied}


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


def _standardised(rows, config, train) -> Rows:
    """DRO: rewards of mean 0 and standard deviation 1 over the training set."""
    spread, mean = torch.std_mean(train.reward, correction=0)
    return {"reward": (rows.reward - mean) / spread.clamp(min=1e-8)} if config.standardise_rewards else {}


# ---- losses inside the head ------------------------------------------------------------------------------------------


class HeadResult(NamedTuple):
    """loss: the micro-batch's share of it, (). token_logp: of the labels, (B, T), and logp, of the sequences, (B,); 0
    where not computed. hits: the label is the most likely token, (B, T). computed: where the head was computed at all,
    (B, T): one pass leaves out what has no weight. score: what the policy or its reward head makes of each sequence,
    (B,); pairs are judged by it."""

    loss: Tensor
    token_logp: Tensor
    logp: Tensor
    hits: Tensor
    computed: Tensor
    score: Tensor


def loss_in_head(
    method: Method,
    hidden: Tensor,
    head,
    labels: Tensor,
    rows: Rows,
    config,
    *,
    extra_head=None,
    process_group=None,
    label_generator=None,
) -> "HeadResult":
    """What the head computes for a micro-batch. A method that does not read the policy makes no logits, and has zeros
    for log-probs and hits."""
    loss = method.loss
    inputs = {name: rows[name] for name in loss.inputs if name in rows}
    kept = labels != IGNORE_INDEX
    if not method.reads_policy:
        score_B = last_value(extra_head(hidden)[0], kept)
        items = loss.function(score_B[0::2], score_B[1::2], **method.loss_options(config))
        loss, nothing, score_B = (items * rows["weight"][0::2]).sum(), torch.zeros_like(kept), score_B.detach()
        return HeadResult(loss, nothing.to(score_B), torch.zeros_like(score_B), nothing, nothing, score_B)
    if method.head == "reward":
        inputs["mu"], inputs["log_sigma"] = extra_head(hidden)
    elif method.head == "value":
        inputs["value"] = extra_head(hidden.detach(), prompt_end(labels))
    total, logp, argmax = linear_loss(
        loss.name,
        hidden,
        head.lm_head_weight,
        labels,
        inputs,
        head.bias,
        item_weight=rows["weight"][0::2] if loss.item == "pair" else rows["weight"],
        head_options={**head.logit_options, "workspace_mb": config.workspace_mb},
        process_group=process_group,
        label_generator=label_generator,
        return_logp=True,
        return_argmax=True,
        **method.loss_options(config),
    )
    logp_B = sequence_sum(logp, labels)
    if method.head == "value":
        given = (inputs["value"], logp_B, inputs["ref_logp"], inputs["reward"])
        total = total + (dro_value_loss(*given, tau=config.tau) * rows["weight"]).sum().to(total.dtype)
    score_B = last_value(inputs["mu"], kept) if method.head == "reward" else logp_B
    return HeadResult(total, logp, logp_B, argmax == labels, argmax >= 0, score_B.detach())


_SFT_ON = {"sft_on": (str, "best", "likelihood of the best completion of each prompt (or the chosen one), or of all")}
_GROUP_RELATIVE = {
    "advantage_std": (bool, True, "divide advantages by their standard deviation within the prompt"),
    "length_normalization": (str, "sequence", "sequence (GRPO), token (DAPO) or constant (Dr. GRPO)"),
}
_LABEL_BY = {
    "label_by": (str, "draw", "online: the label is a draw from sigmoid(r_1 - r_2), or higher: the larger reward wins")
}
_HEAD_RATE = {"head_learning_rate": (float, 1e-3, "of the head beside the lm_head")}
_VAR = {
    "lam": (float, 1.0, "VAR's lambda, in reward units"),
    "normalizer": (str, "batch", "VAR's Z: batch, batch_mean, group or self_normalised"),
    "reference": (str, "mean", "reference term in VAR's weights: mean, sum or none"),
}
_PAIR = {"items": items.pairs, "need_rewards": "unless_pair", "prepare": _prepare_pairs}
_RATED = {"items": items.single_rows, "need_rewards": "required", "prepare": _prepare_rows}
_ALOL = {**_RATED, "head": "fitted", "prepare": _prepare_alol}
_RANKED = {"items": items.whole_prompts, "need_rewards": "required", "prepare": _prepare_groups}


def _methods(**entries: dict) -> dict[str, Method]:
    return {name: Method(**{"loss": LOSSES.get(name), **entry}) for name, entry in entries.items()}


def _bradley_terry(chosen_mu: Tensor, rejected_mu: Tensor) -> Tensor:
    """A reward model on pairs, ``bradley_terry_loss`` of the reward head's mu at the last token: (P,), (P,) -> (P,).

    The hidden states go to that head alone; the lm_head is not computed, and its weight, if it is not the embedding's
    too, is left as it is.
    """
    return bradley_terry_loss(chosen_mu, rejected_mu)


# No loss of the registry: it reads no log-prob.
BRADLEY_TERRY = Loss(
    name="bradley_terry",
    function=_bradley_terry,
    pass_class="C",
    item="pair",
    formula="-log sigmoid(r_w - r_l), r = mu of the reward head at the last token",
    source="Bradley and Terry (1952)",
    evidence="derived",
)


METHODS = _methods(
    var={"items": items.var_items, "need_rewards": "required", "prepare": _prepare_var, "settings": _VAR},
    sft={"items": items.sft_items, "need_rewards": "optional", "prepare": _prepare_tokens, "settings": _SFT_ON},
    dft={"items": items.sft_items, "need_rewards": "optional", "prepare": _prepare_tokens, "settings": _SFT_ON},
    raft=_RANKED,
    awr={**_RATED, "prepare": _prepare_awr, "defaults": {"beta": 1.0}},
    weighted_bc=_RATED,
    dpo={**_PAIR, "defaults": {"beta": 0.1}},
    robust_dpo={**_PAIR, "defaults": {"beta": 0.1, "label_smoothing": 0.1}},
    ipo={**_PAIR, "defaults": {"tau": 0.1}},
    hinge={**_PAIR, "defaults": {"beta": 0.1}},
    slic={**_PAIR, "defaults": {"delta": 1.0, "target_weight": 0.1}},
    simpo={**_PAIR, "defaults": {"beta": 2.0, "gamma": 1.0}},
    orpo={**_PAIR, "defaults": {"odds_weight": 0.1}},
    rebel={**_PAIR, "need_rewards": "required", "defaults": {"eta": 1.0}},
    sail_dp={**_PAIR, "defaults": {"beta": 0.1}, "policy_labels": True},
    sail_pp={**_PAIR, "defaults": {"beta": 0.1}, "policy_labels": True},
    sail_pr={**_PAIR, "defaults": {"beta": 0.1}, "settings": _LABEL_BY},
    exo={**_RANKED, "defaults": {"beta": 0.1, "reward_temperature": 1.0}},
    lire={**_RANKED, "defaults": {"temperature": 1.0}},
    kto={
        "items": items.judged_rows,
        "need_rewards": "unless_pair",
        "prepare": _prepare_rows,
        "columns": _desirable,
        "defaults": {"beta": 0.1},
        "settings": {"desirable_above": (float, 0.0, "completions with a reward above this are desirable")},
    },
    qrpo={**_RATED, "columns": _quantiles, "defaults": {"beta": 0.1}},
    dro={
        **_RATED,
        "columns": _standardised,
        "head": "value",
        "defaults": {"tau": 1.0},
        "settings": {
            "standardise_rewards": (bool, True, "rewards of mean 0 and standard deviation 1 over the training set"),
            **_HEAD_RATE,
        },
    },
    alol=_ALOL,
    alol_seq=_ALOL,
    alol_ref_free=_ALOL,
    alol_kl={**_ALOL, "defaults": {"beta": 0.1}},
    rlol=_RATED,
    rgold={**_RATED, "prepare": _prepare_rgold},
    ava_d={
        "items": items.sft_items,
        "need_rewards": "optional",
        "prepare": _prepare_rows,
        "head": "reward",
        "settings": {**_SFT_ON, **_HEAD_RATE},
    },
    ava_p={**_PAIR, "head": "reward", "settings": _HEAD_RATE},
    bradley_terry={**_PAIR, "loss": BRADLEY_TERRY, "head": "reward", "settings": _HEAD_RATE},
    ppo={**_RANKED, "prepare": _prepare_group_relative, "settings": _GROUP_RELATIVE},
    grpo={**_RANKED, "prepare": _prepare_group_relative, "defaults": {"beta": 0.04}, "settings": _GROUP_RELATIVE},
)
