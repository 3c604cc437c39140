"""The demo from end to end: build, draw, align, measure, report."""

import copy
import os
import platform
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console

import var_kernels
from var_kernels.cli.demo import experiment, world
from var_kernels.cli.demo.experiment import METHODS, Plan, Probe
from var_kernels.cli.demo.measure import chunks, draw, kl_to_reference, rewards_of, summarise
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
    began = time.monotonic()
    console = console or Console()
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    expected = {_REFERENCE: 85, _DRAW: 8, **{_align(name): 22 for name in METHODS}, _EVALUATE: 20, _MEMORY: 10, _REPORT: 6}
    console.print(f"[bold]var-kernels demo[/bold] on {_machine(device)}: about {_minutes(plan, device)}", highlight=False)
    with staged(output) as folder:
        with Phases(console, expected) as phases:
            results = _experiment(plan, seed, device, folder, phases)
            with phases.phase(_REPORT):
                results["seconds"] = {**phases.seconds, "all": time.monotonic() - began}
                write_report(folder / REPORT, results)
        write_metrics(folder, {key: results[key] for key in ("seed", "environment", "plan", "table", "optimum", "memory", "seconds")})
    print_results(console, results)
    console.print(f"\nReport: [bold]{Path(output) / REPORT}[/bold]   models, data, samples and metrics beside it", highlight=False)
    return results


def _experiment(plan: Plan, seed: int, device: torch.device, folder: Path, phases: Phases) -> dict:
    tasks, held_out = world.split_tasks(seed)
    with phases.phase(_REFERENCE, plan.pretrain_steps) as advance:
        reference, tokenizer, corpus = experiment.make_reference(plan, seed, folder, device.type, advance)
        _save(folder, "reference", reference, tokenizer)
    with phases.phase(_DRAW, chunks(tasks, plan.completions)) as advance:
        rows = experiment.draw_completions(reference, tokenizer, plan, tasks, seed + 1, advance)
    train_seconds = {"reference": phases.seconds[_REFERENCE]}
    write_jsonl(folder / "data" / "corpus.jsonl", corpus)
    write_jsonl(folder / "data" / "completions.jsonl", rows)
    write_jsonl(folder / "data" / "held_out.jsonl", ({"prompt": task.prompt} for task in held_out))

    policies, history = {"reference": reference}, {}
    for name in METHODS:
        probe = Probe(reference, tokenizer, held_out, plan.probe_every, seed + 2)
        with phases.phase(_align(name), plan.align_steps) as advance:
            began = time.monotonic()
            policy = copy.deepcopy(reference)
            log = experiment.align(policy, tokenizer, rows, name, plan, seed, folder, device.type, [probe], advance)
            train_seconds[name] = time.monotonic() - began - probe.seconds
        _save(folder, _slug(name), policy, tokenizer)
        policies[name] = policy
        history[name] = {"probe": probe.curve, "log": log}
    write_jsonl(folder / "history.jsonl", ({"model": n, "kind": k, **entry} for n, h in history.items() for k in h for entry in h[k]))

    drawn, table = {}, {}
    with phases.phase(_EVALUATE, chunks(held_out, plan.eval_samples) * len(policies) + chunks(held_out, plan.frontier_samples)) as advance:
        for name, policy in policies.items():
            drawn[name] = draw(policy, tokenizer, held_out, plan.eval_samples, seed + 3, advance)
            kl = kl_to_reference(policy, reference, tokenizer, drawn[name])
            table[name] = {**summarise(drawn[name], drawn["reference"], kl), "seconds": train_seconds[name]}
        many = draw(reference, tokenizer, held_out, plan.frontier_samples, seed + 4, advance)
        table["reference"]["win_rate"], table["reference"]["win_rate_error"] = 0.5, 0.0  # against itself, by definition
    write_jsonl(
        folder / "samples.jsonl",
        (
            {"prompt": held_out[i // d.k].prompt, "model": name, "reply": d.texts[i], "reward": d.scores[i].reward, **vars(d.scores[i])}
            for name, d in drawn.items()
            for i in range(len(d.texts))
        ),
    )
    memory_rows, vocab = plan.memory_rows, plan.memory_vocab
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 20 * 2**30:
        memory_rows, vocab = (1024, 2048, 4096), 128_256
    with phases.phase(_MEMORY, 2 * len(memory_rows)) as advance:
        memory = compare(memory_rows, vocab, device, seed, advance)

    rewards = torch.tensor([row["rewards"] for row in rows])  # (P, K)
    groups = torch.arange(len(rows)).repeat_interleave(plan.completions)
    weights = var_weights(rewards.flatten(), lam=plan.lam, normalizer="self_normalised", group_ids=groups).weight
    return {
        "seed": seed,
        "environment": _environment(device),
        "plan": {**vars(plan), "model": vars(plan.model), "parameters": sum(p.numel() for p in reference.parameters())},
        "table": table,
        "optimum": experiment.frontier(many, [plan.lam])[0],
        "frontier": experiment.frontier(many, FRONTIER_LAMS),
        "history": history,
        "memory": memory,
        "data": {"rewards": rewards.flatten().tolist(), "weights": weights.tolist(), "prompts": len(tasks), "held_out": len(held_out)},
        "samples": _first_of_each_kind(held_out, drawn),
        "corpus": corpus[:6],
        "mean_reward_of_data": rewards.mean().item(),
        "ess_per_prompt": _ess(weights.view_as(rewards)),
        "reference_rewards": rewards_of(drawn["reference"]).flatten().tolist(),
    }


def _first_of_each_kind(held_out: list[world.Task], drawn: dict) -> list[dict]:
    """The first two held-out prompts of each kind with each model's first reply: nothing is picked by hand."""
    seen: dict[str, int] = {}
    rows = []
    for i, task in enumerate(held_out):
        seen[task.kind] = seen.get(task.kind, 0) + 1
        if seen[task.kind] <= 2:
            replies = {name: {"text": d.texts[i * d.k].strip(), "score": d.scores[i * d.k]} for name, d in drawn.items()}
            rows.append({"kind": task.kind, "question": task.question, "replies": replies})
    return sorted(rows, key=lambda row: row["kind"])


def _ess(weights_PK: torch.Tensor) -> float:
    return (weights_PK.sum(1).square() / weights_PK.square().sum(1)).mean().item()


def _save(folder: Path, name: str, model, tokenizer) -> None:
    model.save_pretrained(folder / "models" / name)
    tokenizer.save_pretrained(folder / "models" / name)


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
