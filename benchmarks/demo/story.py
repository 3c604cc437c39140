"""The demo from end to end: load, draw, align, measure, report."""

import contextlib
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from rich.console import Console

import var_kernels
from benchmarks import small_world
from benchmarks.demo import experiment
from benchmarks.demo.experiment import Plan, Run, Subject
from benchmarks.demo.memory import compare
from benchmarks.demo.output import REPORT, check_output, staged, write_jsonl, write_metrics
from benchmarks.demo.progress import Phases
from benchmarks.demo.replies import (
    Drawn,
    draw,
    draws,
    first,
    kl_to_reference,
    mean_and_error,
    rewards_of,
    scorings,
    summarise,
)
from benchmarks.demo.report import write_report
from benchmarks.demo.subject import pretrained, question
from benchmarks.demo.table import print_results
from var_kernels.integrations.trainer.loading import check_folder
from var_kernels.integrations.trainer.rewards import load_function
from var_kernels.losses import var_weights

_LOAD = "Load the model"
_DRAW = "Let it answer, score its answers"
_EVALUATE = "Sample all models on held-out prompts"
_MEMORY = "Measure a step, plain loss against fused"
_REPORT = "Draw the report"
_SHOWN = 8  # held-out prompts in the report

Make = Callable[[Run, Callable[[], None]], Subject]


def tell(
    output: str,
    plan: Plan,
    *,
    seed: int,
    device: torch.device,
    model: str | None = None,
    reward: str | None = None,
    make: Make | None = None,
    console: Console | None = None,
) -> dict:
    """Run the demo and save everything under ``output``; returns the metrics that were saved.

    model, reward: as the command's options. make: what is aligned, in place of these.
    """
    console = console or Console()
    check_output(Path(output))  # before a model is fetched
    if make is None:
        make, plan = _choose(model, reward, plan, device, console)
    with _quiet():
        return _tell(output, plan, seed, device, make, console)


def _choose(model, reward, plan: Plan, device, console: Console) -> tuple[Make, Plan]:
    """The pretrained model; where none can be had and none was asked for, the small world."""
    reward_function = load_function(reward) if reward else None
    check_folder("model", model or "")
    if model is None:
        from benchmarks.pretrained import fetch

        try:
            console.print("Fetching SmolLM2-135M-Instruct, unless it is in the cache", style="dim", highlight=False)
            fetch()
        except OSError as error:
            if reward:
                raise
            console.print(f"{error}. Going on with a small world, trained here", highlight=False, soft_wrap=True)
            return small_world.subject, small_world.QUICK if plan is experiment.QUICK else small_world.FULL
    return lambda run, advance: pretrained(model, reward_function, plan, device), plan


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own lines: a few prompts have answers of one reward, as planned."""
    log, theirs = logging.getLogger("var_kernels"), transformers.utils.logging
    level, verbosity, bars = log.level, theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


def _tell(output: str, plan: Plan, seed: int, device: torch.device, make: Make, console: Console) -> dict:
    began = time.monotonic()
    steps = getattr(plan, "pretrain_steps", 1)
    expected = {
        _LOAD: 85 if steps > 1 else 5,
        _DRAW: 45,
        **{_align(name): 70 for name in plan.methods},
        _EVALUATE: 45 * (1 + len(plan.methods)),
        _MEMORY: 60,
        _REPORT: 6,
    }
    trained = ", ".join(plan.methods)
    about, trainings = "", len(plan.methods)
    if plan is experiment.FULL:
        about = f"; {3 + 2 * trainings} to {5 + 3 * trainings} minutes on two idle cores"
    console.print(
        f"[bold]The demo of var_kernels[/bold] on {_machine(device)}: sample, align by {trained}, sample again{about}",
        highlight=False,
    )
    with staged(Path(output)) as folder:
        with Phases(console, expected) as phases:
            with phases.phase(_LOAD, steps) as advance:
                subject = make(Run(plan, seed, folder, device), advance)
            positions = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
            run = Run(plan, seed, folder, device, min(experiment.longest_row(subject, plan), positions))
            results = _experiment(run, subject, phases)
            with phases.phase(_REPORT):
                results["seconds"] = {**phases.seconds, "all": time.monotonic() - began}
                write_report(folder / REPORT, results)
        kept = ("seed", "subject", "environment", "plan", "table", "memory", "seconds")
        counts = {key: value for key, value in results["data"].items() if isinstance(value, int | float)}
        write_metrics(folder, {**{key: results[key] for key in kept}, "data": counts})
    print_results(console, results)
    console.print(
        f"\nReport: [bold]{Path(output) / REPORT}[/bold]   models, data, samples and metrics beside it", highlight=False
    )
    return results


def _experiment(run: Run, subject: Subject, phases: Phases) -> dict:
    plan, folder = run.plan, run.folder
    with phases.phase(_DRAW, draws(subject.prompts, plan.completions, plan.sampling)) as advance:
        drawn = experiment.draw_completions(subject, run, advance)
    rows = experiment.rows_of(drawn)
    write_jsonl(folder / "data" / "completions.jsonl", rows)
    write_jsonl(folder / "data" / "held_out.jsonl", ({"prompt": prompt} for prompt in subject.held_out))
    policies, history, seconds = _align_all(run, subject, rows, phases)
    replies, table = _evaluate(run, subject, policies, phases)
    with phases.phase(_MEMORY, 2 * len(plan.memory_rows)) as advance:
        dtype = str(subject.model.dtype).removeprefix("torch.")
        memory = compare(folder / "models" / "var", plan.memory_rows, run.device, dtype, advance)
    config = subject.model.config.get_text_config()
    return {
        "seed": run.seed,
        "subject": {
            "name": subject.name,
            "says": subject.says,
            "vocabulary": config.vocab_size,
            "dtype": dtype,
            "chat": not isinstance(subject.prompts[0], str),
        },
        "environment": _environment(run.device),
        "plan": {**vars(plan), "sampling": vars(plan.sampling), "model": None},
        "table": {name: {**row, "seconds": seconds.get(name, 0.0)} for name, row in table.items()},
        "rewards": {name: found.rewards for name, found in replies.items()},
        "history": history,
        "memory": memory,
        "data": {
            **_weigh(rows, plan.lam, plan.kept),
            "prompts": len(subject.prompts),
            "held_out": len(subject.held_out),
            "cut": 1 - sum(drawn.ended) / len(drawn.ended),
        },
        "samples": _first_replies(replies),
    }


def _align_all(run: Run, subject: Subject, rows: list[dict], phases: Phases):
    """(policies, histories, training seconds), each by name; the reference is one of the policies."""
    policies, history, seconds = {"reference": subject.model}, {}, {}
    for name in run.plan.methods:
        with phases.phase(_align(name), run.plan.align_steps) as advance:
            began = time.monotonic()
            policies[name], history[name] = experiment.align(name, subject, rows, run, advance)
            seconds[name] = time.monotonic() - began
            folder = run.folder / "models" / name.lower().replace(" ", "-")
            policies[name].save_pretrained(folder)
            subject.tokenizer.save_pretrained(folder)
    lines = ({"model": name, **entry} for name, log in history.items() for entry in log)
    write_jsonl(run.folder / "history.jsonl", lines)
    return policies, history, seconds


def _evaluate(run: Run, subject: Subject, policies: dict, phases: Phases) -> tuple[dict[str, Drawn], dict[str, dict]]:
    """(replies by policy, result table), all on held-out prompts."""
    plan, held_out, tokenizer = run.plan, subject.held_out, subject.tokenizer
    k, sampling, found, table = plan.eval_samples, plan.sampling, {}, {}
    steps = draws(held_out, k, sampling) * len(policies)
    steps += scorings(len(held_out), plan.kl_samples or k, sampling) * (len(policies) - 1)
    with phases.phase(_EVALUATE, steps) as advance:
        for name, policy in policies.items():  # of one seed: luck that both have is no gain
            found[name] = draw(policy, tokenizer, held_out, k, sampling, subject.reward, run.seed + 4, advance)
            kl = torch.zeros(len(held_out), 1)
            if name != "reference":
                scored = first(found[name], plan.kl_samples)
                kl = kl_to_reference(policy, subject.model, tokenizer, scored, sampling, advance)
            table[name] = summarise(found[name], found["reference"], kl)
            objective_P1 = rewards_of(found[name]).mean(1, keepdim=True) - plan.lam * kl.mean(1, keepdim=True)
            objective, error = mean_and_error(objective_P1)
            table[name] |= {"objective": objective, "objective_error": error}
    write_jsonl(run.folder / "samples.jsonl", (row for name, replies in found.items() for row in _rows(name, replies)))
    return found, table


def _rows(name: str, drawn: Drawn):
    for i, (text, reward) in enumerate(zip(drawn.texts, drawn.rewards, strict=True)):
        yield {"prompt": drawn.prompts[i // drawn.k], "model": name, "reply": text, "reward": reward}


def _weigh(rows: list[dict], lam: float, kept: int | None) -> dict:
    """Reward and VAR weight of every completion, and those of one prompt in full: the first with the widest rewards.
    kept_share: of a prompt's weight, what its ``kept`` best completions hold."""
    rewards = torch.tensor([reward for row in rows for reward in row["rewards"]])
    counts = torch.tensor([len(row["rewards"]) for row in rows])
    weights = var_weights(rewards, lam=lam, group_ids=torch.arange(len(rows)).repeat_interleave(counts)).weight
    parts = weights.split(counts.tolist())
    ess = sum((part.sum().square() / part.square().sum()).item() for part in parts) / len(parts)
    held = sum((part.sort(descending=True).values[:kept].sum() / part.sum()).item() for part in parts) / len(parts)
    widest = max(range(len(rows)), key=lambda i: max(rows[i]["rewards"]) - min(rows[i]["rewards"]))
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in rows[widest]["completions"]]
    answers = zip(texts, rows[widest]["rewards"], parts[widest].tolist(), strict=True)
    return {
        "rewards": rewards.tolist(),
        "weights": weights.tolist(),
        "ess_per_prompt": ess,
        "kept_share": held,
        "replies_per_prompt": len(rewards) / len(rows),
        "example": {
            "question": question(rows[widest]["prompt"]),
            "answers": sorted(dict.fromkeys(answers), key=lambda row: -row[1]),
        },
    }


def _first_replies(replies: dict[str, Drawn]) -> list[dict]:
    """Held-out prompts in their order with each model's first reply: nothing is picked by hand."""
    prompts = replies["reference"].prompts[:_SHOWN]
    return [
        {
            "question": question(prompt),
            "replies": {
                name: {"text": drawn.texts[i * drawn.k].strip(), "reward": drawn.rewards[i * drawn.k]}
                for name, drawn in replies.items()
            },
        }
        for i, prompt in enumerate(prompts)
    ]


def _align(name: str) -> str:
    return f"Align by {name}" if name in ("VAR", "DPO") else f"Train by {name}"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU ({torch.get_num_threads()} of {os.cpu_count()} threads)"


def _environment(device: torch.device) -> dict:
    return {
        "device": _machine(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "var_kernels": var_kernels.__version__,
    }
