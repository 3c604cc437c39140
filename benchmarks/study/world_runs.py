"""Runs on the small world: a reference for each seed, and a policy for each method, seed and learning rate."""

import copy
import functools
import json
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import small_world
from benchmarks.demo import experiment
from benchmarks.demo.experiment import Run
from benchmarks.demo.output import write_jsonl
from benchmarks.demo.replies import Sampling, draw
from benchmarks.small_world import MAX_LENGTH, world
from benchmarks.study.measure import Probe, Texts, best_and_worst, look, optimum
from benchmarks.study.plan import METHODS, Entry, Plan
from var_kernels.integrations.trainer import VARTrainer

# Seeds of the draws, added to a run's own: no two measurements share their luck, all methods of a seed do.
_PROBE, _FINAL, _REFERENCE, _FRONTIER, _HELD_OUT = 2, 4, 5, 6, 7


@dataclass(frozen=True)
class Context:
    """What every run is given. folder: where references, their completions and caches are kept."""

    plan: Plan
    folder: Path
    device: torch.device
    rewards_file: Path | None = None

    def reference_folder(self, seed: int) -> Path:
        return self.folder / "reference" / f"seed{seed}"

    def load(self, folder: Path):
        """(model, tokenizer) as they were saved."""
        return AutoModelForCausalLM.from_pretrained(folder).to(self.device), AutoTokenizer.from_pretrained(folder)

    def prompts(self, seed: int) -> tuple[list[str], list[str]]:
        """(trained on, held out): divided by fact, another division for each seed."""
        train, held_out = ([task.prompt for task in tasks] for tasks in world.split_tasks(seed))
        return train[: self.plan.max_prompts], held_out[: self.plan.max_prompts]

    def draw(self, model, tokenizer, prompts: list[str], k: int, seed: int):
        sampling = Sampling(small_world.SAMPLING.batch, self.plan.reply_tokens)
        return draw(model, tokenizer, prompts, k, sampling, small_world.reward, seed)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]  # a text may hold U+2028


def reference(context: Context, seed: int) -> dict:
    """Train the seed's reference, let it answer all prompts, and save both. Returns its own figures."""
    plan, folder, limit = context.plan, context.reference_folder(seed), context.plan.reply_tokens
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        run = Run(plan, seed, Path(scratch), context.device)
        model, tokenizer, _ = small_world.make_reference(run, _nothing)
        seconds = time.monotonic() - began
    prompts, held_out = context.prompts(seed)
    for name, asked, shift in (("train", prompts, 1), ("held_out", held_out, _HELD_OUT)):
        drawn = context.draw(model, tokenizer, asked, plan.completions, seed + shift)
        write_jsonl(folder / f"{name}.jsonl", _answers(drawn))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    drawn = context.draw(model, tokenizer, held_out, plan.eval_samples, seed + _REFERENCE)
    return {
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "train_prompts": len(prompts),
        "held_out_prompts": len(held_out),
        "final": look(model, model, tokenizer, held_out, plan.eval_samples, seed + _FINAL, limit, drawn),
        "optima": optimum(
            model, tokenizer, held_out, plan.frontier_samples, seed + _FRONTIER, limit, [plan.lam, *_FRONTIER_LAMS]
        ),
    }


_FRONTIER_LAMS = (0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0, 4.0, 10.0)


def align(
    context: Context, seed: int, name: str, rate: float, steps: int, probes: list[int], samples: int, schedule: str
) -> dict:
    """One policy: curve over the probes, final figures, seconds of training alone, memory of a step."""
    plan, entry = context.plan, METHODS[name]
    base, tokenizer = context.load(context.reference_folder(seed))
    _, held_out = context.prompts(seed)
    rows = read_rows(context.reference_folder(seed) / "train.jsonl")
    held_out_rows = read_rows(context.reference_folder(seed) / "held_out.jsonl")
    watched = {
        "train": Texts(best_and_worst(rows, plan.watched_pairs), tokenizer, MAX_LENGTH),
        "held_out": Texts(best_and_worst(held_out_rows, plan.watched_pairs), tokenizer, MAX_LENGTH),
    }

    def visit(model) -> dict:
        figures = look(model, base, tokenizer, held_out, plan.probe_samples, seed + _PROBE, plan.reply_tokens)
        for which, texts in watched.items():
            logp = texts.logps(model)
            figures |= {f"{which}_chosen": logp[0::2].mean().item(), f"{which}_rejected": logp[1::2].mean().item()}
        return figures

    policy = copy.deepcopy(base)
    probe = Probe(tuple(probes), visit, context.device)
    scratch = Path(tempfile.mkdtemp(prefix="run", dir=context.folder))
    try:
        run = Run(plan, seed, scratch, context.device)
        settings = {
            **entry.resolved(plan.lam),
            **(_online_settings(plan, steps) if entry.online else {}),
            "cache_dir": str(context.folder / "cache"),
            "lr_scheduler_type": schedule,
        }
        config = run.config(entry.method, steps, batch_size(entry, plan.prompts, plan.completions), rate, **settings)
        data, options = (_prompts_only(rows), {"reward_func": small_world.reward}) if entry.online else (rows, {})
        if entry.own_share < 1:
            options["trainer_class"] = functools.partial(MixedSail, own_share=entry.own_share)
        _, log = experiment.train(policy, tokenizer, data, config, _nothing, [probe], **options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    limit = plan.reply_tokens
    drawn = context.draw(base, tokenizer, held_out, plan.eval_samples, seed + _REFERENCE)
    final = look(policy, base, tokenizer, held_out, samples, seed + _FINAL, limit, drawn)
    return {
        "final": {**final, "objective": final["reward"] - plan.lam * final["kl"]},
        "curve": probe.curve,
        "seconds": probe.seconds,
        "peak_mib": probe.peak_mib,
        "loss": [log[0]["loss"], log[-1]["loss"]],
    }


class MixedSail(VARTrainer):
    """SAIL-DP at a share of the steps, drawn anew for each; DPO on the labels of the data at the others."""

    def __init__(self, *args, own_share: float, **options):
        super().__init__(*args, **options)
        self.own_share, self.squared_coef = own_share, self.args.squared_coef

    def _label_generator(self, inputs):
        own = random.Random(f"{self.args.seed} {self.state.global_step}").random() < self.own_share
        self.args.squared_coef = self.squared_coef if own else 0.0  # without the square the loss is DPO's
        return super()._label_generator(inputs) if own else None


def batch_size(entry: Entry, prompts: int, completions: int) -> int:
    """Items of a step, so that every method sees as many prompts in it."""
    return prompts * completions if entry.per_row else prompts


def _online_settings(plan: Plan, steps: int) -> dict:
    """As many prompts a step as offline, drawn anew for every iteration."""
    return {
        "online": True,
        "iterations": -(-steps // plan.iteration_steps),
        "steps_per_iteration": plan.iteration_steps,
        "prompts_per_iteration": plan.prompts * plan.iteration_steps,
        "max_new_tokens": plan.reply_tokens,
        "sampling_batch_size": 512,
        "logp_temperature": 1.0,  # SAIL draws at 0.9, and its authors' code reads log-probs at 1
        "keep_initial_model": False,
    }


def _prompts_only(rows: list[dict]) -> list[dict]:
    return [{"prompt": row["prompt"]} for row in rows]


def _answers(drawn) -> list[dict]:
    """A row of each prompt with its replies."""
    places = (slice(start, start + drawn.k) for start in range(0, len(drawn.texts), drawn.k))
    return [
        {"prompt": prompt, "completions": drawn.texts[place], "rewards": drawn.rewards[place]}
        for prompt, place in zip(drawn.prompts, places, strict=True)
    ]


def noisy_pairs(rows: list[dict], noise: float, seed: int, per_prompt: int = 4) -> list[dict]:
    """Up to ``per_prompt`` random pairs of a prompt's completions with different rewards; a share of the labels
    flipped."""
    draw_of = random.Random(seed)
    pairs = []
    for row in rows:
        scored = list(zip(row["completions"], row["rewards"], strict=True))
        options = [(a, b) for a in scored for b in scored if a[1] > b[1] and a[0] != b[0]]
        for chosen, rejected in draw_of.sample(options, min(per_prompt, len(options))):
            if draw_of.random() < noise:
                chosen, rejected = rejected, chosen
            pairs.append({"prompt": row["prompt"], "chosen": chosen[0], "rejected": rejected[0]})
    draw_of.shuffle(pairs)
    return pairs


def _nothing() -> None:
    pass
