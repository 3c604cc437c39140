"""README.md of a trained model."""

from pathlib import Path

import torch
import transformers

import var_kernels
from var_kernels.integrations.files import atomic_write
from var_kernels.integrations.trainer.callbacks import METRICS_FILE, logged_entries
from var_kernels.integrations.trainer.sharding import parameter_counts

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
