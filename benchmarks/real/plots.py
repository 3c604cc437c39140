"""The picture of the study on real rewards."""

from collections.abc import Sequence
from pathlib import Path

from var_kernels.cli.demo.plots import COLORS, STYLE, plt

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "real-study.png"
_PANELS = (
    ("gained", "Likelihood gained", "nats a token, under the rewards' weights", 0.0),
    ("lift", "Lift", "nats a token, over the average answer", 0.0),
    ("pair_accuracy", "Pairs ranked right", "share of clear pairs", 0.5),
    ("kl", "Distance from the reference", "KL, nats an answer", 0.0),
)


def write(rows: Sequence[dict[str, str]]) -> None:
    """Draw each seed as a point and the mean of the seeds as a line, for every method."""
    (reference,) = (float(row["weighted_nll"]) for row in rows if row["method"] == "reference")
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "reference"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(_PANELS), figsize=(13, 3.2), layout="constrained")
        for axis, (key, title, label, level) in zip(axes, _PANELS, strict=True):
            axis.axhline(level, color="#9aa4b2", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            for place, name in enumerate(names):
                found = [row for row in rows if row["method"] == name]
                values = [reference - float(r["weighted_nll"]) if key == "gained" else float(r[key]) for r in found]
                color = COLORS[name.partition(",")[0]]
                axis.scatter([place] * len(values), values, s=30, color=color, alpha=0.7, linewidths=0)
                axis.hlines(sum(values) / len(values), place - 0.25, place + 0.25, color=color)
            axis.set(title=title, ylabel=label, xticks=range(len(names)), xlim=(-0.6, len(names) - 0.4))
            short = [name.replace("Best-of-n SFT", "Best\nof n").replace("VAR, lambda", "VAR\nat") for name in names]
            axis.set_xticklabels(short)
            axis.grid(axis="x", visible=False)
        figure.savefig(PICTURE, dpi=120)
        plt.close(figure)
