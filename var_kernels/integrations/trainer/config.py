"""The settings of ``VARTrainer``: those of transformers.TrainingArguments, the ones that every method shares, and each
method's own. One class per method, made from ``METHODS``.
"""

import dataclasses
import math
import sys
import typing
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import TrainingArguments

from var_kernels.integrations.trainer.methods import METHODS, Method, find_method
from var_kernels.integrations.trainer.online.settings import OnlineSettings, resolve
from var_kernels.losses import VARIANTS
from var_kernels.losses.checks import check_choice
from var_kernels.losses.weight_checks import DEFAULT_NORMALIZER, DEFAULT_REFERENCE, NORMALIZERS, check_options


@dataclass
class AlignConfig(OnlineSettings, TrainingArguments):
    """What all methods share. Take a method's own class: ``VARConfig``, or ``method_config("ipo")``.

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
        # Checked first: TrainingArguments' own __post_init__ may already touch devices and directories.
        if self.method not in METHODS:
            raise TypeError("AlignConfig belongs to no method; take VARConfig, or method_config(name)")
        self._check_method()
        _check_range("max_length", self.max_length, self.max_length >= 2, ">= 2 tokens")
        _check_range(
            "workspace_mb", self.workspace_mb, self.workspace_mb is None or self.workspace_mb > 0, "> 0, or None"
        )
        _check_range("learning_rate", self.learning_rate, self.learning_rate >= 0, ">= 0")
        _check_range(
            "per_device_train_batch_size",
            self.per_device_train_batch_size,
            self.per_device_train_batch_size >= 1,
            ">= 1",
        )
        _check_range(
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            self.gradient_accumulation_steps >= 1,
            ">= 1",
        )
        _check_range("max_steps", self.max_steps, self.max_steps != 0, ">= 1, or -1 for num_train_epochs")
        _check_range("num_train_epochs", self.num_train_epochs, self.num_train_epochs > 0 or self.max_steps > 0, "> 0")
        if self.sync_ref_model:
            if self.precompute_ref_log_probs:
                raise ValueError(
                    "sync_ref_model: a reference that moves makes precomputed log-probs wrong; pass "
                    "precompute_ref_log_probs=False "
                    "with it (a frozen copy of the model then stays in memory)"
                )
            _check_range(
                "ref_model_mixup_alpha", self.ref_model_mixup_alpha, 0 < self.ref_model_mixup_alpha <= 1, "in (0, 1]"
            )
            _check_range("ref_model_sync_steps", self.ref_model_sync_steps, self.ref_model_sync_steps >= 1, ">= 1")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, got {self.label_smoothing_factor}; the losses here are those of "
                "the labels as they are (dpo's smoothing is its option label_smoothing)"
            )
        sampling = getattr(self, "train_sampling_strategy", "random")
        if sampling not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy: expected 'random' or 'sequential', got {sampling!r}; batches made by "
                "length change what Z is estimated from"
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns: expected False, rewards and reference log-probs travel with the rows"
            )
        if self.online:
            resolve(self, METHODS[self.method])
            self.num_train_epochs = float(self.iterations)
        self.logp_temperature = 1.0 if self.logp_temperature is None else self.logp_temperature
        good = math.isfinite(self.logp_temperature) and self.logp_temperature > 0
        _check_range("logp_temperature", self.logp_temperature, good, "finite and > 0")
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # torch warns about it at every start
        try:
            super().__post_init__()
        except ValueError as error:
            if "bf16" not in str(error) or "use_cpu" not in str(error):
                raise
            raise ValueError(
                "bf16: transformers finds no accelerator that computes in it (see `var-kernels doctor`); "
                "to train in bf16 on the CPU pass use_cpu=True (--use-cpu)"
            ) from error

    def _check_method(self) -> None:
        """The method's own settings, by the loss's own checks: it is called on no rows at all."""
        METHODS[self.method].check(self)


def _read_numbers(config: AlignConfig) -> None:
    """Numbers that came as text: YAML reads 1e-4, without a point, as a string."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name, None)
        kinds = [kind, *typing.get_args(kind)]
        if isinstance(value, str) and str not in kinds and (float in kinds or int in kinds):
            wanted = float if float in kinds else int
            try:
                setattr(config, name, wanted(value))
            except ValueError:
                raise ValueError(f"{name}: expected {wanted.__name__}, got {value!r}") from None


def _check_range(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}: expected {wanted}, got {value}")


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
        if self.normalizer != "cross":
            choices = tuple(name for name in NORMALIZERS if name != "cross")  # those that the message may propose
            check_choice("normalizer", self.normalizer, choices)
        self.reference = check_options(self.lam, self.normalizer, self.reference)
        if self.normalizer == "cross":
            raise ValueError(
                "normalizer: 'cross' needs the reference's score of every completion under every prompt of the batch, "
                "which the trainer does not make; use 'batch' or 'group', or VARLoss in a loop of your own"
            )


def method_config(method: str) -> type[typing.Any]:
    """The class of a method's settings: ``method_config("ipo")(output_dir="runs/ipo", tau=0.1)``.

    Its fields beside ``AlignConfig``'s are the options of the loss (``LOSSES["ipo"].options``) and of the method. A
    loss of your own is a method once it is registered (docs/losses.md).

    Raises:
        ValueError: an unknown method.
    """
    if method in VARIANTS:
        raise ValueError(f"method: {method!r} is a variant, got by {VARIANTS[method].use}; give its settings by name")
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
