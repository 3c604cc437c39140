"""The study's runs in their order: references, the choice of learning rates on a seed of its own, the methods, long
runs, reward heads, the file of rated completions."""

import math
import statistics
from dataclasses import asdict

from benchmarks.study.heads import reward_head
from benchmarks.study.jobs import Job, Runner
from benchmarks.study.plan import HEADS, LONG, METHODS, REAL, Entry, Plan, chosen_methods
from benchmarks.study.real import real_align, real_reference
from benchmarks.study.world_runs import Context, align, reference


def run_all(runner: Runner, context: Context) -> dict:
    """Everything that the report is made of; what failed is missing in it."""
    plan = context.plan
    base = _settings(plan, _REFERENCE)
    seeds = (plan.tuning_seed, *plan.seeds)
    references = runner.run("references", [_job(f"reference-{s}", reference, {"seed": s}, base, 45) for s in seeds])
    ready = [seed for seed in plan.seeds if f"reference-{seed}" in references]
    results = {"reference": {seed: references[f"reference-{seed}"] for seed in ready}}
    names = chosen_methods(plan, METHODS)
    base = _settings(plan, _ALIGN)

    rates, results["rates"] = _tune(runner, plan, f"reference-{plan.tuning_seed}" in references)
    results["chosen"] = rates
    jobs = [
        _job(
            f"method-{slug(name)}-{seed}",
            align,
            _align(plan, seed, name, rates[name]),
            _of(base, METHODS[name]),
            _cost(name),
        )
        for seed in ready
        for name in names
    ]
    found = runner.run("methods", jobs)
    results["methods"] = _by_name(found, "method", names, ready)

    long_names = [name for name in LONG if name in names]
    jobs = [
        _job(
            f"long-{slug(name)}-{seed}",
            align,
            _align(plan, seed, name, rates[name]) | _long(plan),
            _of(base, METHODS[name]),
            5 * _cost(name),
        )
        for seed in ready
        for name in long_names
    ]
    results["long"] = _by_name(runner.run("long runs", jobs), "long", long_names, ready)
    results["heads"], results["head_rates"] = _heads(runner, plan, ready)
    results["real"] = _real(runner, context)
    return results


def _tune(runner: Runner, plan: Plan, possible: bool) -> tuple[dict[str, float], dict]:
    """(the rate of each method, figures of each rate): the best objective, reward - lam KL, on the tuning seed."""
    names = list(chosen_methods(plan, METHODS))
    jobs = [
        _job(
            f"rate-{slug(name)}-{rate:g}",
            align,
            _align(plan, plan.tuning_seed, name, rate) | {"probes": [], "samples": plan.tuning_samples},
            _of(_settings(plan, _ALIGN), METHODS[name]),
            _cost(name),
        )
        for name in names
        for rate in plan.rates
    ]
    found = runner.run("learning rates", jobs) if possible else {}
    table = {
        name: {
            rate: found[f"rate-{slug(name)}-{rate:g}"]["final"]
            for rate in plan.rates
            if f"rate-{slug(name)}-{rate:g}" in found
        }
        for name in names
    }
    return {name: _best(row, "objective", plan.rates) for name, row in table.items()}, table


def _best(row: dict[float, dict], figure: str, rates: tuple[float, ...]) -> float:
    """The rate of the largest figure; where none was measured, the middle of the grid."""
    known = {rate: final[figure] for rate, final in row.items() if not math.isnan(final[figure])}
    return max(known, key=known.get) if known else rates[len(rates) // 2]


def _heads(runner: Runner, plan: Plan, seeds: list[int]) -> tuple[dict, dict]:
    """(runs by loss, noise and seed, rates): the rate of the best mean accuracy over all noises on the tuning seed."""
    base = _settings(plan, _HEAD)
    options = [(name, rate, noise) for name in HEADS for rate in plan.head_rates for noise in plan.head_noise]
    jobs = [
        _job(
            f"headrate-{slug(name)}-{rate:g}-{noise:g}",
            reward_head,
            {"seed": plan.tuning_seed, "name": name, "rate": rate, "noise": noise},
            base | {"options": HEADS[name]},
            8,
        )
        for name, rate, noise in options
    ]
    found = runner.run("rates of reward heads", jobs)
    table: dict[str, dict[float, dict]] = {name: {} for name in HEADS}
    for name, rate, _ in options:
        keys = [f"headrate-{slug(name)}-{rate:g}-{noise:g}" for noise in plan.head_noise]
        if all(key in found for key in keys):
            table[name][rate] = {"accuracy": statistics.fmean(found[key]["accuracy"] for key in keys)}
    rates = {name: _best(row, "accuracy", plan.head_rates) for name, row in table.items()}
    jobs = [
        _job(
            f"head-{slug(name)}-{noise:g}-{seed}",
            reward_head,
            {"seed": seed, "name": name, "rate": rates[name], "noise": noise},
            base | {"options": HEADS[name]},
            8,
        )
        for seed in seeds
        for name in HEADS
        for noise in plan.head_noise
    ]
    found = runner.run("reward heads", jobs)
    figures = {
        name: {
            noise: {s: found[key] for s in seeds if (key := f"head-{slug(name)}-{noise:g}-{s}") in found}
            for noise in plan.head_noise
        }
        for name in HEADS
    }
    return figures, {"chosen": rates, "table": table}


def _real(runner: Runner, context: Context) -> dict | None:
    """None where no file was given."""
    if context.rewards_file is None:
        return None
    plan = context.plan
    base = {"plan": asdict(plan.real), "file": context.rewards_file.name, "size": context.rewards_file.stat().st_size}
    job = _job("real-reference", real_reference, {}, base, 100)
    references = runner.run("rated file: reference", [job])
    if not references:
        return {"failed": True}
    names = REAL if not plan.methods else {name: entry for name, entry in REAL.items() if name in plan.methods}
    jobs = [
        _job(
            f"realrate-{slug(n)}-{r:g}",
            real_align,
            {"seed": plan.tuning_seed, "name": n, "rate": r},
            _of(base, REAL[n]),
            8,
        )
        for n in names
        for r in plan.real.rates
    ]
    found = runner.run("rated file: learning rates", jobs)
    table = {
        name: {r: found[key]["final"] for r in plan.real.rates if (key := f"realrate-{slug(name)}-{r:g}") in found}
        for name in names
    }
    rates = {name: _best(row, "pair_accuracy", plan.real.rates) for name, row in table.items()}
    jobs = [
        _job(f"real-{slug(n)}-{s}", real_align, {"seed": s, "name": n, "rate": rates[n]}, _of(base, REAL[n]), 8)
        for s in plan.seeds
        for n in names
    ]
    found = runner.run("rated file: methods", jobs)
    return {
        "reference": references["real-reference"],
        "methods": _by_name(found, "real", names, plan.seeds),
        "rates": table,
        "chosen": rates,
    }


def _align(plan: Plan, seed: int, name: str, rate: float) -> dict:
    return {
        "seed": seed,
        "name": name,
        "rate": rate,
        "steps": plan.steps,
        "probes": list(plan.probes),
        "samples": plan.eval_samples,
        "schedule": "cosine",
    }


def _long(plan: Plan) -> dict:
    """A constant rate: a falling one would hide what goes wrong late."""
    return {"steps": plan.long_steps, "probes": list(plan.long_probes), "schedule": "constant_with_warmup"}


# What runs depend on beside their own arguments: a plan that differs elsewhere makes no result stale.
_WORLD = ("model", "pretrain_steps", "pretrain_batch", "pretrain_rate", "completions", "reply_tokens", "max_prompts")
_REFERENCE = (*_WORLD, "lam", "eval_samples", "frontier_samples")
_ALIGN = (*_WORLD, "lam", "eval_samples", "prompts", "probe_samples", "watched_pairs", "iteration_steps")
_HEAD = (*_WORLD, "head_steps", "head_pairs")


def _settings(plan: Plan, fields: tuple[str, ...]) -> dict:
    parts = asdict(plan)
    return {key: parts[key] for key in fields}


def _of(settings: dict, entry: Entry) -> dict:
    """The settings of a run of a method: its own beside the plan's."""
    return settings | {"method": {key: value for key, value in asdict(entry).items() if key != "note"}}


def _job(key: str, function, arguments: dict, settings: dict, cost: float) -> Job:
    return Job(key, function, arguments, settings, cost)


def _cost(name: str) -> float:
    entry = METHODS[name]
    return 12 if entry.online else 8 if entry.per_row or entry.method in ("var", "grpo") else 5


def _by_name(found: dict, prefix: str, names, seeds) -> dict[str, dict[int, dict]]:
    table = {name: {s: found[key] for s in seeds if (key := f"{prefix}-{slug(name)}-{s}") in found} for name in names}
    return {name: row for name, row in table.items() if row}


def slug(name: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "-" for c in name.lower()).replace("--", "-")
