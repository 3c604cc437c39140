"""The record of a run: metrics.jsonl, lines in the log on its steps, and README.md of the model."""

import contextlib
import json
import logging
import os
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

import var_kernels
from var_kernels.integrations.files import atomic_write
from var_kernels.integrations.trainer.progress import ProgressLines
from var_kernels.integrations.trainer.sharding import parameter_counts

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
_SHOWN = (
    *("max_length", "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_steps", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "bf16", "fp16"),
    *("disable_dropout", "precompute_ref_log_probs", "sync_ref_model"),
)

_CARD = """---
library_name: {library}
tags: [var-kernels, {args.method}]
---

# {name}

{kind} with {parameters}, trained from {base} by {method} on {rows:,} completions ({items:,} items), {steps} steps.

## Settings

{settings}

## Last logged metrics

{metrics}

Every logged step is in metrics.jsonl.

var-kernels {var_kernels.__version__}, transformers {transformers.__version__}, torch {torch.__version__}.
"""


class MetricsFile(TrainerCallback, ExportableState):
    """One JSON object a line in output_dir/metrics.jsonl, on disk before the next step begins. A resumed run continues
    the file from its checkpoint's step, so that every step is in it once. Checkpoints hold the run's method in
    trainer_state.json: one of another method is refused."""

    def __init__(self, method: str):
        self.method = method

    def state(self) -> dict:
        return {"args": {"method": self.method}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["args"]["method"]
        if saved != args.method:
            raise ValueError(
                f"method must be {saved!r}, that of the run whose checkpoint is resumed, got {args.method!r}; another "
                "method needs a run of its own: start it from the saved model, with another output_dir"
            )
        self._begun = state.global_step
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / METRICS_FILE
        kept = [entry for entry in logged_entries(path) if entry.get("step", 0) <= state.global_step > 0]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs and state.global_step == self._begun:
            return  # of a finished run that was resumed: no time, and a loss of 0
        with open(Path(args.output_dir) / METRICS_FILE, "a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def logged_entries(path: Path) -> list[dict]:
    """The lines that are whole JSON: a killed process may leave half of one at the end."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


class StepLines(TrainerCallback):
    """A line on the run before its first step, and, without progress bars, on its steps every so often."""

    def __init__(self, trainer):
        self.trainer, self._lines = trainer, None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or state.global_step >= state.max_steps:
            return
        logger.info("%s; %d steps of %d items%s", summary(self.trainer), state.max_steps, args.items_per_step,
                    f", from step {state.global_step} on" if state.global_step else "")  # fmt: skip
        if args.disable_tqdm:
            self._lines = ProgressLines("training", state.max_steps, "step", state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self._lines is not None:
            self._lines.advance(1)


def summary(trainer) -> str:
    """The method, the data and the model of a run, in a line."""
    count, learning = parameter_counts(trainer.model)
    if trainer.online is not None:
        data = f"{len(trainer.online.prompts)} prompts to draw for"
    else:
        rows = trainer.train_dataset.rows
        data = f"{len(rows.groups)} prompts, {len(rows)} completions, {len(trainer.train_dataset)} items"
    share = "" if learning == count else f", {learning:,} of them learn"
    return f"method {trainer.args.method}: {data}; {count:,} parameters{share}"


def write_model_card(trainer) -> None:
    """Write output_dir/README.md, whole or not at all."""
    args = trainer.args
    history = logged_entries(Path(args.output_dir) / METRICS_FILE)
    model = trainer.accelerator.unwrap_model(trainer.model)
    settings = {"method": args.method}
    settings |= {name: getattr(args, name) for name in (*trainer.method.own_settings, *_SHOWN)}
    settings["world_size"] = args.world_size
    settings = {name: getattr(value, "value", value) for name, value in settings.items()}  # enumerations
    last = next((entry for entry in reversed(history) if "loss" in entry), {})
    summary = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    metrics = {**last, **{key: summary[key] for key in ("train_loss", "train_runtime") if key in summary}}
    count, learning = parameter_counts(model)
    text = _CARD.format(
        library="peft" if hasattr(model, "peft_config") else "transformers",
        method=args.method.upper(),
        args=args,
        name=Path(args.output_dir).resolve().name,
        kind=type(model).__name__,
        parameters=f"{count:,} parameters" + ("" if learning == count else f", {learning:,} of them"),
        base=getattr(model.config, "_name_or_path", "") or "a model trained from scratch",
        rows=len(trainer.train_dataset.rows),
        items=len(trainer.train_dataset),
        steps=trainer.state.global_step,
        settings=_table(settings),
        metrics=_table({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in metrics.items()}),
        **{package.__name__: package for package in (var_kernels, transformers, torch)},
    )
    with atomic_write(Path(args.output_dir) / "README.md") as path:
        path.write_text(text, encoding="utf-8")


def _table(values: dict) -> str:
    return "\n".join(["| name | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])
