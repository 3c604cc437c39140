"""The picture of the study on real rewards."""

import io
from collections.abc import Sequence
from pathlib import Path

from var_kernels.cli.demo.plots import COLORS, STYLE, plt

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "real-study.svg"
_PANELS = (
    ("lift", "What the rewards prefer gained", "nats a token over the average completion", 0.0),
    ("pair_accuracy", "Pairs ranked right by the implied reward", "share of clear pairs", 0.5),
    ("kl", "Distance from the reference", "KL, nats an answer", 0.0),
)


def picture(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    """Each seed a point, the mean of the seeds a line, for every method."""
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    names = list(dict.fromkeys(row["method"] for row in found if row["method"] != "reference"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(_PANELS), figsize=(11, 3.4), layout="constrained")
        for axis, (key, title, label, level) in zip(axes, _PANELS, strict=True):
            axis.axhline(level, color="#9aa4b2", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            for place, name in enumerate(names):
                values = [float(row[key]) for row in found if row["method"] == name]
                axis.scatter([place] * len(values), values, s=30, color=COLORS[name], alpha=0.7, linewidths=0)
                axis.hlines(sum(values) / len(values), place - 0.25, place + 0.25, color=COLORS[name])
            axis.set(title=title, ylabel=label, xticks=range(len(names)), xlim=(-0.6, len(names) - 0.4))
            axis.set_xticklabels([name.removesuffix(" SFT") for name in names])
            axis.grid(axis="x", visible=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
