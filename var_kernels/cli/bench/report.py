"""The results of a run: a sentence, a table, a picture, a page, and the comparison of two runs."""

import base64
import html
import io
import json
from operator import itemgetter
from pathlib import Path
from string import Template
from typing import Any

from var_kernels.cli.bench.measure import BARE, GEMMS, MODES
from var_kernels.cli.bench.sides import OURS, PLAIN

_OURS_COLOUR, _OTHERS_COLOUR, _BARE_COLOUR = "#1b6ca8", "#b8bec6", "#e3e6ea"
_COLUMNS = ("ms", "tokens/s", "of the GEMMs' rate", "peak MiB", "error of the loss")
_MEANS = {
    "training": "Gradients of hidden states and head",
    "frozen head": "Gradients of hidden states alone: LoRA elsewhere in the model",
    "scoring": "No gradients: log-probs, evaluation",
}


def sentence(results: dict[str, Any]) -> str:
    """The gain in one sentence: ours against transformers' own loss."""
    ours, plain = (find(results, side, "training") for side in (OURS, PLAIN))
    about = results["about"]
    head = f"the head of {about['model']} ({about['hidden']} x {about['vocab']}) at {about['tokens']:,} tokens"
    if not ours or ours["ms"] is None:
        return f"No figure for {head}: {ours['note'] if ours else 'nothing was measured'}."
    fused = f"{ours['ms']:,.0f} ms and {ours['peak_mib']:,.0f} MiB with var_kernels"
    if not plain or plain["ms"] is None:
        return (
            f"A training step of {head} takes {fused}; transformers' own loss: {plain['note'] if plain else 'not run'}."
        )
    faster, smaller = plain["ms"] / ours["ms"], plain["peak_mib"] / ours["peak_mib"]
    pace = f"{faster:.1f} times as fast" if faster >= 1 else f"{1 / faster:.2f} times the time"
    return (
        f"A training step of {head} takes {fused}, {plain['ms']:,.0f} ms and {plain['peak_mib']:,.0f} MiB with "
        f"transformers' own loss: {pace}, {smaller:.1f} times less memory."
    )


def find(results: dict[str, Any], side: str, mode: str) -> dict[str, Any] | None:
    return next((row for row in results["rows"] if (row["side"], row["mode"]) == (side, mode)), None)


def of_mode(results: dict[str, Any], mode: str) -> list[dict[str, Any]]:
    """Rows of a mode that have figures, the fastest first."""
    return sorted(
        (row for row in results["rows"] if row["mode"] == mode and row["ms"] is not None), key=itemgetter("ms")
    )


def timed_modes(results: dict[str, Any]) -> list[str]:
    return [mode for mode in MODES if of_mode(results, mode)]


def without_figures(results: dict[str, Any], mode: str) -> str:
    """The losses that were not timed in a mode, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in results["rows"]:
        if row["mode"] == mode and row["ms"] is None:
            reasons.setdefault(row["note"], []).append(row["side"])
    if len(reasons) == 1 and mode not in timed_modes(results):
        return next(iter(reasons))
    return "; ".join(f"{', '.join(sides)}: {reason}" for reason, sides in reasons.items())


def cells(row: dict[str, Any]) -> list[str]:
    """The row's figures as text, in the order of the columns."""
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.1f}"
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    rate = f"{row['percent_of_gemms']:.0f} %"
    return [f"{row['ms']:,.1f}", f"{row['tokens_per_second']:,.0f}", rate, peak, error]


def print_results(console, results: dict[str, Any]) -> None:
    """The sentence, a table for each mode, and what could not run."""
    from rich.table import Table

    console.print(sentence(results), highlight=False)
    for mode in MODES:
        table = Table(title=f"{mode}: {_MEANS[mode]}", title_justify="left", box=None, padding=(0, 1))
        table.add_column("loss", no_wrap=True)
        for name in _COLUMNS:
            table.add_column(name, justify="right")
        for row in of_mode(results, mode):
            table.add_row(row["side"], *cells(row), style="bold" if row["side"] == OURS else None)
        console.print()
        left_out = without_figures(results, mode)
        if table.rows:
            console.print(table, highlight=False)
        if left_out:
            console.print(f" {left_out}" if table.rows else f"{mode}: {left_out}", highlight=False)
    missing = "; ".join(f"{name}: {why}" for name, why in results["missing"].items())
    if missing:
        console.print(f"\nnot compared: {missing}", highlight=False)


def draw(results: dict[str, Any]) -> bytes:
    """A PNG: time and peak memory of every loss, a row of panels a mode."""
    from matplotlib.figure import Figure

    modes = {mode: of_mode(results, mode)[::-1] for mode in timed_modes(results)}
    heights = [max(1, len(rows)) for rows in modes.values()]
    figure = Figure(figsize=(11, 0.34 * sum(heights) + 2.4), layout="constrained")
    panels = figure.subplots(len(modes), 2, squeeze=False, height_ratios=heights) if modes else []
    for (times, memory), (mode, rows) in zip(panels, modes.items(), strict=True):
        for axis, field, unit in ((times, "ms", "ms"), (memory, "peak_mib", "MiB")):
            shown = [row for row in rows if row[field] is not None]
            names, values = [row["side"] for row in shown], [row[field] for row in shown]
            bars = axis.barh(names, values, color=[_colour(name) for name in names], height=0.7)
            axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
            axis.set_title(f"{mode}: {'time' if unit == 'ms' else 'peak memory'}, {unit}", fontsize=9, loc="left")
            axis.set_xlim(0, 1.15 * max(values, default=1.0))
            axis.tick_params(labelsize=8, length=0)
            axis.xaxis.set_visible(False)
            axis.spines[["top", "right", "bottom"]].set_visible(False)
    about = results["about"]
    figure.suptitle(
        f"{about['model']}: {about['tokens']:,} tokens x {about['hidden']:,} hidden x {about['vocab']:,} vocabulary, "
        f"{about['dtype']}\n{about['machine']}",
        fontsize=10,
    )
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _colour(name: str) -> str:
    if name == BARE:
        return _BARE_COLOUR
    return _OURS_COLOUR if name.startswith("var_kernels") else _OTHERS_COLOUR


def page(results: dict[str, Any], picture: bytes) -> str:
    """An HTML page that stands alone."""
    tables = []
    for mode in MODES:
        lines = []
        for row in of_mode(results, mode):
            kind = ' class="ours"' if row["side"].startswith("var_kernels") else ""
            figures = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row))
            lines.append(f"<tr{kind}><th>{html.escape(row['side'])}</th>{figures}</tr>")
        names = "".join(f"<th>{name}</th>" for name in ("", *_COLUMNS))
        title = f"<h2>{mode.capitalize()}</h2><p>{_MEANS[mode]}. GEMMs: {GEMMS[mode]}.</p>"
        left_out = without_figures(results, mode)
        note = f"<p>{html.escape(left_out)}.</p>" if left_out else ""
        table = f'<div class="wide"><table><tr>{names}</tr>{"".join(lines)}</table></div>' if lines else ""
        tables.append(f"{title}{table}{note}")
    missing = "; ".join(f"{name}: {why}" for name, why in results["missing"].items())
    about = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in results["about"].items()
    )
    return Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8")).substitute(
        sentence=html.escape(sentence(results)),
        picture=base64.b64encode(picture).decode(),
        tables="".join(tables),
        missing=f"<p>Not compared: {html.escape(missing)}.</p>" if missing else "",
        about=about,
    )


def read(path: str) -> dict[str, Any]:
    """The results of a run: its JSON file, or the folder that holds it.

    Raises:
        ValueError: no such file, or not one of a run.
    """
    file = Path(path) / "bench.json" if Path(path).is_dir() else Path(path)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        results["about"]["model"], results["rows"][0]["percent_of_gemms"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"compare must name the bench.json of a run or its folder, got {path}: {error}") from error
    return results


def compare(console, before: dict[str, Any], after: dict[str, Any], tolerance: float) -> list[str]:
    """Print both runs' rates as shares of their own bare GEMMs; returns ours that became slower by more than tolerance.

    Raises:
        ValueError: runs of different heads, batches or dtypes.
    """
    from rich.table import Table

    for name in ("hidden", "vocab", "tokens", "masked", "dtype"):
        one, other = before["about"][name], after["about"][name]
        if one != other:
            raise ValueError(f"compare: both runs must have the same {name}, got {one} and {other}")
    table = Table(box=None, padding=(0, 1))
    for name in ("mode", "loss", "of the GEMMs before", "now", "time", "peak MiB before", "now"):
        table.add_column(name, justify="left" if name in ("mode", "loss") else "right")
    slower = []
    for row in after["rows"]:
        earlier = find(before, row["side"], row["mode"])
        if row["side"] == BARE or not earlier or row["ms"] is None or earlier["ms"] is None:
            continue
        # A ratio to the GEMMs of the same process: the machine's own speed drops out.
        ratio = earlier["percent_of_gemms"] / row["percent_of_gemms"]
        shares = [f"{r['percent_of_gemms']:.0f} %" for r in (earlier, row)]
        peaks = [f"{r['peak_mib']:,.1f}" for r in (earlier, row)]
        table.add_row(row["mode"], row["side"], *shares, f"{ratio:.2f}x", *peaks)
        if row["side"].startswith("var_kernels") and ratio > 1 + tolerance:
            slower.append(f"{row['side']}, {row['mode']}: {ratio:.2f} times the time, relative to the GEMMs")
    console.print(table, highlight=False)
    return slower
