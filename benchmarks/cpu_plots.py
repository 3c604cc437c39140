"""Pictures of the CSVs of ``cpu_losses``: bars of everything measured, and time against memory."""

import csv
import importlib.util
import sys
from pathlib import Path

COLOURS = {"var_kernels": "#2a6fbb", "alternatives": "#c9b27c", "the matrix products alone": "#888888"}


def bars(rows: list[dict]) -> list[tuple[str, str, dict]]:
    """Label, colour and row of each way to loss and gradients."""
    found = []
    for row in rows:
        provider, mode = row["provider"], row["mode"]
        if mode not in ("one pass", "two passes") or (provider == "bare GEMMs" and mode == "two passes"):
            continue
        if provider == "bare GEMMs":
            found.append(("3 bare GEMMs", COLOURS["the matrix products alone"], row))
        elif "logits" in provider:
            name = provider.removeprefix("var_kernels, ")
            called = name.endswith("default")
            found.append((name if called else f"{name}, {mode}", COLOURS["var_kernels"], row))
        elif provider == "var_kernels in plain torch":
            found.append(("in plain torch, default", COLOURS["var_kernels"], row))
        else:
            found.append((provider, COLOURS["alternatives"], row))
    return found


def draw_plots(folder: Path) -> None:
    """The pictures whose data are there."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no matplotlib, no plot", file=sys.stderr)
        return
    tables = {dtype: read_tables(folder, dtype) for dtype in ("bfloat16", "float32")}
    tables = {dtype: table for dtype, table in tables.items() if table}
    for dtype, table in tables.items():
        draw_bars(table, dtype).savefig(folder / f"loss-{dtype}.png", dpi=110)
    if tables:
        draw_time_and_memory(tables).savefig(folder / "time-memory.png", dpi=110)


def read_tables(folder: Path, dtype: str) -> dict[str, list]:
    """Shape -> its ``bars``, by the number of logits."""
    tables = {}
    for path in folder.glob(f"loss-*-{dtype}.csv"):
        with path.open() as lines:
            rows = list(csv.DictReader(line for line in lines if line[0] != "#"))
        n, d, v = (int(rows[0][key]) for key in "ndv")
        tables[f"{n} x {d} x {v}"] = n * v, bars(rows)
    return {shape: table for shape, (_, table) in sorted(tables.items(), key=lambda item: item[1][0])}


def draw_bars(tables: dict[str, list], dtype: str):
    """A figure: a row for each shape, time and memory."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    heights = [len(table) for table in tables.values()]
    size = {"figsize": (12, 0.24 * sum(heights) + 0.7 * len(tables) + 1), "gridspec_kw": {"height_ratios": heights}}
    figure, axes = plt.subplots(len(tables), 2, squeeze=False, layout="constrained", **size)
    for pair, (shape, table) in zip(axes, tables.items(), strict=True):
        names, colours, rows = zip(*table, strict=True)
        for axis, column, what in zip(pair, ("ms", "peak_mib"), ("processor time, ms", "peak, MiB"), strict=True):
            drawn = axis.barh(names, [float(row[column]) for row in rows], color=colours)
            axis.invert_yaxis()
            axis.margins(x=0.12, y=0.02)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{shape}, {dtype}: {what}", fontsize=9, loc="left")
            axis.bar_label(drawn, fmt="%.0f", fontsize=7, padding=2)
        pair[1].set_yticklabels([])
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    title = "Loss and both gradients on one CPU thread at N x D x V; memory above the operands"
    figure.legend(handles=handles, title=title, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    return figure


# What the overview shows of each table: label in bars() -> label in the picture, and its marker.
SHOWN = {
    "{}, default": ("var_kernels as called", "o"),
    "{}, two passes": ("var_kernels, 64 MiB", "v"),
    "{}, one pass": ("var_kernels, most memory", "^"),
    "transformers' loss": ("transformers' loss", "o"),
    "F.linear + F.cross_entropy": ("F.linear + F.cross_entropy", "s"),
    "F.linear_cross_entropy": ("F.linear_cross_entropy", "D"),
    "torch.compile of it": ("torch.compile", "P"),
}


def draw_time_and_memory(tables: dict[str, dict[str, list]]):
    """A panel for each dtype and shape: time over that of transformers' loss against peak memory; ours at the default
    precision.
    """
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(shape for table in tables.values() for shape in table))
    size = {"figsize": (3.2 * len(shapes), 2.9 * len(tables) + 0.8), "sharey": True}
    figure, axes = plt.subplots(len(tables), len(shapes), squeeze=False, layout="constrained", **size)
    handles = {}
    for line, (dtype, table) in zip(axes, tables.items(), strict=True):
        for axis, shape in zip(line, shapes, strict=True):
            rows = {label: (colour, row) for label, colour, row in table.get(shape, [])}
            if "transformers' loss" not in rows:
                axis.set_visible(False)
                continue
            unit = float(rows["transformers' loss"][1]["ms"])
            for key, (label, marker) in SHOWN.items():
                colour, row = rows.get(key.format("fp32 logits"), (None, None))
                if row is not None:
                    style = {"color": colour, "marker": marker, "s": 70, "edgecolor": "white", "alpha": 0.85}
                    handles[label] = axis.scatter(float(row["peak_mib"]), float(row["ms"]) / unit, **style)
            axis.set_xlim(0, 1.12 * max(float(row["peak_mib"]) for _, row in rows.values()))
            axis.set_ylim(0, 1.25)
            axis.set_title(f"{dtype}, {shape}", fontsize=9, loc="left")
            axis.set_xlabel("peak MiB", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3, which="both", linewidth=0.5)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("time / transformers' loss", fontsize=8)
    title = "Loss and both gradients on one CPU thread, N x D x V; left and low is better"
    figure.legend(
        handles.values(), handles, title=title, loc="outside upper center", ncols=4, fontsize=8, frameon=False
    )
    return figure
