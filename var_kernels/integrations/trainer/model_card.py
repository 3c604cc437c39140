"""README.md of a trained model."""

import json
from pathlib import Path

import torch
import transformers

import var_kernels
from var_kernels.integrations.files import atomic_write
from var_kernels.integrations.trainer.callbacks import METRICS_FILE, complete_lines

_SHOWN = (
    *("max_length", "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_steps", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "bf16", "fp16"),
    *("disable_dropout", "precompute_ref_log_probs", "sync_ref_model"),
)


def write_model_card(trainer) -> None:
    """Write output_dir/README.md, whole or not at all."""
    args = trainer.args
    history = [json.loads(line) for line in complete_lines(Path(args.output_dir) / METRICS_FILE)]
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = getattr(model.config, "_name_or_path", "") or "a model trained from scratch"
    settings = {"method": args.method}
    settings |= {name: getattr(args, name) for name in (*trainer.method.own_settings, *_SHOWN)}
    settings["world_size"] = args.world_size
    settings = {name: getattr(value, "value", value) for name, value in settings.items()}  # enumerations
    last = next((entry for entry in reversed(history) if "loss" in entry), {})
    summary = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    metrics = {**last, **{key: summary[key] for key in ("train_loss", "train_runtime") if key in summary}}
    items = len(trainer.train_dataset)
    rows = len(trainer.train_dataset.rows)
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    only = "" if trained == count else f", {trained:,} of them"
    text = "\n".join(
        [
            "---",
            f"library_name: {'peft' if hasattr(model, 'peft_config') else 'transformers'}",
            "tags: [var-kernels, " + args.method + "]",
            "---",
            "",
            f"# {Path(args.output_dir).resolve().name}",
            "",
            f"{type(model).__name__} with {count:,} parameters{only}, trained from {base} by {args.method.upper()} on "
            f"{rows:,} completions ({items:,} items), {trainer.state.global_step} steps.",
            "",
            "## Settings",
            "",
            *_table(settings),
            "",
            "## Last logged metrics",
            "",
            *_table({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in metrics.items()}),
            "",
            "Every logged step is in metrics.jsonl.",
            "",
            f"var-kernels {var_kernels.__version__}, transformers {transformers.__version__}, torch "
            f"{torch.__version__}.",
            "",
        ]
    )
    with atomic_write(Path(args.output_dir) / "README.md") as path:
        path.write_text(text, encoding="utf-8")


def _table(values: dict) -> list[str]:
    return ["| name | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())]
