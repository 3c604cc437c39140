"""The experiment: a reference model from scratch, completions that it draws, and the policies aligned on them."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback

from var_kernels.cli.demo import world
from var_kernels.cli.demo.measure import Drawn, draw, kl_to_reference, mean_and_error, rewards_of
from var_kernels.integrations.scratch import ScratchSpec, make_model, make_tokenizer
from var_kernels.integrations.trainer import AlignConfig, VARTrainer, method_config

MAX_LENGTH = 96  # tokens; the longest row of the corpus has about 45


@dataclass(frozen=True)
class Plan:
    """Sizes and settings of a run. ``lam`` is VAR's lambda in reward points; DPO's beta plays the same part."""

    model: ScratchSpec
    pretrain_steps: int
    pretrain_batch: int
    pretrain_rate: float
    completions: int  # drawn from the reference for each training prompt
    align_steps: int
    align_prompts: int  # per step
    align_rate: float
    lam: float
    eval_samples: int  # per held-out prompt
    frontier_samples: int
    probe_every: int
    memory_rows: tuple[int, ...]
    memory_vocab: int


FULL = Plan(
    model=ScratchSpec(hidden=128, layers=2, heads=4, vocab=1024),
    pretrain_steps=1200,
    pretrain_batch=32,
    pretrain_rate=4e-3,
    completions=16,
    align_steps=80,
    align_prompts=8,
    align_rate=1e-3,
    lam=0.5,
    eval_samples=16,
    frontier_samples=32,
    probe_every=10,
    memory_rows=(1024, 2048, 4096),
    memory_vocab=32_000,
)
QUICK = Plan(
    model=ScratchSpec(hidden=96, layers=2, heads=3, vocab=1024),
    pretrain_steps=300,
    pretrain_batch=32,
    pretrain_rate=6e-3,
    completions=8,
    align_steps=40,
    align_prompts=8,
    align_rate=1e-3,
    lam=0.5,
    eval_samples=4,
    frontier_samples=8,
    probe_every=20,
    memory_rows=(512, 1024),
    memory_vocab=16_000,
)

# What is trained on the completions that the reference drew: name -> the method and its settings; the strength of the
# pull to the reference, ``lam``, is "beta" for DPO.
METHODS = {
    "SFT": ("sft", {"sft_on": "all"}),
    "Best-of-n SFT": ("sft", {"sft_on": "best"}),
    "DPO": ("dpo", {"beta": "lam"}),
    "VAR": ("var", {"lam": "lam"}),
}

DPO_RATE = 0.3  # of the others' learning rate: at the full one it drifts off, to more KL for less reward

Advance = Callable[[], None]


@dataclass(frozen=True)
class Run:
    """What every part of one run shares. ``folder`` takes the Trainer's own files."""

    plan: Plan
    seed: int
    folder: Path
    device: torch.device

    def config(self, method: str, steps: int, batch: int, rate: float, **settings) -> AlignConfig:
        common = {
            "output_dir": str(self.folder / "trainer"),
            "cache_dir": str(self.folder / "cache"),
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 256,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, min(40, steps // 10)),
            "adam_beta2": 0.95,
            "logging_steps": max(1, steps // 40),
            "max_length": MAX_LENGTH,
            "seed": self.seed,
            "use_cpu": self.device.type == "cpu",
            "disable_tqdm": True,
            "save_strategy": "no",
            "report_to": "none",
            "dataloader_pin_memory": False,
        }
        return method_config(method)(**common | settings)


def make_reference(run: Run, advance: Advance):
    """(model, tokenizer, corpus rows): a Llama-shaped model trained on one pass over the mixed-quality corpus."""
    plan = run.plan
    rows = list(itertools.islice(world.corpus(run.seed), plan.pretrain_steps * plan.pretrain_batch))
    tokenizer = make_tokenizer(plan.model, (row["prompt"] + row["completion"] for row in rows[:10_000]))
    model = make_model(plan.model, len(tokenizer), MAX_LENGTH, run.seed)
    config = run.config("sft", plan.pretrain_steps, plan.pretrain_batch, plan.pretrain_rate, sft_on="all")
    train(model, tokenizer, rows, config, advance)
    return model, tokenizer, rows


def draw_completions(
    model, tokenizer, run: Run, tasks: list[world.Task], advance: Advance, max_new_tokens: int | None = None
) -> list[dict]:
    """One row {"prompt", "completions", "rewards"} per task, completions drawn from the reference at temperature 1."""
    size = run.plan.completions
    drawn = draw(model, tokenizer, tasks, size, run.seed + 1, advance, max_new_tokens)
    rewards = rewards_of(drawn).tolist()
    return [
        {"prompt": task.prompt, "completions": drawn.texts[i * size : (i + 1) * size], "rewards": rewards[i]}
        for i, task in enumerate(tasks)
    ]


def align(name: str, model, tokenizer, rows: list[dict], run: Run, advance: Advance, callbacks=()) -> list[dict]:
    """Train ``model`` in place by one of ``METHODS`` on the rows; returns the Trainer's log."""
    plan = run.plan
    batch = plan.align_prompts * (plan.completions if name == "SFT" else 1)
    rate = plan.align_rate * (DPO_RATE if name == "DPO" else 1.0)
    method, settings = METHODS[name]
    settings = {key: plan.lam if value == "lam" else value for key, value in settings.items()}
    config = run.config(method, plan.align_steps, batch, rate, **settings)
    return train(model, tokenizer, rows, config, advance, callbacks)


def train(
    model, tokenizer, rows, config: AlignConfig, advance: Advance, callbacks=(), trainer_class=VARTrainer, **options
) -> list[dict]:
    """The Trainer's log; ``options`` are those of ``VARTrainer``."""
    callbacks = [_Advance(advance), *callbacks]
    trainer = trainer_class(model, config, rows, processing_class=tokenizer, callbacks=callbacks, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class _Advance(TrainerCallback):
    def __init__(self, advance: Advance):
        self.advance = advance

    def on_step_end(self, args, state, control, **kwargs):
        self.advance()


class Probe(TrainerCallback):
    """Samples the policy on held-out prompts every few steps: the curves of the report. Its own time is kept apart."""

    def __init__(self, reference, tokenizer, tasks: list[world.Task], every: int, seed: int):
        self.reference, self.tokenizer, self.tasks, self.every, self.seed = reference, tokenizer, tasks, every, seed
        self.curve: list[dict] = []
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._look(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._look(state.global_step, model)

    def _look(self, step: int, model) -> None:
        began, was_training = time.monotonic(), model.training
        drawn = draw(model, self.tokenizer, self.tasks, 2, self.seed)
        kl = kl_to_reference(model, self.reference, self.tokenizer, drawn)
        self.curve.append({"step": step, "reward": rewards_of(drawn).mean().item(), "kl": kl.mean().item()})
        model.train(was_training)
        self.seconds += time.monotonic() - began


def frontier(drawn: Drawn, lams: list[float]) -> list[dict]:
    """Estimated best: reward and KL of pi* = pi_ref exp(r/lam)/Z for each lam, from samples of the reference.

    Per prompt over k samples, w = softmax(r/lam): E*[r] = sum w r and KL(pi* || pi_ref) = sum w log(k w), then the mean
    over prompts; of the objective E*[r] - lam KL, which no policy exceeds, also the standard error.
    """
    rewards_PK = rewards_of(drawn).double()
    points = []
    for lam in lams:
        w_PK = torch.softmax(rewards_PK / lam, dim=1)
        reward_P1 = (w_PK * rewards_PK).sum(1, keepdim=True)
        kl_P1 = (w_PK * (w_PK.log() + math.log(w_PK.shape[1]))).sum(1, keepdim=True)
        objective, error = mean_and_error(reward_P1 - lam * kl_P1)
        point = {"lam": lam, "reward": reward_P1.mean().item(), "kl": kl_P1.mean().item()}
        points.append({**point, "objective": objective, "objective_error": error})
    return points
