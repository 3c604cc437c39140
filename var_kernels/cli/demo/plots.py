"""The report's pictures, as SVG text."""

import io
import random
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLORS = {"VAR": "#2563eb", "DPO": "#d97706", "SFT": "#7c8798", "Best-of-n SFT": "#0d9488", "reference": "#1f2937"}
_GREY = "#9aa4b2"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c5ccd6",
    "axes.labelcolor": "#475569",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eef1f5",
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2,
    "svg.hashsalt": "var-kernels",
}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def training_curves(results: dict) -> str:
    """Left: reward sampled on held-out prompts over the steps. Right: VAR's effective sample size."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.5), width_ratios=(1.35, 1), layout="constrained")
        for name, history in results["history"].items():
            probe = history["probe"]
            left.plot(
                [p["step"] for p in probe],
                [p["reward"] for p in probe],
                color=COLORS[name],
                label=name,
                zorder=3 + (name == "VAR"),
            )
        _level(left, results["optimum"]["reward"], "optimum π*")
        _level(left, results["table"]["reference"]["reward"], "reference", x=0.8, points=-11)
        left.set(title="Reward of sampled replies, held-out prompts", xlabel="step", ylabel="points")
        left.legend(loc="center right")
        left.set_xlim(left=0)
        left.set_ylim(bottom=min(p["reward"] for h in results["history"].values() for p in h["probe"]) - 0.2)
        log = [entry for entry in results["history"]["VAR"]["log"] if "ess" in entry]
        replies, prompts = (
            results["plan"]["align_prompts"] * results["plan"]["completions"],
            results["plan"]["align_prompts"],
        )
        right.plot([entry["step"] for entry in log], [entry["ess"] for entry in log], color=COLORS["VAR"])
        _level(right, replies, "all replies weigh the same")
        _level(right, prompts, "one reply per prompt has all")
        right.set(
            title="VAR's effective sample size",
            xlabel="step",
            ylabel=f"replies, of {replies} in a batch",
            ylim=(0, replies * 1.12),
        )
        right.set_xlim(left=0)
        return _svg(figure)


def _level(axes, value: float, text: str, x: float = 0.015, points: int = 3) -> None:
    axes.axhline(value, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        text,
        (x, value),
        (0, points),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color="#64748b",
        fontsize=8.5,
    )


def weights_against_rewards(results: dict) -> str:
    """Left: the weight of every completion. Right: share of completions and share of weight, by reward."""
    rewards, weights = results["data"]["rewards"], results["data"]["weights"]
    values = sorted(set(rewards))
    count, mass = defaultdict(int), defaultdict(float)
    for reward, weight in zip(rewards, weights, strict=True):
        count[reward] += 1
        mass[reward] += weight
    jitter = random.Random(0)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.5), layout="constrained")
        spread = [reward + jitter.uniform(-0.2, 0.2) for reward in rewards]
        left.scatter(spread, weights, s=5, color=COLORS["VAR"], alpha=0.25, linewidths=0, rasterized=True)
        _level(left, 1, "SFT: every weight 1")
        left.set(
            title="Weight of each reply", xlabel="reward, points", ylabel="weight, mean 1 per prompt", xticks=values
        )
        positions = range(len(values))
        shares = ([count[v] / len(rewards) for v in values], [mass[v] / sum(weights) for v in values])
        for offset, share, color, label in (
            (-0.2, shares[0], "#cbd5e1", "of the replies"),
            (0.2, shares[1], COLORS["VAR"], "of the weight"),
        ):
            bars = right.bar([p + offset for p in positions], share, 0.38, color=color, label=label)
            right.bar_label(bars, [f"{s:.0%}" for s in share], padding=2, fontsize=8.5, color="#475569")
        right.set(title="Where the weight goes", xlabel="reward, points", ylabel="share", xticks=list(positions))
        right.set_xticklabels([f"{v:g}".replace("-", "\N{MINUS SIGN}") for v in values])
        right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        right.grid(axis="x", visible=False)
        right.legend(loc="upper left")
        return _svg(figure)


def reward_against_kl(results: dict) -> str:
    """Each policy's way from the reference, and the curve of the best that any policy can do at a given KL."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 3.9), layout="constrained")
        best = sorted(results["frontier"], key=lambda point: point["kl"])
        axes.plot(
            [p["kl"] for p in best],
            [p["reward"] for p in best],
            color=_GREY,
            linestyle=(0, (4, 3)),
            linewidth=1.5,
            label="best possible, π* for each λ",
        )
        for name, history in results["history"].items():
            row = results["table"][name]
            axes.plot(
                [p["kl"] for p in history["probe"]],
                [p["reward"] for p in history["probe"]],
                color=COLORS[name],
                linewidth=1,
                alpha=0.45,
            )
            axes.errorbar(
                row["kl"],
                row["reward"],
                yerr=row["reward_error"],
                xerr=row["kl_error"],
                fmt="o",
                markersize=7,
                color=COLORS[name],
                label=name,
                zorder=4,
            )
        point = results["optimum"]
        axes.plot(
            point["kl"],
            point["reward"],
            marker="D",
            markersize=7,
            color="white",
            markeredgecolor="#475569",
            linestyle="none",
            label=f"π* at λ = {point['lam']:g}",
        )
        axes.plot(
            0,
            results["table"]["reference"]["reward"],
            marker="o",
            markersize=7,
            color=COLORS["reference"],
            linestyle="none",
            label="reference",
        )
        axes.set(
            title="Reward against distance from the reference",
            xlabel="KL to the reference, nats per reply",
            ylabel="reward, points",
        )
        axes.legend(loc="lower right")
        return _svg(figure)


def memory_bars(results: dict) -> str:
    rows = results["memory"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4, 3.9), layout="constrained")
        for offset, key, color, label in (
            (-0.2, "plain_mib", "#cbd5e1", "plain loss"),
            (0.2, "fused_mib", COLORS["VAR"], "fused loss"),
        ):
            bars = axes.bar(
                [i + offset for i in range(len(rows))], [row[key] for row in rows], 0.38, color=color, label=label
            )
            axes.bar_label(bars, [f"{row[key]:,.0f}" for row in rows], padding=2, fontsize=8.5, color="#475569")
        axes.set(
            title="Peak memory of a training step", xlabel="tokens in the batch", ylabel="MiB", xticks=range(len(rows))
        )
        axes.set_xticklabels([f"{row['tokens']:,}" for row in rows])
        axes.set_ylim(top=1.1 * max(row["plain_mib"] for row in rows))
        axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper left")
        return _svg(figure)
