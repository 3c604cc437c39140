"""The settings of ``VARTrainer``: those of transformers.TrainingArguments, the ones that every method shares, those of
online training, and each method's own. One class per method, made from ``METHODS``.
"""

import dataclasses
import logging
import math
import sys
import typing
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import NoneType
from typing import ClassVar

import torch
from transformers import TrainingArguments

from var_kernels.integrations.trainer.collator import whole_prompts
from var_kernels.integrations.trainer.methods import METHODS, Method, find_method
from var_kernels.integrations.trainer.reward_effect import compared_with
from var_kernels.losses import VARIANTS
from var_kernels.losses.checks import check_choice
from var_kernels.losses.weights import DEFAULT_NORMALIZER, DEFAULT_REFERENCE, NORMALIZERS, check_weight_options

logger = logging.getLogger(__name__)


@dataclass
class OnlineSettings:
    """Settings of online training, part of ``AlignConfig``. Completions come from the policy, not from the data.

    Args:
        online: draw completions from the current policy at the start of every iteration and train on those. The data
            give prompts; rewards come from a function or a reward model.
        iterations: rounds of drawing and training; they take the place of ``num_train_epochs``. ``max_steps`` may end
            the run earlier.
        prompts_per_iteration: taken from the data in a new order at each pass over them.
        generations_per_prompt: K; None: 2 for sail_pp and sail_pr (which take no other number), 8 for the others.
        steps_per_iteration: optimiser steps; None: one pass over what was drawn.
        max_new_tokens: longest completion. Prompts keep their last ``max_length - max_new_tokens`` tokens.
        sampling_temperature: > 0; None: 0.9 for sail_pp and sail_pr, 1.0 for the others. Nothing else is applied, such
            as top-k, top-p or a repetition penalty, whatever the model's generation settings say.
        logp_temperature: > 0, of the log-probs that the loss and the metrics read: the policy's, those of the policy
            that drew, and the reference's. None: online, where the loss takes completions for draws of the policy (the
            policy gradients, rlol, rgold, weighted_bc, sail_pp, sail_pr, var, qrpo, astar_po, gvpo, target_po and
            distill), sampling_temperature; 1.0 elsewhere.
        importance_cap: with a ``sampler`` of another engine, whose probabilities are slightly others: losses of tokens
            (ppo, grpo, cispo, sapo, ...) are multiplied by min(exp(lp_old - lp_sampler), cap) at each token, lp_old of
            the policy as it drew. 2.0 is usual. None: no weights. ``sampler_logp_gap`` is logged in any case.
        sampling_batch_size: completions that are drawn at once, on each rank.
        refresh_reference: the reference is the policy at the iteration's start; False: the model that training began
            with. None: False for sail_pp, sail_pr and grpo, True for the others.
        keep_initial_model: log ``sample_kl``, an estimate of KL(policy, initial model) on the fresh completions. It
            takes a copy of the model in memory (none with an adapter) and a forward pass.
    """

    online: bool = False
    iterations: int = 10
    prompts_per_iteration: int = 64
    generations_per_prompt: int | None = None
    steps_per_iteration: int | None = None
    max_new_tokens: int = 128
    sampling_temperature: float | None = None
    logp_temperature: float | None = None
    importance_cap: float | None = None
    sampling_batch_size: int = 64
    refresh_reference: bool | None = None
    keep_initial_model: bool = True


@dataclass
class AlignConfig(OnlineSettings, TrainingArguments):
    """Settings that all methods share. Take a method's own class: ``VARConfig``, or ``method_config("ipo")``.

    Args:
        max_length: tokens of prompt and completion together; longer rows are cut (see ``encode_examples``).
        precompute_ref_log_probs: score the data with the reference once, before training, and keep the result in
            ``cache_dir``.
            False: score each batch as it comes, with a frozen copy of the model.
        cache_dir: where reference log-probs are kept; by default $VAR_KERNELS_CACHE, else ~/.cache/var_kernels.
        disable_dropout: set every dropout of the model to 0, so that policy and reference differ by their weights
            alone.
        sync_ref_model: move the reference towards the policy: every ``ref_model_sync_steps`` steps, reference = a *
            policy + (1 - a) * reference with a = ``ref_model_mixup_alpha``. Only with
            ``precompute_ref_log_probs=False``.
        workspace_mb: memory for the loss's temporaries; None: the default of ``var_kernels.ops``.
        online, iterations, ...: see ``OnlineSettings``.
    """

    method: ClassVar[str] = ""

    max_length: int = 1024
    precompute_ref_log_probs: bool = True
    cache_dir: str | None = None
    disable_dropout: bool = True
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    workspace_mb: float | None = None

    # Other defaults than TrainingArguments': rows carry more than the model's arguments, and a curve needs points.
    remove_unused_columns: bool = False
    logging_steps: float = 10
    logging_first_step: bool = True
    learning_rate: float = field(default=1e-5, metadata={"help": "peak learning rate"})

    def __post_init__(self):
        _read_numbers(self)
        _check_types(self)
        # Checked first: TrainingArguments' own __post_init__ may already touch devices and directories.
        if self.method not in METHODS:
            raise TypeError(
                "the settings must be those of a method, got AlignConfig, which has none; use VARConfig, or "
                "method_config(name)"
            )
        self._check_method()
        _check_ranges(
            self,
            ("max_length", self.max_length >= 2, ">= 2 tokens"),
            ("workspace_mb", self.workspace_mb is None or _positive(self.workspace_mb), "finite and > 0, or None"),
            ("learning_rate", math.isfinite(self.learning_rate) and self.learning_rate >= 0, "finite and >= 0"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, ">= 1"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, ">= 1"),
            ("adam_beta1", 0 <= self.adam_beta1 < 1, ">= 0 and < 1"),
            ("adam_beta2", 0 <= self.adam_beta2 < 1, ">= 0 and < 1"),
            ("adam_epsilon", _positive(self.adam_epsilon), "finite and > 0"),
            ("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "finite and >= 0"),
            ("dataloader_num_workers", self.dataloader_num_workers >= 0, ">= 0"),
            ("max_steps", self.max_steps != 0, ">= 1, or -1 for num_train_epochs"),
            ("num_train_epochs", _positive(self.num_train_epochs) or self.max_steps > 0, "finite and > 0"),
            ("ref_model_mixup_alpha", not self.sync_ref_model or 0 < self.ref_model_mixup_alpha <= 1, "in (0, 1]"),
            ("ref_model_sync_steps", not self.sync_ref_model or self.ref_model_sync_steps >= 1, ">= 1"),
        )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs must be False with sync_ref_model, where the reference moves, got True; pass "
                "precompute_ref_log_probs=False (a frozen copy of the model then stays in memory)"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {self.label_smoothing_factor}; the losses here are those of "
                "the labels as they are (dpo's smoothing is its option label_smoothing)"
            )
        sampling = getattr(self, "train_sampling_strategy", "random")
        if sampling not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy must be 'random' or 'sequential', got {sampling!r}; batches made by "
                "length change what Z is estimated from"
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must be False, got True; rewards and reference log-probs travel with the rows"
            )
        if self.online:
            resolve(self, METHODS[self.method])
            self.num_train_epochs: float = float(self.iterations)
        self.logp_temperature = 1.0 if self.logp_temperature is None else self.logp_temperature
        _check_ranges(self, ("logp_temperature", _positive(self.logp_temperature), "finite and > 0"))
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # torch warns about it at every start
        try:
            super().__post_init__()
        except ValueError as error:
            if "bf16" not in str(error) or "use_cpu" not in str(error):
                raise
            raise ValueError(
                "bf16 must be False where transformers finds no accelerator that computes in it (see `var-kernels "
                "doctor`), got True; to train in bf16 on the CPU pass use_cpu=True (--use-cpu)"
            ) from error

    @property
    def items_per_step(self) -> int:
        """Items of an optimiser step, over accumulation steps and ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def _check_method(self) -> None:
        """The method's own settings, by the loss's own checks: it is called on no rows at all."""
        METHODS[self.method].check(self)


def _read_numbers(config: AlignConfig) -> None:
    """Numbers that came as text: YAML reads 1e-4, without a point, as a string. NaN is none."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name, None)
        kinds = [kind, *typing.get_args(kind)]
        if isinstance(value, str) and str not in kinds and (float in kinds or int in kinds):
            wanted = float if float in kinds else int
            try:
                setattr(config, name, wanted(value))
            except ValueError:
                text = f"{name} must be of type {wanted.__name__}, got {value!r}; write a number"
                raise ValueError(text) from None
        value = getattr(config, name, None)
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name} must be a number, got nan; write one, or leave it out")


def _check_types(config: AlignConfig) -> None:
    """Settings of this library that are numbers or flags: "no" is no False, True no rate, None only where allowed."""
    for name, kind in typing.get_type_hints(type(config)).items():
        kinds = set(typing.get_args(kind) or (kind,))
        if name in TrainingArguments.__dataclass_fields__ or not kinds <= _ABSTRACT.keys():
            continue
        value = getattr(config, name)
        taken = kinds | ({int} if float in kinds else set())
        if not any(isinstance(value, _ABSTRACT[kind]) and isinstance(value, bool) <= (kind is bool) for kind in taken):
            wanted = " or ".join("None" if kind is NoneType else kind.__name__ for kind in sorted(kinds, key=str))
            raise ValueError(
                f"{name} must be of type {wanted}, got {value!r:.60}; help() of its class lists the settings"
            )


_ABSTRACT = {bool: bool, int: Integral, float: Real, NoneType: NoneType}


def _check_ranges(config, *rows: tuple[str, bool, str]) -> None:
    """rows: the name of a setting, whether it is in range, and what is."""
    for name, good, wanted in rows:
        if not good:
            raise ValueError(f"{name} must be {wanted}, got {getattr(config, name)}")


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


@dataclass
class VARConfig(AlignConfig):
    """Settings of ``VARTrainer`` for VAR: ``AlignConfig``'s, and

    Args:
        lam: VAR's lambda > 0, in reward units: small follows the reward, large stays with the reference.
        normalizer: how VAR estimates Z: "self_normalised", "group", "batch" or "batch_mean", over the global batch
            (all ranks and accumulation steps). "self_normalised" and "group" make an item of a batch of a prompt with
            all its completions. Where no prompt has two, "self_normalised" is taken over the batch, and "group", in
            which every weight would be 1, is refused.
        reference: the reference term in VAR's weights: "none", "mean" per token or "sum" (with sums the weights of
            ordinary texts collapse onto one sequence of a batch). "self_normalised" has none.
    """

    method: ClassVar[str] = "var"

    lam: float = 1.0
    normalizer: str = DEFAULT_NORMALIZER
    reference: str = DEFAULT_REFERENCE

    def _check_method(self) -> None:
        if self.normalizer == "cross":
            raise ValueError(
                "normalizer must be 'batch', 'batch_mean', 'group' or 'self_normalised' in the trainer, got 'cross', "
                "which needs the reference's score of every completion under every prompt; use VARLoss in a loop of "
                "your own for it"
            )
        check_choice("normalizer", self.normalizer, tuple(name for name in NORMALIZERS if name != "cross"))
        self.reference = check_weight_options(self.lam, self.normalizer, self.reference)


def method_config(method: str) -> type[typing.Any]:
    """The class of a method's settings: ``method_config("ipo")(output_dir="runs/ipo", tau=0.1)``.

    Its fields beside ``AlignConfig``'s are the options of the loss (``LOSSES["ipo"].options``) and of the method. A
    loss of your own is a method once it is registered (docs/losses.md).

    Raises:
        ValueError: an unknown method.
    """
    if method in VARIANTS:
        use = VARIANTS[method].use
        raise ValueError(f"method must be no variant, got {method!r}; use {use}, and give its settings by name")
    if method not in METHOD_CONFIGS:
        METHOD_CONFIGS[method] = _make_config(method, find_method(method))
    return METHOD_CONFIGS[method]


def _make_config(name: str, method: Method) -> type[AlignConfig]:
    own = [
        (option, kind, field(default=default, metadata={"help": meaning}))
        for option, (kind, default, meaning) in method.own_settings.items()
    ]
    class_name = (
        f"{''.join(part.upper() if len(part) < 5 else part.capitalize() for part in name.split('_'))}AlignConfig"
    )
    meanings = "\n".join(f"        {option}: {meaning}." for option, (_, _, meaning) in method.own_settings.items())
    title = f"Settings of ``VARTrainer`` for {name!r}: ``AlignConfig``'s, and"
    doc = f"{title}\n\n    Args:\n{meanings}\n\n    Loss: {method.loss.formula}.\n    "
    made = dataclasses.make_dataclass(
        class_name, own, bases=(AlignConfig,), namespace={"method": name, "__doc__": doc, "__module__": __name__}
    )
    setattr(sys.modules[__name__], class_name, made)  # where pickle looks: Trainer saves its arguments
    return made


METHOD_CONFIGS = {name: VARConfig if name == "var" else _make_config(name, method) for name, method in METHODS.items()}


# ---- online training: defaults and refusals --------------------------------------------------------------------------


_ON_POLICY_PAIRS = ("sail_pp", "sail_pr")
_FROZEN_REFERENCE = (*_ON_POLICY_PAIRS, "grpo")


def draws_pairs(method_name: str) -> bool:
    """True where a pair is two draws as they come, and not the best and the worst of several."""
    return method_name in _ON_POLICY_PAIRS


def resolve(config, method) -> None:
    """Fill in the method's defaults and refuse what makes no sense. ``config``: an AlignConfig, ``method``: its Method.

    Raises:
        ValueError: a method that cannot learn online, a setting out of range, settings that do not go together.
    """
    name = config.method
    if reason := _why_not(name, method):
        raise ValueError(f"online must be False for method {name!r}, got True; it {reason}")
    pairs = draws_pairs(name)
    if config.generations_per_prompt is None:
        config.generations_per_prompt = 2 if pairs else 8
    if config.sampling_temperature is None:
        config.sampling_temperature = 0.9 if pairs else 1.0
    if config.logp_temperature is None and method.loss.reads_draws:
        config.logp_temperature = config.sampling_temperature
    if config.refresh_reference is None:
        config.refresh_reference = name not in _FROZEN_REFERENCE
    counts = ("iterations", "prompts_per_iteration", "generations_per_prompt", "max_new_tokens", "sampling_batch_size")
    steps = config.steps_per_iteration
    _check_ranges(
        config,
        *((setting, getattr(config, setting) >= 1, ">= 1") for setting in counts),
        ("steps_per_iteration", steps is None or steps >= 1, ">= 1, or None"),
    )
    count, temperature = config.generations_per_prompt, config.sampling_temperature
    if pairs and count != 2:
        raise ValueError(
            f"generations_per_prompt must be 2 for {name}, got {count}; a pair is two draws of the policy as they come"
        )
    compares = compared_with(method, config) == "prompt" and getattr(config, "normalizer", "") != "self_normalised"
    if (method.loss.item == "pair" or method.items is whole_prompts or compares) and count < 2:
        raise ValueError(
            f"generations_per_prompt must be at least 2 for {name}, got {count}; it compares completions of a prompt"
        )
    if not _positive(temperature):
        raise ValueError(
            f"sampling_temperature must be finite and > 0, got {temperature}; 1.0 draws from the policy itself"
        )
    if config.importance_cap is not None:
        _check_importance(config, method)
    if config.max_new_tokens >= config.max_length:
        raise ValueError(
            f"max_new_tokens must be < max_length = {config.max_length}, which holds prompt and completion, got "
            f"{config.max_new_tokens}; raise max_length"
        )
    if config.sync_ref_model:
        raise ValueError(
            "sync_ref_model must be False online, where refresh_reference=True moves the reference, got True; drop "
            "sync_ref_model"
        )
    if config.dataloader_persistent_workers:
        raise ValueError(
            "dataloader_persistent_workers must be False online, where every iteration has other data, which workers "
            "that stay do not see, got True; leave it False"
        )
    if name == "var":
        _check_var(config)


def say_temperatures(config, generation_config) -> None:
    """One line where draws, or the log-probs of them, are at another temperature than 1; one where the model's own
    generation settings would have cut the distribution."""
    drawn, read = config.sampling_temperature, config.logp_temperature
    if drawn != read:
        logger.warning(
            "completions are drawn at temperature %g, and the loss of %r reads log-probs at temperature %g; "
            "logp_temperature=%g makes them one", drawn, config.method, read, drawn,
        )  # fmt: skip
    elif drawn != 1:
        logger.warning(
            "temperature %g: of the draws, and of the log-probs of policy and reference that the loss of %r reads "
            "(logp_temperature sets another)", drawn, config.method,
        )  # fmt: skip
    neutral = {
        "top_k": (0, 50, None), "top_p": (1.0, None), "min_p": (0.0, None), "typical_p": (1.0, None), "top_h": (None,),
        "epsilon_cutoff": (0.0, None), "eta_cutoff": (0.0, None), "repetition_penalty": (1.0, None),
        "encoder_repetition_penalty": (1.0, None), "no_repeat_ngram_size": (0, None), "bad_words_ids": (None,),
        "suppress_tokens": (None,), "begin_suppress_tokens": (None,), "sequence_bias": (None,),
        "forced_bos_token_id": (None,), "forced_eos_token_id": (None,), "guidance_scale": (1.0, None),
        "exponential_decay_length_penalty": (None,), "min_length": (0, None), "min_new_tokens": (0, None),
        "temperature": (1.0, drawn, None),
    }  # fmt: skip
    given = {name: getattr(generation_config, name, None) for name in neutral}
    ignored = ", ".join(f"{name}={value}" for name, value in given.items() if value not in neutral[name])
    if ignored:
        logger.warning(
            "the model's generation settings %s are not applied: completions are drawn from the policy itself at "
            "temperature %g, as the losses assume", ignored, drawn,
        )  # fmt: skip


def _check_importance(config, method) -> None:
    if not _positive(config.importance_cap):
        raise ValueError(f"importance_cap must be finite and > 0, got {config.importance_cap}; 2.0 is usual")
    if method.loss.item != "token":
        raise ValueError(
            f"importance_cap must be None for method {config.method!r}, got {config.importance_cap}; it weighs "
            "losses of tokens: ppo, grpo, cispo, sapo"
        )
    if config.logp_temperature != config.sampling_temperature:
        raise ValueError(
            f"logp_temperature must be that of the draws, {config.sampling_temperature}, for importance_cap, got "
            f"{config.logp_temperature}; leave it out"
        )


def _check_var(config) -> None:
    if config.reference != "none":
        raise ValueError(
            "reference must be 'none' online, where the reference itself drew the completions and its probability is "
            f"no part of VAR's weights (docs/var.md), got {config.reference!r} with normalizer={config.normalizer!r}; "
            "pass normalizer='self_normalised', or reference='none'"
        )
    if not config.refresh_reference:
        raise ValueError(
            "refresh_reference must be True for VAR online, whose weights are those of completions drawn from the "
            "reference, got False; leave it True"
        )


def _why_not(name: str, method) -> str:
    if name == "sail_dp":
        return "learns from the responses of a data set; sail_pp and sail_pr are its online kin"
    if method.head == "reward":
        return "learns a reward model from demonstrations or pairs, which the policy's own completions are not"
    if method.teacher == "reference":
        return "learns from demonstrations, near the model that it began with; grpo holds draws near it"
    if method.head == "fitted":
        return "fits its values on the data before training; use weighted_bc, awr or rlol online"
    return ""
