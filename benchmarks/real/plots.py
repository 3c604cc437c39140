"""The pictures of docs/real.md: the memory of training steps, the study on real rewards."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.demo.plots import COLORS, STYLE, plt
from benchmarks.real.tables import NAMES

DOCS = Path(__file__).resolve().parents[2] / "docs"
STUDY, STEPS = DOCS / "real-study.png", DOCS / "real-steps.png"
_PANELS = (
    ("gained", "Likelihood gained", "nats a token, under the rewards' weights", 0.0),
    ("lift", "Lift", "nats a token, over the average answer", 0.0),
    ("pair_accuracy", "Pairs ranked right", "share of clear pairs", 0.5),
    ("kl", "Distance from the reference", "KL, nats an answer", 0.0),
)


def write_steps(rows: Sequence[dict[str, str]]) -> None:
    """Draw the highest memory of every head in bf16: of each model the longest step without and with checkpointing."""
    heads = ("transformers", "TRL", "F.linear_cross_entropy", "torch.compile", "var_kernels")
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        if row["dtype"] == "bfloat16" and row["peak_mib"] and row["head"] in heads:
            setting = (row["model"], row["checkpointing"], int(row["tokens"]))
            found.setdefault(setting, {})[row["head"]] = float(row["peak_mib"]) / 1024
    longest = {key[:2]: key for key in sorted(found) if {"transformers", "var_kernels"} <= found[key].keys()}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, -(-len(longest) // 2), figsize=(10, 4.4), layout="constrained", squeeze=False)
        for axis, key in zip(axes.flat, sorted(longest.values(), reverse=True), strict=False):
            peaks = {head: found[key][head] for head in reversed(heads) if head in found[key]}
            colors = [COLORS["VAR" if head == "var_kernels" else "SFT"] for head in peaks]
            axis.bar_label(axis.barh(list(peaks), list(peaks.values()), color=colors), fmt="%.1f", padding=3)
            model, checkpointing, tokens = key
            kept = "checkpointing" if checkpointing == "1" else "no checkpointing"
            axis.set(title=f"{NAMES[model]}, {tokens:,} tokens, {kept}", xlabel="GiB of the process")
            axis.margins(x=0.15)
            axis.grid(axis="y", visible=False)
        for axis in axes.flat[len(longest) :]:
            axis.remove()
        figure.savefig(STEPS, dpi=120)
        plt.close(figure)


def write_study(rows: Sequence[dict[str, str]]) -> None:
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
        figure.savefig(STUDY, dpi=120)
        plt.close(figure)
