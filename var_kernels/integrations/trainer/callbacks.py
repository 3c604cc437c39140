"""Callbacks: the metrics file, and the reference that follows the policy."""

import contextlib
import json
import logging
import os
from pathlib import Path

import torch
from transformers import TrainerCallback

from var_kernels.integrations.files import atomic_write
from var_kernels.integrations.trainer.progress import ProgressLines
from var_kernels.integrations.trainer.sharding import parameter_counts

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """One JSON object a line in output_dir/metrics.jsonl, on disk before the next step begins. A resumed run continues
    the file from its checkpoint's step, so that every step is in it once."""

    def on_train_begin(self, args, state, control, **kwargs):
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


class SyncReference(TrainerCallback):
    """reference = alpha * policy + (1 - alpha) * reference, every so many steps, weight by weight of the same name.

    Raises:
        ValueError: a reference whose weights are not the policy's, by name and shape, or are tied where those are not.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._pairs(trainer.model)

    def _pairs(self, policy) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each weight of the reference once, with the policy's; a tied one has two names."""
        ours, theirs = (
            dict(model.named_parameters(remove_duplicate=False)) for model in (policy, self.trainer.ref_model)
        )
        for name in sorted({*ours, *theirs}):
            shapes = [tuple(weights[name].shape) if name in weights else None for weights in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"sync_ref_model: the reference must have the policy's weights, got {name} of shape {shapes[0]} in "
                    f"the policy and {shapes[1]} in ref_model; pass a ref_model of the same architecture, or drop one"
                )
        pairs = {}
        for name, weight in theirs.items():
            if pairs.setdefault(id(weight), (weight, ours[name]))[1] is not ours[name]:
                raise ValueError(
                    f"sync_ref_model: ref_model must be tied as the policy is, got {name} tied to another weight in "
                    "ref_model alone; pass a ref_model that is tied alike, or drop one"
                )
        return list(pairs.values())

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps:
            return
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for ref_param, param in self._pairs(policy):
            ref_param.lerp_(param.detach().to(ref_param.dtype), args.ref_model_mixup_alpha)
