"""Figures as CSV files and as markdown."""

import csv
import statistics
from pathlib import Path

from benchmarks.study.claims import Claim, error

# figure: (heading, digits, scale)
COLUMNS = {
    "reward": ("reward", 2, 1),
    "win_rate": ("wins, %", 0, 100),
    "kl": ("KL", 2, 1),
    "objective": ("objective", 2, 1),
    "right": ("right, %", 0, 100),
    "friendly": ("friendly, %", 0, 100),
    "rude": ("rude, %", 0, 100),
    "too_long": ("too long, %", 0, 100),
    "length": ("length", 1, 1),
    "distinct": ("distinct, %", 0, 100),
    "entropy": ("entropy", 2, 1),
}
_SPREAD = ("reward", "win_rate", "kl", "objective", "distinct", "entropy")


def spread(values: list[float], digits: int = 2, scale: float = 1.0) -> str:
    """mean ± standard deviation over the seeds."""
    text = number(statistics.fmean(values), digits, scale)
    return f"{text} ± {number(statistics.stdev(values), digits, scale)}" if len(values) > 1 else text


def number(value: float, digits: int = 2, scale: float = 1.0) -> str:
    text = f"{value * scale:,.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text.replace(",", "")) else text.replace("-", "")


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def method_table(results: dict, chosen_rates: dict[str, float]) -> str:
    """One row a method, the best objective first, the reference last."""
    rows = []
    for name, runs in sorted(results["methods"].items(), key=lambda item: -_mean(item[1], "objective")):
        cells = [_cell([run["final"][key] for run in runs.values()], key) for key in COLUMNS]
        seconds = number(statistics.fmean(run["seconds"] for run in runs.values()), 0)
        memory = number(statistics.fmean(run["peak_mib"] for run in runs.values()), 1)
        rows.append([name, f"{chosen_rates[name]:g}", *cells, seconds, memory])
    finals = [run["final"] for run in results["reference"].values()]
    cells = ["" if key == "objective" else _cell([row[key] for row in finals], key) for key in COLUMNS]
    cells[list(COLUMNS).index("objective")] = cells[list(COLUMNS).index("reward")]
    rows.append(["*reference*", "", *cells, "", ""])
    optima = [run["optima"][0] for run in results["reference"].values()]
    cells = [_cell([point[key] for point in optima], key) if key in optima[0] else "" for key in COLUMNS]
    rows.append(["*pi\\**", "", *cells, "", ""])
    heads = ["method", "rate", *(head for head, _, _ in COLUMNS.values()), "s", "MiB"]
    return markdown(heads, rows)


def _mean(runs: dict, figure: str) -> float:
    return statistics.fmean(run["final"][figure] for run in runs.values())


def _cell(values: list[float], key: str) -> str:
    _, digits, scale = COLUMNS[key]
    return spread(values, digits, scale) if key in _SPREAD else number(statistics.fmean(values), digits, scale)


def claim_table(claim: Claim) -> str:
    rows = []
    for line in claim.lines:
        values = [list(side.values()) for side in line.values]
        differences = line.differences
        shown = [spread(side) if side else "" for side in values]
        gap = number(statistics.fmean(differences)) if differences else ""
        gap += f" ± {number(error(differences))}" if len(differences) > 1 else ""
        rows.append([line.figure, line.first, shown[0], line.second, shown[1], gap, line.verdict])
    return markdown(["figure", "of", "", "against", "", "difference ± its error", ""], rows)


def rate_table(rates: dict, chosen: dict, grid: tuple[float, ...], figure: str) -> str:
    rows = []
    for name, row in rates.items():
        cells = [number(row[rate][figure]) if rate in row else "failed" for rate in grid]
        cells = [f"**{c}**" if chosen[name] == rate else c for c, rate in zip(cells, grid, strict=True)]
        rows.append([name, *cells])
    return markdown(["", *(f"{rate:g}" for rate in grid)], rows)


def write_csv(folder: Path, name: str, rows: list[dict]) -> None:
    if not rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def write_csvs(folder: Path, results: dict, chosen_rates: dict[str, float]) -> None:
    """methods, curves, rates, heads, real: one row a run (curves: a probe)."""
    runs = [
        (kind, name, seed, run)
        for kind in ("methods", "long")
        for name, seeds in results[kind].items()
        for seed, run in seeds.items()
    ]
    rows = [
        {"run": "reference", "method": "reference", "seed": seed, **run["final"], "seconds": run["seconds"]}
        for seed, run in results["reference"].items()
    ]
    rows += [
        {
            "run": "main" if kind == "methods" else "long",
            "method": name,
            "seed": seed,
            "rate": chosen_rates[name],
            **run["final"],
            "seconds": run["seconds"],
            "peak_mib": run["peak_mib"],
        }
        for kind, name, seed, run in runs
    ]
    write_csv(folder, "methods", rows)
    curves = [
        {"run": "main" if kind == "methods" else "long", "method": name, "seed": seed, **point}
        for kind, name, seed, run in runs
        for point in run["curve"]
    ]
    write_csv(folder, "curves", curves)
    rates = [
        {"part": "world", "method": name, "rate": rate, "chosen": chosen_rates[name] == rate, **figures}
        for name, row in results["rates"].items()
        for rate, figures in row.items()
    ]
    rates += [
        {"part": "heads", "method": name, "rate": rate, "chosen": results["head_rates"]["chosen"][name] == rate, **row}
        for name, table in results["head_rates"]["table"].items()
        for rate, row in table.items()
    ]
    write_csv(folder, "rates", rates)
    heads = [
        {"loss": name, "noise": noise, "seed": seed, **run}
        for name, table in results["heads"].items()
        for noise, seeds in table.items()
        for seed, run in seeds.items()
    ]
    write_csv(folder, "heads", heads)
    real = results["real"]
    if real and "methods" in real:
        rows = [{"method": "reference", **real["reference"]["final"]}]
        rows += [
            {
                "method": name,
                "seed": seed,
                "rate": real["chosen"][name],
                **run["final"],
                "seconds": run["seconds"],
            }
            for name, seeds in real["methods"].items()
            for seed, run in seeds.items()
        ]
        write_csv(folder, "real", rows)
