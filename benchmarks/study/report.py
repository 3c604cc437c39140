"""docs/study.md, its pictures and its CSV files, from the results alone: no number in it is typed by hand."""

import platform
import statistics
from pathlib import Path
from string import Template

import torch
import transformers

import var_kernels
from benchmarks.small_world.world import MAX_WORDS
from benchmarks.study import claims as claims_module
from benchmarks.study import plots, tables
from benchmarks.study.claims import Claim, all_claims
from benchmarks.study.plan import HEADS, METHODS, REAL, Plan
from benchmarks.study.tables import markdown, number, spread
from benchmarks.study.world_runs import Context

PAGE = "study.md"


def write_all(results: dict, context: Context, failed: dict[str, str], docs: Path, csv_folder: Path) -> Path:
    """Everything anew; returns the page's path."""
    docs.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw_all(results, context.plan, docs)
    tables.write_csvs(csv_folder, results, results["chosen"])
    template = Template((Path(__file__).parent / "page.txt").read_text(encoding="utf-8"))
    page = docs / PAGE
    page.write_text(template.substitute(_values(results, context, failed, pictures)), encoding="utf-8")
    return page


def _values(results: dict, context: Context, failed: dict[str, str], pictures: list[str]) -> dict[str, str]:
    plan = context.plan
    references = list(results["reference"].values())
    first = references[0] if references else {}
    claims = all_claims(results, plan.lam)
    optima = [run["optima"][0] for run in references]
    return {
        "warning": "" if plan.name != "quick" else "\n**A quick run: every section, and figures that mean nothing.**\n",
        "failures": _failures(failed),
        "parameters": f"{first.get('parameters', 0):,}",
        "layers": str(plan.model.layers),
        "hidden": str(plan.model.hidden),
        "vocabulary": str(first.get("vocabulary", 0)),
        "corpus_rows": f"{plan.pretrain_steps * plan.pretrain_batch:,}",
        "train_prompts": str(first.get("train_prompts", 0)),
        "held_out_prompts": str(first.get("held_out_prompts", 0)),
        "completions": str(plan.completions),
        "max_words": str(MAX_WORDS),
        "reference_reward": _of(references, "reward"),
        "reference_right": _of(references, "right", 0, 100),
        "optimum_reward": spread([point["reward"] for point in optima]) if optima else "unknown",
        "optimum_kl": spread([point["kl"] for point in optima]) if optima else "unknown",
        "prompts": str(plan.prompts),
        "rows": str(plan.prompts * plan.completions),
        "steps": str(plan.steps),
        "epochs": number(plan.steps * plan.prompts / max(1, first.get("train_prompts", 1)), 1),
        "long_steps": str(plan.long_steps),
        "long_epochs": number(plan.long_steps * plan.prompts / max(1, first.get("train_prompts", 1)), 0),
        "iteration_steps": str(plan.iteration_steps),
        "fresh": str(plan.prompts * plan.iteration_steps),
        "lam": f"{plan.lam:g}",
        "grid": ", ".join(f"{rate:g}" for rate in plan.rates),
        "tuning_seed": str(plan.tuning_seed),
        "tuning_samples": str(plan.tuning_samples),
        "seeds": ", ".join(map(str, plan.seeds)),
        "eval_samples": str(plan.eval_samples),
        "method_table": tables.method_table(results, results["chosen"]),
        "settings_table": _settings_table(plan),
        "summary_table": _summary(claims),
        "rule": claims_module.RULE,
        "claims": "\n\n".join(_claim(claim) for claim in claims),
        "leaders": _leaders(results),
        "rates": tables.rate_table(results["rates"], results["chosen"], plan.rates, "objective"),
        "edges": _edges(results["rates"], results["chosen"], plan.rates),
        "cost": _cost(results),
        "head_steps": str(plan.head_steps),
        "head_pairs": str(plan.head_pairs),
        "head_grid": ", ".join(f"{rate:g}" for rate in plan.head_rates),
        "head_table": _head_table(results["heads"], results["head_rates"]["chosen"]),
        "head_data": _head_data(results["heads"]),
        "real": _real(results["real"], context, pictures),
        "minutes": number(_seconds(results) / 60, 0),
        "environment": _environment(context),
        **{name.replace("-", "_"): _picture(name, text, pictures) for name, text in _PICTURES.items()},
    }


_PICTURES = {
    "study-methods": "Reward, KL and objective of every method; small dots are seeds",
    "study-curves": "Sampled reward over the steps, and entropy against reward",
    "study-long": "Long runs at a constant rate: reward, KL, log-prob of held-out chosen answers, entropy",
    "study-heads": "Pair accuracy of reward heads over the share of flipped labels",
    "study-real": "Pair accuracy and lift on the rated file",
}


def _picture(name: str, text: str, pictures: list[str]) -> str:
    return f"![{text}]({name}.png)" if f"{name}.png" in pictures else ""


def _of(references: list[dict], figure: str, digits: int = 2, scale: float = 1.0) -> str:
    return spread([run["final"][figure] for run in references], digits, scale) if references else "unknown"


def _failures(failed: dict[str, str]) -> str:
    if not failed:
        return ""
    lines = [f"- `{key}`: {reason}" for key, reason in sorted(failed.items())]
    return "\n**Runs that failed, and are missing below:**\n\n" + "\n".join(lines) + "\n"


def _settings_table(plan: Plan) -> str:
    rows = []
    for name, entry in METHODS.items():
        settings = ", ".join(f"{key} {value}" for key, value in entry.resolved(plan.lam).items())
        unit = "completions" if entry.per_row else "prompts"
        rows.append([name, f"`{entry.method}`", settings, unit, "online" if entry.online else "", entry.note])
    return markdown(["", "loss", "settings", "items", "", ""], rows)


def _summary(claims: list[Claim]) -> str:
    return markdown(["claim", "answer"], [[claim.title, f"**{claim.verdict}**"] for claim in claims])


def _claim(claim: Claim) -> str:
    return f"### {claim.title}: {claim.verdict}\n\n{claim.meaning}\n\n{tables.claim_table(claim)}"


def _leaders(results: dict) -> str:
    """Who leads in what, in words."""
    methods = results["methods"]
    if not methods:
        return "No method has a result."
    lines = []
    for figure, what, best in (
        ("objective", "The best objective", max),
        ("reward", "The highest reward", max),
        ("distinct", "The most different replies", max),
        ("kl", "The largest KL to the reference", max),
    ):
        mean = {name: statistics.fmean(run["final"][figure] for run in runs.values()) for name, runs in methods.items()}
        name = best(mean, key=mean.get)
        _, digits, scale = tables.COLUMNS[figure]
        values = [run["final"][figure] for run in methods[name].values()]
        lines.append(f"- {what}: {name}, {spread(values, digits, scale)}{' %' if scale == 100 else ''}.")
    return "\n".join(lines)


def _edges(rates: dict, chosen: dict[str, float], grid: tuple[float, ...]) -> str:
    edge = [name for name in rates if chosen[name] in (grid[0], grid[-1])]
    if not edge:
        return "No chosen rate lies at the edge of the grid."
    return f"At the edge of the grid, so that a rate beyond it might do better: {'; '.join(edge)}."


def _cost(results: dict) -> str:
    rows = [
        [
            name,
            number(statistics.fmean(run["seconds"] for run in runs.values()), 1),
            number(statistics.fmean(run["peak_mib"] for run in runs.values()), 1),
        ]
        for name, runs in results["methods"].items()
    ]
    return markdown(["", "seconds", "MiB"], rows)


def _head_table(heads: dict, rates: dict[str, float]) -> str:
    noise = next((list(table) for table in heads.values()), [])
    rows = []
    for name in HEADS:
        for key, reading in (("accuracy", "last token"), ("accuracy_of_sums", "sum over tokens")):
            cells = [
                spread([run[key] for run in heads[name][level].values()], 1, 100) if heads[name][level] else "failed"
                for level in noise
            ]
            rows.append([name, reading, f"{rates[name]:g}", *cells])
    return markdown(["", "reward read at", "rate", *(f"{level:.0%} flipped" for level in noise)], rows)


def _head_data(heads: dict) -> str:
    runs = [run for table in heads.values() for seeds in table.values() for run in seeds.values()]
    if not runs:
        return "no pairs"
    counts = [statistics.fmean(run[key] for run in runs) for key in ("training_pairs", "test_pairs")]
    train, test = (number(count, 0) for count in counts)
    return f"{train} pairs of training prompts and tested on {test} of held-out ones (means over the seeds)"


def _real(real: dict | None, context: Context, pictures: list[str]) -> str:
    if real is None:
        return 'No file was given, so this part is left out: `make study ARGS="--rewards FILE.jsonl.gz"`.'
    if "methods" not in real:
        return "The reference of this part failed, so the part is left out."
    plan, reference = context.plan.real, real["reference"]
    head = Template((Path(__file__).parent / "real.md").read_text(encoding="utf-8")).substitute(
        file=context.rewards_file.name,
        train_prompts=reference["train_prompts"],
        held_out_prompts=reference["held_out_prompts"],
        parameters=f"{reference['parameters']:,}",
        pretrain_rows=f"{plan.pretrain_steps * plan.pretrain_batch:,}",
        max_length=plan.max_length,
        cut=f"{reference['cut']:.0%}",
        steps=plan.steps,
        prompts=plan.prompts,
        completions=plan.completions,
        grid=", ".join(f"{rate:g}" for rate in plan.rates),
        lam=f"{plan.lam:g}",
        clear_pairs=f"{reference['final']['clear_pairs']:,}",
    )
    figures = {"nll": 3, "weighted_nll": 3, "lift": 4, "pair_accuracy": 1, "likelihood_accuracy": 1}
    scale = {"pair_accuracy": 100, "likelihood_accuracy": 100}
    rows = []
    mean = lambda runs: statistics.fmean(run["final"]["pair_accuracy"] for run in runs.values())  # noqa: E731
    for name, runs in sorted(real["methods"].items(), key=lambda item: -mean(item[1])):
        cells = [spread([r["final"][f] for r in runs.values()], d, scale.get(f, 1)) for f, d in figures.items()]
        entry = REAL[name]
        settings = ", ".join(f"{key} {value}" for key, value in entry.resolved(plan.lam).items())
        rows.append([name, settings, f"{real['chosen'][name]:g}", *cells])
    cells = [number(reference["final"][f], d, scale.get(f, 1)) for f, d in figures.items()]
    rows.append(["*reference*", "", "", *cells])
    heads = ["", "settings", "rate", "NLL", "weighted NLL", "lift", "pairs, %", "by likelihood, %"]
    return f"{head}\n{markdown(heads, rows)}\n\n{_picture('study-real', _PICTURES['study-real'], pictures)}"


def _seconds(results: dict) -> float:
    runs = [run for kind in ("methods", "long") for seeds in results[kind].values() for run in seeds.values()]
    return sum(run["seconds"] for run in runs)


def _environment(context: Context) -> str:
    cuda = context.device.type == "cuda"
    device = torch.cuda.get_device_name(context.device) if cuda else "the CPU, one thread a run"
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "var-kernels": var_kernels.__version__,
    }
    return f"{device}; " + ", ".join(f"{name} {version}" for name, version in versions.items())
