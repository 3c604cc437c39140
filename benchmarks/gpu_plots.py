"""Pictures of one GPU's CSVs: bars of each shape, time and memory against N, the roofline.

python benchmarks/gpu_plots.py DIR                      writes DIR/bars.png, rows.png, roofline.png
"""

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu_report import COMPARED, number, read

OURS, OTHERS = "#c0392b", "#7f8c8d"


def draw(folder: Path) -> list[Path]:
    """The pictures whose data are there."""
    drawn = [bars(folder), against_rows(folder), roofline(folder)]
    return [path for path in drawn if path]


def _measured(folder: Path, sections=COMPARED) -> list[dict]:
    rows = [row for section in sections for row in read(folder, section)]
    return [row for row in rows if row.get("pass") == "both" and not math.isnan(number(row, "ms"))]


def _save(figure, folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def bars(folder: Path) -> Path | None:
    """Forward and backward of each provider at each shape, with the bare GEMMs of three products."""
    rows = _measured(folder, ("compare",))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    if not shapes:
        return None
    most = max(sum(row["shape"] == shape for row in rows) for shape in shapes)
    across = min(2, len(shapes))
    down = math.ceil(len(shapes) / across)
    figure, axes = plt.subplots(
        down, across, figsize=(8 * across, (0.32 * most + 1.4) * down), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    for axis, shape in zip(axes.flat, shapes, strict=False):
        chosen = sorted((row for row in rows if row["shape"] == shape), key=lambda row: number(row, "ms"), reverse=True)
        ms = [number(row, "ms") for row in chosen]
        colours = [OURS if row["provider"].startswith("ours") else OTHERS for row in chosen]
        axis.barh([row["provider"] for row in chosen], ms, color=colours)
        for place, (row, value) in enumerate(zip(chosen, ms, strict=True)):
            memory = number(row, "peak_less_gradients_mib")
            text = axis.text(value, place, f" {value:.3g} ms, {memory:,.0f} MiB", va="center", fontsize=8)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        bare = [number(row, "gemm_ms") for row in chosen if row["gemms"] == "3"]
        if bare:
            axis.axvline(min(bare), color="black", linewidth=1, linestyle="--", label="3 bare GEMMs")
            axis.legend(loc="upper right", fontsize=8)
        axis.set_xlim(0, 1.35 * max(ms))
        axis.set_title(f"N x D x V = {shape.replace('x', ' x ')}, bf16", fontsize=10)
        axis.set_xlabel("forward and backward, ms")
        axis.tick_params(labelsize=8)
    return _save(figure, folder, "bars")


def against_rows(folder: Path) -> Path | None:
    """Time and peak memory of one head against the number of rows."""
    rows = _measured(folder)
    heads = [row["shape"].split("x", 1)[1] for row in read(folder, "curve") if row.get("shape")]
    if not heads:
        return None
    rows = [row for row in rows if row["shape"].split("x", 1)[1] == heads[0]]
    lines = {}
    for row in rows:
        lines.setdefault(row["provider"], {})[int(row["shape"].split("x", 1)[0])] = row
    named = {row["provider"] for row in read(folder, "curve") if row.get("provider")}
    figure, (times, memory) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    for provider, points in lines.items():
        if provider not in named:
            continue
        sizes = sorted(points)
        style = {"marker": "o", "label": provider, "linewidth": 2.2 if provider.startswith("ours") else 1.2}
        times.plot(sizes, [number(points[n], "ms") for n in sizes], **style)
        memory.plot(sizes, [max(0.1, number(points[n], "peak_less_gradients_mib")) for n in sizes], **style)
    for axis, label in ((times, "forward and backward, ms"), (memory, "peak above inputs and gradients, MiB")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(f"rows N, D x V = {heads[0].replace('x', ' x ')}, bf16")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    handles, labels = times.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return _save(figure, folder, "rows")


def roofline(folder: Path) -> Path | None:
    """The rate of the needed products against their intensity, under the measured roofs."""
    copy = [number(row, "rate") for row in read(folder, "roofs") if row.get("what") == "copy"]
    gemm = [number(row, "rate") for row in read(folder, "roofs") if row.get("unit") == "TFLOP/s"]
    rows = [row for row in _measured(folder) if not math.isnan(number(row, "gemms"))]
    if not copy or not gemm or not rows:
        return None
    figure, axis = plt.subplots(figsize=(10, 5.2), layout="constrained")
    places = {}
    for row in rows:
        n, d, v = map(int, row["shape"].split("x"))
        flop = 2 * number(row, "gemms") * n * d * v
        # hidden and the weight read, their gradients written, each once, in bf16.
        intensity = flop / (4 * (n * d + v * d))
        rate = flop / number(row, "ms") * 1e3 / 1e12
        ours = row["provider"].startswith("ours")
        places.setdefault(ours, []).append((intensity, rate))
    for ours, points in places.items():
        style = {"color": OURS, "label": "ours"} if ours else {"color": OTHERS, "label": "others", "alpha": 0.6}
        axis.scatter(*zip(*points, strict=True), s=22, zorder=3 if ours else 2, **style)
    low = min(x for points in places.values() for x, _ in points) / 4
    high = max(x for points in places.values() for x, _ in points) * 4
    peak = max(gemm)
    steps = [low * (high / low) ** (i / 100) for i in range(101)]
    axis.plot(
        steps, [min(peak, x * copy[0] / 1e3) for x in steps], color="black", linewidth=1.2, label="measured roofs"
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP of the needed products / bytes that must move")
    axis.set_ylabel("TFLOP/s of the needed products, forward and backward")
    axis.set_title(f"roofs: {peak:.3g} TFLOP/s (bf16 GEMM), {copy[0]:,.0f} GB/s (copy)", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    return _save(figure, folder, "roofline")


if __name__ == "__main__":
    print(*(path.name for path in draw(Path(sys.argv[1]))))
