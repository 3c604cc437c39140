"""A student cut from SmolLM2 by its layers learns from it: the divergence on prompts that it never saw."""

import copy
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.real.models import load, read_rows
from var_kernels.integrations.hf import token_divergence
from var_kernels.integrations.trainer import VARTrainer, method_config

COLUMNS = (
    *("method", "direction", "seed", "layers", "steps", "tokens", "held_out"),
    *("kl_before", "kl_before_error", "kl", "kl_error", "fall", "fall_error", "processor_seconds"),
)


@dataclass(frozen=True)
class Sizes:
    """tokens: of a text at most, prompt and completion; batch: texts of a step."""

    layers: int = 15
    steps: int = 40
    batch: int = 4
    tokens: int = 128
    held_out: int = 16
    rate: float = 5e-4


REDUCED = Sizes(layers=3, steps=2, batch=1, tokens=48, held_out=2)


def runs(file: Path, seed: int, sizes: Sizes, direction: str = "forward", methods=("distill", "sft")) -> Iterator[dict]:
    """A row a method: "distill" from the teacher, "sft" on the same texts without one."""
    torch.manual_seed(seed)
    teacher, tokenizer = load("smollm2", torch.float32)
    rows = [{"prompt": row["prompt"], "completion": row["completions"][0]} for row in read_rows(file)]
    rows = [row for row in rows if len(row["prompt"]) < 2 * sizes.tokens]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row["completion"] = [{"role": "assistant", "content": row["completion"]}]
    random.Random(0).shuffle(rows)
    held_out, train = rows[: sizes.held_out], rows[sizes.held_out :]
    for method in methods:
        began, student = time.process_time(), cut(teacher, sizes.layers)
        options = {"direction": direction} if method == "distill" else {}
        with tempfile.TemporaryDirectory() as folder:
            config = method_config(method)(
                output_dir=folder, max_steps=sizes.steps, per_device_train_batch_size=sizes.batch,
                max_length=sizes.tokens, learning_rate=sizes.rate, warmup_steps=sizes.steps // 10, seed=seed,
                logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=True, **options,
            )  # fmt: skip
            more = {"ref_model": teacher} if method == "distill" else {}
            trainer = VARTrainer(student, config, train, held_out, processing_class=tokenizer, **more)
            batches = [trainer.data_collator([trainer.eval_dataset[i]]) for i in range(len(trainer.eval_dataset))]
            before = divergences(student, teacher, batches, direction)
            trainer.train()
            after = divergences(student, teacher, batches, direction)
        row = {"method": method, "direction": direction, "seed": seed, "layers": sizes.layers, "steps": sizes.steps}
        row |= {"tokens": sizes.tokens, "held_out": len(batches), "processor_seconds": time.process_time() - began}
        for name, values in (("kl_before", before), ("kl", after), ("fall", before - after)):
            row[name], row[f"{name}_error"] = values.mean().item(), (values.std() / len(values) ** 0.5).item()
        yield row


def cut(teacher, layers: int):
    """A copy with so many of the teacher's layers, evenly spaced, the first and the last among them."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    kept = torch.linspace(0, len(student.model.layers) - 1, layers).round().int().tolist()
    student.model.layers = torch.nn.ModuleList([student.model.layers[i] for i in kept])
    student.config.num_hidden_layers = layers
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [student.config.layer_types[i] for i in kept]
    return student


def divergences(student, teacher, batches: list[dict], direction: str) -> torch.Tensor:
    """The mean over each held-out text's tokens, nats."""
    student.eval()
    means = []
    for batch in batches:
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            total = token_divergence(student, teacher.eval(), given, direction=direction).sum()
        means.append(total / (given["labels"][:, 1:] != -100).sum())
    return torch.stack(means).double()
