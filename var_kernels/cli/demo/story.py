"""The demo from end to end: build, draw, align, measure, report."""

import contextlib
import copy
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from rich.console import Console

import var_kernels
from var_kernels.cli.demo import experiment, world
from var_kernels.cli.demo.experiment import METHODS, Plan, Probe, Run
from var_kernels.cli.demo.measure import Drawn, chunks, draw, kl_to_reference, mean_and_error, rewards_of, summarise
from var_kernels.cli.demo.memory import compare
from var_kernels.cli.demo.output import REPORT, staged, write_jsonl, write_metrics
from var_kernels.cli.demo.progress import Phases
from var_kernels.cli.demo.report import write_report
from var_kernels.cli.demo.table import print_results
from var_kernels.losses import var_weights

FRONTIER_LAMS = [0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.4, 2.0, 4.0, 10.0]
_REFERENCE = "Train the reference on mixed-quality text"
_DRAW = "Let the reference answer, score its answers"
_EVALUATE = "Sample all models on held-out prompts"
_MEMORY = "Measure memory, plain loss against fused"
_REPORT = "Draw the report"


def tell(output: str, plan: Plan, *, seed: int, cpu: bool = False, console: Console | None = None) -> dict:
    """Run the demo and save everything under ``output``; returns the metrics that were saved."""
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    with _quiet():
        return _tell(output, plan, seed, device, console or Console())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own lines: a few prompts have answers of one reward, as planned."""
    log, theirs = logging.getLogger("var_kernels"), transformers.utils.logging
    level, verbosity, bars = log.level, theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(level)
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


def _tell(output: str, plan: Plan, seed: int, device: torch.device, console: Console) -> dict:
    began = time.monotonic()
    expected = {
        _REFERENCE: 85,
        _DRAW: 8,
        **{_align(name): 22 for name in METHODS},
        _EVALUATE: 20,
        _MEMORY: 10,
        _REPORT: 6,
    }
    console.print(
        f"[bold]var-kernels demo[/bold] on {_machine(device)}: about {_minutes(plan, device)}", highlight=False
    )
    with staged(output) as folder:
        with Phases(console, expected) as phases:
            results = _experiment(Run(plan, seed, folder, device), phases)
            with phases.phase(_REPORT):
                results["seconds"] = {**phases.seconds, "all": time.monotonic() - began}
                write_report(folder / REPORT, results)
        write_metrics(
            folder,
            {key: results[key] for key in ("seed", "environment", "plan", "table", "optimum", "memory", "seconds")},
        )
    print_results(console, results)
    console.print(
        f"\nReport: [bold]{Path(output) / REPORT}[/bold]   models, data, samples and metrics beside it", highlight=False
    )
    return results


def _experiment(run: Run, phases: Phases) -> dict:
    plan, folder = run.plan, run.folder
    tasks, held_out = world.split_tasks(run.seed)
    with phases.phase(_REFERENCE, plan.pretrain_steps) as advance:
        reference, tokenizer, corpus = experiment.make_reference(run, advance)
    with phases.phase(_DRAW, chunks(tasks, plan.completions)) as advance:
        rows = experiment.draw_completions(reference, tokenizer, run, tasks, advance)
    write_jsonl(folder / "data" / "corpus.jsonl", corpus)
    write_jsonl(folder / "data" / "completions.jsonl", rows)
    write_jsonl(folder / "data" / "held_out.jsonl", ({"prompt": task.prompt} for task in held_out))

    policies, history, seconds = _align_all(run, reference, tokenizer, rows, held_out, phases)
    seconds["reference"] = phases.seconds[_REFERENCE]
    for name, policy in policies.items():
        policy.save_pretrained(folder / "models" / _slug(name))
        tokenizer.save_pretrained(folder / "models" / _slug(name))
    drawn, table, optima = _evaluate(run, policies, tokenizer, held_out, phases)
    return {
        "seed": run.seed,
        "environment": _environment(run.device),
        "plan": {**vars(plan), "model": vars(plan.model), "parameters": sum(p.numel() for p in reference.parameters())},
        "table": {name: {**row, "seconds": seconds[name]} for name, row in table.items()},
        "optimum": next(point for point in optima if point["lam"] == plan.lam),
        "frontier": optima,
        "history": history,
        "memory": _memory(run, phases),
        "data": {**_weigh(rows, plan.lam), "prompts": len(tasks), "held_out": len(held_out)},
        "samples": _first_of_each_kind(held_out, drawn),
    }


def _align_all(run: Run, reference, tokenizer, rows: list[dict], held_out: list[world.Task], phases: Phases):
    """(policies, histories, training seconds), each by name; the reference is one of the policies."""
    policies, history, seconds = {"reference": reference}, {}, {}
    for name in METHODS:
        probe = Probe(reference, tokenizer, held_out, run.plan.probe_every, run.seed + 2)
        with phases.phase(_align(name), run.plan.align_steps) as advance:
            began = time.monotonic()
            policies[name] = copy.deepcopy(reference)
            log = experiment.align(name, policies[name], tokenizer, rows, run, advance, [probe])
            seconds[name] = time.monotonic() - began - probe.seconds
        history[name] = {"probe": probe.curve, "log": log}
    entries = ((name, kind, entry) for name, parts in history.items() for kind in parts for entry in parts[kind])
    write_jsonl(run.folder / "history.jsonl", ({"model": name, "kind": kind, **entry} for name, kind, entry in entries))
    return policies, history, seconds


def _evaluate(run: Run, policies: dict, tokenizer, held_out: list[world.Task], phases: Phases):
    """(replies by policy, result table, reward and KL of pi* for several lambda), all on held-out prompts."""
    plan, drawn, table = run.plan, {}, {}
    steps = chunks(held_out, plan.eval_samples) * len(policies) + chunks(held_out, plan.frontier_samples)
    with phases.phase(_EVALUATE, steps) as advance:
        for i, (name, policy) in enumerate(policies.items()):
            drawn[name] = draw(policy, tokenizer, held_out, plan.eval_samples, run.seed + 4 + i, advance)
            kl = kl_to_reference(policy, policies["reference"], tokenizer, drawn[name])
            table[name] = summarise(drawn[name], drawn["reference"], kl)
            objective, error = mean_and_error(rewards_of(drawn[name]) - plan.lam * kl)
            table[name] |= {"objective": objective, "objective_error": error}
        many = draw(policies["reference"], tokenizer, held_out, plan.frontier_samples, run.seed + 3, advance)
    write_jsonl(run.folder / "samples.jsonl", (row for name, replies in drawn.items() for row in _rows(name, replies)))
    return drawn, table, experiment.frontier(many, sorted({plan.lam, *FRONTIER_LAMS}))


def _rows(name: str, drawn: Drawn):
    for i, (text, score) in enumerate(zip(drawn.texts, drawn.scores, strict=True)):
        prompt = drawn.tasks[i // drawn.k].prompt
        yield {"prompt": prompt, "model": name, "reply": text, "reward": score.reward, **vars(score)}


def _memory(run: Run, phases: Phases) -> list[dict]:
    rows, vocab = run.plan.memory_rows, run.plan.memory_vocab
    if run.device.type == "cuda" and torch.cuda.mem_get_info(run.device)[0] > 20 * 2**30:
        vocab = 128_256
    with phases.phase(_MEMORY, 2 * len(rows)) as advance:
        return compare(rows, vocab, run.device, run.seed, advance)


def _weigh(rows: list[dict], lam: float) -> dict:
    """Reward and VAR weight of every completion, and those of one prompt in full: the first with the most rewards."""
    rewards_PK = torch.tensor([row["rewards"] for row in rows])
    groups = torch.arange(len(rows)).repeat_interleave(rewards_PK.shape[1])
    result = var_weights(rewards_PK.flatten(), lam=lam, group_ids=groups)
    weights_PK = result.weight.view_as(rewards_PK)
    ess_P = weights_PK.sum(1).square() / weights_PK.square().sum(1)
    widest = max(range(len(rows)), key=lambda i: len(set(rows[i]["rewards"])))
    answers = zip(rows[widest]["completions"], rows[widest]["rewards"], weights_PK[widest].tolist(), strict=True)
    return {
        "rewards": rewards_PK.flatten().tolist(),
        "weights": weights_PK.flatten().tolist(),
        "ess_per_prompt": ess_P.mean().item(),
        "example": {
            "prompt": rows[widest]["prompt"],
            "answers": sorted(dict.fromkeys(answers), key=lambda row: -row[1]),
        },
    }


def _first_of_each_kind(held_out: list[world.Task], drawn: dict) -> list[dict]:
    """The first two held-out prompts of each kind with each model's first reply: nothing is picked by hand."""
    seen: dict[str, int] = {}
    rows = []
    for i, task in enumerate(held_out):
        seen[task.kind] = seen.get(task.kind, 0) + 1
        if seen[task.kind] <= 2:
            replies = {
                name: {"text": d.texts[i * d.k].strip(), "score": d.scores[i * d.k]} for name, d in drawn.items()
            }
            rows.append({"kind": task.kind, "question": task.question, "replies": replies})
    return sorted(rows, key=lambda row: row["kind"])


def _align(name: str) -> str:
    return f"Align by {name}" if name in ("VAR", "DPO") else f"Train by {name}"


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _minutes(plan: Plan, device: torch.device) -> str:
    if plan is experiment.QUICK or device.type == "cuda":
        return "a minute"
    return "three to four minutes on two CPU cores"


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
