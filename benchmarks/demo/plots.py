"""The report's pictures, as SVG text."""

import io

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLORS = {"VAR": "#2563eb", "DPO": "#d97706", "SFT": "#7c8798", "Best-of-n SFT": "#0d9488", "reference": "#1f2937"}
_GREY = "#9aa4b2"
_BINS = 5
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


def rewards_before_and_after(results: dict) -> str:
    """Left: how the rewards of the answers are spread, before and after. Right: the mean of every held-out prompt."""
    before, after = results["rewards"]["reference"], results["rewards"]["VAR"]
    k = results["plan"]["eval_samples"]
    means = [
        [sum(values[i : i + k]) / k for i in range(0, len(values), k)] for values in (before, after)
    ]  # of each prompt
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), width_ratios=(1.35, 1), layout="constrained")
        low, high = min(before + after), max(before + after)
        edges = [low + (high - low or 1) * i / 16 for i in range(17)]
        for values, color, label in ((before, "#94a3b8", "before"), (after, COLORS["VAR"], "after VAR")):
            left.hist(values, edges, color=color, alpha=0.5, label=label, weights=[1 / len(values)] * len(values))
            left.axvline(sum(values) / len(values), color=color, linewidth=2)
        left.set(title="Rewards of the answers, held-out prompts", xlabel="reward (lines: means)", ylabel="share")
        left.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        left.legend(loc="upper left")
        span = [min(means[0] + means[1]), max(means[0] + means[1])]
        right.plot(span, span, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
        right.scatter(*means, s=26, color=COLORS["VAR"], alpha=0.75, linewidths=0)
        right.set(title="Each prompt: above the line it gained", xlabel="mean reward before", ylabel="after")
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
    low, high = min(rewards), max(rewards)
    width = (high - low) / _BINS or 1.0
    count, mass = [0] * _BINS, [0.0] * _BINS
    for reward, weight in zip(rewards, weights, strict=True):
        place = min(_BINS - 1, int((reward - low) / width))
        count[place] += 1
        mass[place] += weight
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.5), layout="constrained")
        left.scatter(rewards, weights, s=9, color=COLORS["VAR"], alpha=0.4, linewidths=0)
        _level(left, 1, "SFT: every weight 1")
        left.set(title="Weight of each answer", xlabel="reward", ylabel="weight, mean 1 per prompt")
        positions = range(_BINS)
        shares = ([n / len(rewards) for n in count], [m / sum(weights) for m in mass])
        for offset, share, color, label in (
            (-0.2, shares[0], "#cbd5e1", "of the answers"),
            (0.2, shares[1], COLORS["VAR"], "of the weight"),
        ):
            bars = right.bar([p + offset for p in positions], share, 0.38, color=color, label=label)
            right.bar_label(bars, [f"{s:.0%}" for s in share], padding=2, fontsize=8.5, color="#475569")
        right.set(title="Where the weight goes", xlabel="reward, up to", ylabel="share", xticks=list(positions))
        right.set_xticklabels([f"{low + (p + 1) * width:.1f}".replace("-", "\N{MINUS SIGN}") for p in positions])
        right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        right.grid(axis="x", visible=False)
        right.legend(loc="upper left")
        return _svg(figure)


def step_bars(results: dict) -> str:
    """Peak memory of a step by the number of its tokens; a step that found no room has no bar."""
    rows = results["memory"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
        for offset, loss, color in ((-0.2, "plain", "#cbd5e1"), (0.2, "fused", COLORS["VAR"])):
            heights = [row[loss]["peak_mib"] if row[loss] else 0.0 for row in rows]
            bars = axes.bar([i + offset for i in range(len(rows))], heights, 0.38, color=color, label=f"{loss} loss")
            labels = [f"{height:,.0f}" if height else "no room" for height in heights]
            axes.bar_label(bars, labels, padding=2, fontsize=8.5, color="#475569")
        axes.set(
            title="Peak memory of a training step", xlabel="tokens in the step", ylabel="MiB", xticks=range(len(rows))
        )
        axes.set_xticklabels([f"{row['tokens']:,}" for row in rows])
        axes.margins(y=0.12)
        axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper left")
        return _svg(figure)
