"""Tables and plots from the CSVs of one GPU, and a gate against a saved baseline.

    python benchmarks/gpu_report.py DIR                     writes DIR/summary.md and DIR/*.png
    python benchmarks/gpu_report.py DIR --gate BASELINE     compares with the CSVs of another run; status 1 where slower

The gate compares ratios to the bare GEMMs that were timed in the same rounds, not milliseconds.
"""

import argparse
import csv
import math
import sys
from collections import defaultdict
from pathlib import Path

# "must" of the ratios to the bare GEMMs, and the rows that they are about.
WANTED = (
    ("forward log-probs", "8192x4096x128256", "ours, any gradient", "score", 1.12),
    ("forward log-probs with entropy", "8192x4096x128256", "ours, with entropy", "score", 1.12),
    ("one pass, token weights", "8192x4096x128256", "ours, one pass", "both", 1.12),
    ("any gradient", "8192x4096x128256", "ours, any gradient", "both", 1.12),
    ("frozen head", "8192x4096x128256", "ours, frozen head", "both", 1.12),
    ("one pass, small head, large vocabulary", "8192x896x151936", "ours, one pass", "both", 1.3),
)
COMPARED = ("compare", "hard", "curve")


def read(folder: Path, section: str) -> list[dict[str, str]]:
    path = folder / f"{section}.csv"
    if not path.exists():
        return []
    return list(csv.DictReader(path.read_text().splitlines()[1:]))


def number(row: dict[str, str], field: str) -> float:
    """NaN where it was not measured."""
    value = row.get(field) or ""
    return float(value) if value else math.nan


def _shown(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison_table(rows: list[dict], shape: str) -> str:
    """One line a provider: the passes of one shape side by side."""
    by_provider = defaultdict(dict)
    notes = {}
    for row in rows:
        if row["shape"] == shape:
            by_provider[row["provider"]][row["pass"]] = row
            notes[row["provider"]] = notes.get(row["provider"]) or row["note"]
    lines = []
    for provider, passes in sorted(by_provider.items(), key=lambda pair: _order(pair[1])):
        both, score = passes.get("both", {}), passes.get("score", {})
        lines.append(
            [
                provider,
                _spread(both),
                _shown(number(passes.get("forward", {}), "ms")),
                _shown(number(passes.get("backward", {}), "ms")),
                _shown(number(both, "of_gemms")),
                _shown(number(both, "roof_percent")),
                _shown(number(both, "peak_less_gradients_mib"), 4),
                _spread(score),
                _shown(number(score, "of_gemms")),
                _shown(number(score, "logp_error"), 2),
                _shown(number(both, "dhidden_error"), 2),
                _shown(number(both, "dweight_error"), 2),
                notes[provider][:60].replace("|", "/"),
            ]
        )
    columns = ["", "both, ms (p20 to p80)", "fwd", "bwd", "of GEMMs", "% of roof", "MiB", "score, ms"]
    columns += ["of 1 GEMM", "logp error", "dH error", "dW error", "note"]
    return table(columns, lines)


def _order(passes: dict[str, dict]) -> float:
    """By the time of both passes; those without one last."""
    ms = number(passes.get("both", {}), "ms")
    return math.inf if math.isnan(ms) else ms


def _spread(row: dict) -> str:
    ms = number(row, "ms")
    return "" if math.isnan(ms) else f"{_shown(ms)} ({_shown(number(row, 'p20'))} to {_shown(number(row, 'p80'))})"


def wanted_table(rows: list[dict]) -> str:
    found = {(row["shape"], row["provider"], row["pass"]): number(row, "of_gemms") for row in rows}
    lines = []
    for what, shape, provider, which, bar in WANTED:
        ratio = found.get((shape, provider, which), math.nan)
        verdict = "not measured" if math.isnan(ratio) else "met" if ratio <= bar else "missed"
        lines.append([what, shape, f"{bar:g}", _shown(ratio), verdict])
    return table(["", "N x D x V", "at most, of the GEMMs", "measured", ""], lines)


def plain_table(rows: list[dict]) -> str:
    """Every column of a section as it is."""
    columns = [field for field in rows[0] if field not in ("key", "p20", "p80")]
    return table(columns, [[_cell(row[column]) for column in columns] for row in rows])


def _cell(text: str) -> str:
    try:
        return _shown(float(text))
    except ValueError:
        return text[:80].replace("|", "/")


def defaults_table(folder: Path) -> str:
    """The defaults that were chosen without a timing, beside the fastest that was measured."""
    from var_kernels.kernels import rows_triton

    lines = []
    kernels = read(folder, "rowkernels")
    for what in dict.fromkeys(row["what"] for row in kernels if row.get("what")):
        best = max((row for row in kernels if row["what"] == what), key=lambda row: number(row, "rate"))
        now = f"{rows_triton.BLOCK_COLUMNS} columns, {rows_triton.NUM_WARPS} warps"
        lines.append([what, now, f"{best['setting']}: {_shown(number(best, 'rate'))} GB/s", "rowkernels.csv"])
    by_shape = defaultdict(list)
    for row in read(folder, "forward"):
        if row.get("what"):
            by_shape[row["shape"]].append(row)
    for shape, rows in by_shape.items():
        best = min(rows, key=lambda row: number(row, "ms"))
        lines.append([f"log-probs, {shape}", "chunked", f"{best['what']}: {_spread(best)} ms", "forward.csv"])
    by_shape = defaultdict(list)
    for row in read(folder, "crossover"):
        if row.get("engine"):
            by_shape[row["shape"]].append(row)
    for shape, rows in by_shape.items():
        best = min(rows, key=lambda row: number(row, "ms"))
        found = f"{best['engine']}, {best['workspace_mib']} MiB: {_spread(best)} ms"
        lines.append([f"token weights, {shape}", "one pass where the budget holds it", found, "crossover.csv"])
    return table(["", "default", "fastest measured", "from"], lines)


def summary(folder: Path) -> str:
    compared = [row for section in COMPARED for row in read(folder, section) if row.get("shape")]
    headers = [path.read_text().split("\n", 1)[0] for path in sorted(folder.glob("*.csv")) if path.name != "tests.csv"]
    parts = ["# Measured on one GPU", "\n\n".join(dict.fromkeys(h.lstrip("# ") for h in headers))]
    parts += ["## What is to be reached", wanted_table(compared)]
    for shape in dict.fromkeys(row["shape"] for row in compared):
        parts += [f"## {shape}", comparison_table(compared, shape)]
    parts += ["## Defaults", defaults_table(folder)]
    for section in ("roofs", "primitives", "masked", "batch", "step", "forward", "crossover", "rowkernels"):
        rows = read(folder, section)
        if rows:
            parts += [f"## {section}", plain_table(rows)]
    tests = folder / "tests.csv"
    if tests.exists():
        latest = {row[0]: row[1] for row in csv.reader(tests.read_text().splitlines())}
        failed = sorted(name for name, outcome in latest.items() if outcome == "failed")
        counts = defaultdict(int)
        for outcome in latest.values():
            counts[outcome] += 1
        parts += ["## GPU tests", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()), *failed]
    return "\n\n".join(parts) + "\n"


def gate(now: Path, baseline: Path, tolerance: float) -> list[str]:
    """Rows of ours whose ratio to the bare GEMMs rose by more than the tolerance, or that are gone."""
    problems, compared = [], 0
    for section in COMPARED:
        current = {
            (r["shape"], r["provider"], r["pass"]): number(r, "of_gemms") for r in read(now, section) if r.get("shape")
        }
        for row in read(baseline, section):
            before = number(row, "of_gemms")
            if math.isnan(before) or not row["provider"].startswith("ours"):
                continue
            key = (row["shape"], row["provider"], row["pass"])
            ratio = current.get(key, math.nan)
            compared += 1
            if math.isnan(ratio):
                problems.append(f"{' '.join(key)}: {before:.3f} of the GEMMs before, not measured now")
            elif ratio > before * (1 + tolerance):
                problems.append(f"{' '.join(key)}: {before:.3f} of the GEMMs before, {ratio:.3f} now")
    if not compared:
        problems.append(f"{baseline}: no row of ours to compare with")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gate", type=Path, metavar="BASELINE", help="folder with the CSVs of an earlier run")
    parser.add_argument("--tolerance", type=float, default=0.05, help="by how much a ratio may rise")
    args = parser.parse_args()
    if not any(args.folder.glob("*.csv")):
        parser.error(f"no CSV in {args.folder}; benchmarks/gpu_run.sh writes them")
    if args.gate:
        problems = gate(args.folder, args.gate, args.tolerance)
        print("\n".join(problems) or "no ratio to the bare GEMMs rose")
        return 1 if problems else 0
    (args.folder / "summary.md").write_text(summary(args.folder))
    from benchmarks.gpu_plots import draw  # matplotlib may be missing

    drawn = draw(args.folder)
    print(f"{args.folder / 'summary.md'}, {', '.join(path.name for path in drawn)}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
