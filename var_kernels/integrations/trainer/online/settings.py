"""Settings of online training, what each method takes by default, and what would make no sense."""

import logging
import math
from dataclasses import dataclass

from var_kernels.integrations.trainer.items import whole_prompts
from var_kernels.integrations.trainer.reward_effect import compared_with

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


_ON_POLICY_PAIRS = ("sail_pp", "sail_pr")
_FROZEN_REFERENCE = (*_ON_POLICY_PAIRS, "grpo")


def draws_pairs(method_name: str) -> bool:
    """Whether a pair is two draws as they come, and not the best and the worst of several."""
    return method_name in _ON_POLICY_PAIRS


def resolve(config, method) -> None:
    """Fill in the method's defaults and refuse what makes no sense. ``config``: an AlignConfig, ``method``: its Method.

    Raises:
        ValueError: a method that cannot learn online, a setting out of range, settings that do not go together.
    """
    name = config.method
    if reason := _why_not(name, method):
        raise ValueError(f"online: method {name!r} {reason}")
    pairs = draws_pairs(name)
    if config.generations_per_prompt is None:
        config.generations_per_prompt = 2 if pairs else 8
    if config.sampling_temperature is None:
        config.sampling_temperature = 0.9 if pairs else 1.0
    if config.logp_temperature is None and method.reads_draws:
        config.logp_temperature = config.sampling_temperature
    if config.refresh_reference is None:
        config.refresh_reference = name not in _FROZEN_REFERENCE
    for field in ("iterations", "prompts_per_iteration", "generations_per_prompt", "max_new_tokens",
                  "sampling_batch_size"):  # fmt: skip
        if getattr(config, field) < 1:
            raise ValueError(f"{field}: expected >= 1, got {getattr(config, field)}")
    if config.steps_per_iteration is not None and config.steps_per_iteration < 1:
        raise ValueError(f"steps_per_iteration: expected >= 1, or None, got {config.steps_per_iteration}")
    count, temperature = config.generations_per_prompt, config.sampling_temperature
    if pairs and count != 2:
        raise ValueError(
            f"generations_per_prompt: {name} takes 2 (a pair is two draws of the policy as they come), got {count}"
        )
    compares = compared_with(method, config) == "prompt" and getattr(config, "normalizer", "") != "self_normalised"
    if (method.loss.item == "pair" or method.items is whole_prompts or compares) and count < 2:
        raise ValueError(
            f"generations_per_prompt: {name} compares completions of a prompt and needs at least 2, got {count}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"sampling_temperature: expected finite and > 0, got {temperature}; 1.0 draws from the policy itself"
        )
    if config.importance_cap is not None:
        _check_importance(config, method)
    if config.max_new_tokens >= config.max_length:
        raise ValueError(
            f"max_new_tokens: expected < max_length = {config.max_length}, which holds prompt and completion, got "
            f"{config.max_new_tokens}"
        )
    if config.sync_ref_model:
        raise ValueError("sync_ref_model: online, the reference moves by refresh_reference=True; drop sync_ref_model")
    if config.dataloader_persistent_workers:
        raise ValueError(
            "dataloader_persistent_workers: online, every iteration has other data, which workers that stay do not "
            "see; leave it False"
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
    if not (math.isfinite(config.importance_cap) and config.importance_cap > 0):
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
            f"reference: online, the reference itself drew the completions, so its probability is no part of VAR's "
            f"weights (docs/var.md); pass normalizer='self_normalised', or reference='none', got {config.reference!r} "
            f"with {config.normalizer!r}"
        )
    if not config.refresh_reference:
        raise ValueError(
            "refresh_reference: online VAR's weights are those of completions drawn from the reference, so it must be "
            "the policy at the iteration's start; leave it True"
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
