"""Tables from the CSVs of one GPU, and a gate against a saved baseline.

    python benchmarks/gpu_report.py DIR                     writes DIR/summary.md
    python benchmarks/gpu_report.py DIR --gate BASELINE     compares with the CSVs of another run; status 1 where slower

The gate compares ratios to the bare GEMMs that were timed in the same rounds, not milliseconds.
"""

import argparse
import csv
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bar:
    """What must be reached: ``field`` of the row (shape, provider, which) is at most ``limit``."""

    what: str
    shape: str
    provider: str
    limit: float
    field: str = "of_gemms"
    which: str = "both"


def _memory_bar(what: str, provider: str, extra: float) -> Bar:
    """extra: bytes beyond inputs and returned gradients."""
    return Bar(f"{what}: MiB beyond inputs and gradients", MAIN, provider, extra / 2**20, "peak_less_gradients_mib")


N, D, V = 8192, 4096, 128256
MAIN, SMALL = f"{N}x{D}x{V}", "8192x896x151936"
ONE_PASS, TWO_PASSES = "ours, one pass, 1.1 GB", "ours, any gradient, 512 MB"
# Each ratio is to the bare GEMMs of the rows' own rounds; a mode's time and memory are those of one call.
WANTED = (
    Bar("forward log-probs", MAIN, "ours, any gradient", 1.12, which="score"),
    Bar("forward log-probs with entropy", MAIN, "ours, with entropy", 1.12, which="score"),
    Bar("log-probs: largest error", MAIN, "ours, any gradient", 1e-5, "logp_error", "score"),
    Bar("one pass, token weights", MAIN, ONE_PASS, 1.12),
    _memory_bar("one pass, token weights", ONE_PASS, 1.1e9 + 4 * V * D),
    Bar("one pass, token weights, default budget", MAIN, "ours, one pass", 1.12),
    Bar("any gradient", MAIN, TWO_PASSES, 1.12),
    _memory_bar("any gradient", TWO_PASSES, 512e6 + 4 * N * D),
    Bar("any gradient, half of the memory", MAIN, "ours, any gradient, 256 MB", 1.12),
    _memory_bar("any gradient, half of the memory", "ours, any gradient, 256 MB", 256e6 + 4 * N * D),
    Bar("any gradient, default budget", MAIN, "ours, any gradient", 1.12),
    Bar("frozen head", MAIN, "ours, frozen head", 1.12),
    Bar("one pass, small head, large vocabulary", SMALL, "ours, one pass", 1.3),
    Bar("one pass, small head, 1.1 GB", SMALL, ONE_PASS, 1.3),
    Bar("half of the rows masked, of the unmasked time", MAIN, "ours, one pass", 0.55, "of_full", ""),
)
# A row with a larger error meets no bar, however fast it is: relative, of bf16 gradients and fp32 losses and log-probs.
LARGEST_ERRORS = {"loss_error": 1e-4, "logp_error": 1e-3, "dhidden_error": 1e-2, "dweight_error": 1e-2}
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
                _shown(number(both, "queued_of_gemms")),
                _shown(number(both, "gemms_run")),
                _shown(number(both, "roof_percent")),
                _shown(number(both, "peak_less_gradients_mib"), 4),
                _spread(score),
                _shown(number(score, "of_gemms")),
                _shown(number(score, "queued_of_gemms")),
                _shown(number(score, "logp_error"), 2),
                _shown(number(both, "dhidden_error"), 2),
                _shown(number(both, "dweight_error"), 2),
                notes[provider][:60].replace("|", "/"),
            ]
        )
    columns = ["", "both, ms (p20 to p80)", "fwd", "bwd", "of GEMMs", "queue filled", "GEMMs run", "% of roof", "MiB"]
    columns += ["score, ms", "of 1 GEMM", "queue filled", "logp error", "dH error", "dW error", "note"]
    return table(columns, lines)


def _order(passes: dict[str, dict]) -> float:
    """By the time of both passes; those without one last."""
    ms = number(passes.get("both", {}), "ms")
    return math.inf if math.isnan(ms) else ms


def _spread(row: dict) -> str:
    ms = number(row, "ms")
    return "" if math.isnan(ms) else f"{_shown(ms)} ({_shown(number(row, 'p20'))} to {_shown(number(row, 'p80'))})"


def wanted_table(rows: list[dict]) -> str:
    """rows: of ``compare`` and ``masked``."""
    found = {(row["shape"], row["provider"], row.get("pass", "")): row for row in rows}
    lines = []
    for bar in WANTED:
        row = found.get((bar.shape, bar.provider, bar.which), {})
        value, queued = number(row, bar.field), number(row, f"queued_{bar.field}")
        verdict = "not measured" if math.isnan(value) else _wrong(row) or ("met" if value <= bar.limit else "missed")
        gemms = _shown(number(row, "gemms_run"))
        lines.append(
            [bar.what, bar.shape, bar.provider, _shown(bar.limit), _shown(value), _shown(queued), gemms, verdict]
        )
    lines.append(_fastest_line(rows))
    return table(["", "N x D x V", "row", "at most", "measured", "queue filled", "GEMMs run", ""], lines)


def _wrong(row: dict) -> str | None:
    found = {field: row[field] for field in LARGEST_ERRORS if row.get(field)}
    # NaN is no number that is small enough.
    large = [f"{field} {error}" for field, error in found.items() if not float(error) <= LARGEST_ERRORS[field]]
    return f"wrong: {', '.join(large)}" if large else None


def _fastest_line(rows: list[dict]) -> list[str]:
    """One pass over the fastest other library's forward and backward; which were not measured."""
    from benchmarks.gpu_providers import PROVIDERS

    both = {row["provider"]: row for row in rows if row["shape"] == MAIN and row.get("pass") == "both"}
    times = {name: number(row, "ms") for name, row in both.items()}
    others = {name: ms for name, ms in times.items() if name in PROVIDERS and PROVIDERS[name].other and ms > 0}
    missing = [name for name in PROVIDERS if PROVIDERS[name].other and PROVIDERS[name].loss and name not in others]
    ours = times.get("ours, one pass", math.nan)
    if not others or math.isnan(ours):
        return ["one pass, of the fastest other library", MAIN, "ours, one pass", "1", "", "", "", "not measured"]
    fastest = min(others, key=others.get)
    ratio = ours / others[fastest]
    verdict = _wrong(both["ours, one pass"]) or ("met" if ratio <= 1 else "missed")
    if missing:
        verdict += f", without {', '.join(missing)}"
    return ["one pass, of the fastest other library", MAIN, f"of {fastest}", "1", _shown(ratio), "", "", verdict]


def plain_table(rows: list[dict]) -> str:
    """Every column of a section as it is."""
    columns = [field for field in rows[0] if field not in ("key", "ended", "p20", "p80")]
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
    lines += _crossover_lines(read(folder, "crossover"))
    lines += _slice_lines(read(folder, "primitives"))
    return table(["", "default", "fastest measured", "from"], lines)


def _crossover_lines(rows: list[dict]) -> list[list[str]]:
    """The shortest chunk from which on one pass is faster than two passes of any budget up to its own; the budget."""
    from var_kernels.ops import plan

    lines = []
    measured = [row for row in rows if row.get("engine") and not math.isnan(number(row, "ms"))]
    for shape in dict.fromkeys(row["shape"] for row in measured):
        here = [row for row in measured if row["shape"] == shape]
        two = [row for row in here if row["engine"] == "two_pass"]
        chunked = sorted((row for row in here if row["rows"]), key=lambda row: number(row, "rows"), reverse=True)
        shortest = "none of those measured"
        for row in chunked:
            budget = number(row, "workspace_mib")
            rival = min((number(r, "ms") for r in two if number(r, "workspace_mib") <= budget), default=math.nan)
            if not number(row, "ms") <= rival:
                break
            shortest = f"{row['rows']} rows: {_shown(number(row, 'ms'))} ms, two passes {_shown(rival)}"
        now = f"{plan._MIN_ACCELERATOR_ROWS} rows"
        lines.append([f"shortest chunk of one pass, {shape}", now, shortest, "crossover.csv"])
        best = min(here, key=lambda row: number(row, "ms"))
        found = f"{best['engine']}, {best['workspace_mib']} MiB: {_spread(best)} ms"
        default = [f"{r['engine']} {_shown(number(r, 'ms'))} ms" for r in here if r["default"] == "True"]
        lines.append([f"budget, {shape}", f"1/32 of the memory: {', '.join(default)}", found, "crossover.csv"])
    return lines


def _slice_lines(rows: list[dict]) -> list[list[str]]:
    """Rates of the backward's products by width: the narrowest within 5 % of the best."""
    from var_kernels.ops import plan

    rates = defaultdict(dict)
    for row in rows:
        product, _, width = row.get("what", "").partition(", slice ")
        if width.isdigit():
            rates[product][int(width)] = number(row, "rate")
    lines = []
    for product, by_width in rates.items():
        width = min(width for width, rate in by_width.items() if rate >= 0.95 * max(by_width.values()))
        found = f"from {width} columns on within 5 %: " + ", ".join(f"{w}: {_shown(r)}" for w, r in by_width.items())
        lines.append([f"narrowest slice, {product}", f"{plan._MIN_COLUMNS} columns", found, "primitives.csv"])
    return lines


def clocks_line(folder: Path) -> str:
    """Median and range of the clock and the power while the GPU was busy."""
    path = folder / "clocks.log"
    if not path.exists():
        return ""
    samples = []
    for line in path.read_text().splitlines():
        try:
            _, sm, _, power, _, busy = line.split(", ")
            samples.append((float(busy), float(sm), float(power)))
        except ValueError:  # a field that this GPU does not report, a line that was cut
            continue
    busy = [sample for sample in samples if sample[0] >= 50]
    if not busy:
        return f"Clocks: {len(samples)} samples, none of a busy GPU."
    parts = []
    for place, name, unit in ((1, "SM clock", "MHz"), (2, "power", "W")):
        values = sorted(sample[place] for sample in busy)
        parts.append(f"{name} {values[len(values) // 2]:.0f} {unit} ({values[0]:.0f} to {values[-1]:.0f})")
    return f"While busy ({len(busy)} of {len(samples)} s): {', '.join(parts)}."


def summary(folder: Path) -> str:
    compared = [row for section in COMPARED for row in read(folder, section) if row.get("shape")]
    headers = [path.read_text().split("\n", 1)[0] for path in sorted(folder.glob("*.csv")) if path.name != "tests.csv"]
    parts = ["# Measured on one GPU", "\n\n".join(dict.fromkeys(h.lstrip("# ") for h in headers)), clocks_line(folder)]
    masked = [row for row in read(folder, "masked") if row.get("shape")]
    parts += ["## What is to be reached", wanted_table([*compared, *masked])]
    for shape in dict.fromkeys(row["shape"] for row in compared):
        parts += [f"## {shape}", comparison_table(compared, shape)]
    parts += ["## Defaults", defaults_table(folder)]
    others = ("roofs", "primitives", "masked", "batch", "step", "divergence", "forward", "crossover", "rowkernels")
    for section in others:
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
    print(args.folder / "summary.md")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
