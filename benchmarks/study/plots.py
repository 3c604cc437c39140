"""The report's pictures."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.demo.plots import STYLE
from benchmarks.study.plan import DPO, LONG, VAR, Plan

_VAR, _DPO, _SFT, _SAIL, _ONLINE, _OTHER = "#2563eb", "#d97706", "#7c8798", "#16a34a", "#9333ea", "#0d9488"
_INK, _LEVEL = "#475569", "#9aa4b2"
CURVES = (VAR, "VAR, group, sum", "Best-of-n SFT", DPO, "SAIL-PR, k 0.3", "Iterative DPO", "Online VAR")
_LONG_COLORS = {VAR: _VAR, "Best-of-n SFT": _OTHER, DPO: _DPO, "DPO, beta 0.1": "#dc2626"}


def color_of(name: str) -> str:
    families = (
        ("SAIL", _SAIL),
        ("VAR", _VAR),
        ("DPO", _DPO),
        ("SFT", _SFT),
        ("Iterative", _ONLINE),
        ("Online", _ONLINE),
    )
    return next((color for start, color in families if name.startswith(start)), _OTHER)


def draw_all(results: dict, plan: Plan, folder: Path) -> list[str]:
    """The names of the files made: a picture without data is left out."""
    made = []
    with plt.rc_context(STYLE):
        for name, figure in (
            ("study-methods", _methods(results)),
            ("study-curves", _curves(results)),
            ("study-long", _long(results, plan)),
            ("study-heads", _heads(results)),
            ("study-real", _real(results)),
        ):
            path = folder / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            figure.savefig(path, dpi=110, facecolor="white", pil_kwargs={"optimize": True})
            plt.close(figure)
            made.append(path.name)
    return made


def _methods(results: dict):
    """Reward, KL and objective of every method, its seeds as dots."""
    methods = results["methods"]
    if not methods:
        return None
    mean = {name: statistics.fmean(r["final"]["objective"] for r in runs.values()) for name, runs in methods.items()}
    names = sorted(methods, key=mean.get)
    figure, axes = plt.subplots(
        1, 3, figsize=(11, 1.6 + 0.27 * len(names)), sharey=True, layout="constrained", width_ratios=(1.2, 1, 1.2)
    )
    optima = [run["optima"][0] for run in results["reference"].values()]
    start = statistics.fmean(run["final"]["reward"] for run in results["reference"].values())
    for axis, key, title in zip(
        axes,
        ("reward", "kl", "objective"),
        ("Reward, points", "KL to the reference, nats", "Objective: reward - lam KL"),
        strict=True,
    ):
        for row, name in enumerate(names):
            values = [run["final"][key] for run in methods[name].values()]
            axis.plot(values, [row] * len(values), "o", color=color_of(name), alpha=0.35, markersize=4)
            axis.plot(statistics.fmean(values), row, "o", color=color_of(name), markersize=7)
        levels = [(statistics.fmean(point[key] for point in optima), "π*")]
        levels += [(start, "reference")] if key != "kl" else []
        for value, text in levels:
            axis.axvline(value, color=_LEVEL, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axis.annotate(
                text, (value, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", color=_INK, fontsize=8.5,
            )  # fmt: skip
        axis.set_title(title, pad=16)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].margins(y=0.02)
    if max(run["final"]["kl"] for runs in methods.values() for run in runs.values()) > 5:
        axes[1].set_xscale("symlog", linthresh=1.0)
    axes[1].set_xlim(left=-0.05)
    low = statistics.fmean(optima_objective["objective"] for optima_objective in optima)
    axes[2].set_xlim(min(max(min(mean.values()) - 0.1, start - 1.2), start - 0.1), low + 0.15)
    return figure


def _curves(results: dict):
    """Left: reward over the steps. Right: the way of each policy in reward and entropy."""
    shown = [name for name in CURVES if any(run["curve"] for run in results["methods"].get(name, {}).values())]
    if not shown:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    palette = dict(zip(CURVES, (_VAR, "#93c5fd", _OTHER, _DPO, _SAIL, _ONLINE, "#0f172a"), strict=True))
    for name in shown:
        points = _averaged(results["methods"][name])
        left.plot([p["step"] for p in points], [p["reward"] for p in points], "o-", markersize=3, color=palette[name],
                  label=name)  # fmt: skip
        right.plot([p["reward"] for p in points], [p["entropy"] for p in points], "o-", markersize=3,
                   color=palette[name])  # fmt: skip
    best = [run["optima"] for run in results["reference"].values()]
    frontier = sorted(
        (statistics.fmean(p["reward"] for p in level), statistics.fmean(p["entropy"] for p in level))
        for level in zip(*best, strict=True)
    )
    right.plot(*zip(*frontier, strict=True), color=_LEVEL, linestyle=(0, (4, 3)), linewidth=1.5, label="π* for each λ")
    left.set(title="Sampled reward, held-out prompts", xlabel="step", ylabel="points")
    right.set(title="Diversity against reward", xlabel="reward, points", ylabel="entropy of a reply, nats")
    figure.legend(loc="outside right center")
    return figure


def _averaged(runs: dict[int, dict]) -> list[dict]:
    """The mean over seeds of every probe; ``low`` and ``high`` hold the extremes."""
    points = []
    for looks in zip(*(run["curve"] for run in runs.values()), strict=True):
        keys = looks[0].keys()
        point = {key: statistics.fmean(look[key] for look in looks) for key in keys}
        point["low"] = {key: min(look[key] for look in looks) for key in keys}
        point["high"] = {key: max(look[key] for look in looks) for key in keys}
        points.append(point)
    return points


def _long(results: dict, plan: Plan):
    if not results["long"]:
        return None
    panels = (
        ("reward", "Sampled reward, points"),
        ("kl", "KL to the reference, nats"),
        ("held_out_chosen", "log π(chosen), held-out pairs, nats"),
        ("entropy", "Entropy of a reply, nats"),
    )
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    for axis, (key, title) in zip(axes.flat, panels, strict=True):
        for name in (name for name in LONG if name in results["long"]):
            points, color = _averaged(results["long"][name]), _LONG_COLORS[name]
            steps = [point["step"] for point in points]
            axis.plot(steps, [point[key] for point in points], "o-", markersize=3, color=color, label=name)
            axis.fill_between(
                steps,
                [point["low"][key] for point in points],
                [point["high"][key] for point in points],
                color=color,
                alpha=0.15,
                linewidth=0,
            )
        axis.axvline(plan.steps, color=_LEVEL, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axis.set_title(title)
    axes[0][1].set_yscale("symlog", linthresh=1.0)
    axes[0][1].set_ylim(bottom=0)
    axes[1][0].legend(loc="lower left", frameon=True, facecolor="white", edgecolor="none", framealpha=1)
    for axis in axes[1]:
        axis.set_xlabel("step (dashed: the length of the other runs)")
    return figure


def _heads(results: dict):
    heads = {name: table for name, table in results["heads"].items() if any(table.values())}
    if not heads:
        return None
    figure, axis = plt.subplots(figsize=(8.5, 3.8), layout="constrained")
    colors = {"Bradley-Terry": "#1f2937", "AVA-p": _OTHER, "AVA-p, contrast 20": _VAR}
    for place, (name, table) in enumerate(heads.items()):
        for key, reading in (("accuracy", ""), ("accuracy_of_sums", ", summed over tokens")):
            if reading and name == "Bradley-Terry":
                continue
            noise = [level for level in table if table[level]]
            values = [[run[key] for run in table[level].values()] for level in noise]
            axis.errorbar(
                [level + 0.004 * (place + len(reading) / 25 - 1) for level in noise],
                [statistics.fmean(v) for v in values],
                yerr=[statistics.stdev(v) if len(v) > 1 else 0 for v in values],
                color=colors[name],
                linestyle=(0, (3, 2)) if reading else "-",
                marker="o",
                markersize=4,
                capsize=3,
                label=name + reading,
            )
    axis.axhline(0.5, color=_LEVEL, linewidth=1)
    axis.set(title="Reward heads: accuracy on held-out pairs", xlabel="flipped labels", ylabel="pairs ranked right")
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axis.set_xticks(noise)
    figure.legend(loc="outside right center")
    return figure


def _real(results: dict):
    real = results["real"]
    if not real or not real.get("methods"):
        return None
    methods = real["methods"]
    names = sorted(
        methods, key=lambda name: statistics.fmean(r["final"]["pair_accuracy"] for r in methods[name].values())
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 1.5 + 0.3 * len(names)), sharey=True, layout="constrained")
    for axis, key, title in zip(
        axes,
        ("pair_accuracy", "lift", "nll"),
        ("Pairs ranked right", "Lift, nats a token", "NLL, nats a token"),
        strict=True,
    ):
        for row, name in enumerate(names):
            values = [run["final"][key] for run in methods[name].values()]
            axis.plot(values, [row] * len(values), "o", color=color_of(name), alpha=0.35, markersize=4)
            axis.plot(statistics.fmean(values), row, "o", color=color_of(name), markersize=7)
        axis.axvline(real["reference"]["final"][key], color=_LEVEL, linewidth=1, linestyle=(0, (4, 3)))
        axis.set_title(title)
        axis.set_xlabel("dashed: the reference")
    axes[0].xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes[0].set_yticks(range(len(names)), names)
    return figure
