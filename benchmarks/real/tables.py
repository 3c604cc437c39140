"""The tables of docs/real.md, from the CSVs: ``python -m benchmarks.real page``."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ROOT / "docs" / "real.md", ROOT / "README.md"
_AVERAGED = ("weighted_nll", "lift", "pair_accuracy", "kl", "ess_share", "seconds")
NAMES = {"smollm2": "SmolLM2", "gemma": "Gemma", "float32": "fp32", "bfloat16": "bf16"}
LONG_NAMES = {
    "smollm2": "SmolLM2-135M, a vocabulary of 49,152",
    "gemma": "Gemma-3-270M, a vocabulary of 262,144",
}

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a CSV below its comments; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def tables(folder: Path) -> dict[str, str]:
    """{name of a CSV: its table and where it was measured}."""
    made = {}
    for name, make in {
        "real-errors": errors, "real-sparsity": sparsity, "real-steps": steps, "real-study": study
    }.items():  # fmt: skip
        path = folder / f"{name}.csv"
        if path.exists():
            machine = path.read_text().splitlines()[0].removeprefix("# ")
            link = f"[{name}.csv](../benchmarks/results/{folder.name}/{name}.csv)"
            made[name] = f"{make(read(path))}\n\n{link}: {machine}.\n"
    return made


def write(folder: Path) -> None:
    """Put the tables between their marks, on the page and in the README."""
    for page, found in ((PAGE, tables(folder)), (README, {"real-steps": headline(read(folder / "real-steps.csv"))})):
        text = page.read_text()
        for name, table in found.items():
            before, mark, rest = text.partition(f"<!-- {name} -->\n")
            text = before + mark + table + rest[rest.index(f"<!-- end of {name} -->") :]
        page.write_text(text)


def headline(rows: list[Row]) -> str:
    """Of each model in bf16 with gradient checkpointing the longest step that was measured by both losses."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row["dtype"] == "bfloat16" and row["checkpointing"] == "1" and row["peak_mib"]:
            found.setdefault((row["model"], int(row["tokens"])), {})[row["head"]] = float(row["peak_mib"])
    longest = {
        model: tokens
        for (model, tokens), peaks in sorted(found.items())
        if {"transformers", "var_kernels"} <= peaks.keys()
    }
    lines = []
    for model, tokens in reversed(longest.items()):
        theirs, ours = found[model, tokens]["transformers"], found[model, tokens]["var_kernels"]
        name = f"{LONG_NAMES[model]}, {tokens:,} tokens"
        lines.append((name, f"{theirs:,.0f} MiB", f"**{ours:,.0f} MiB**", f"{theirs / ours:.1f}x"))
    title = "highest memory of a training step in bf16 with gradient checkpointing"
    return _table((title, "transformers' loss", "var_kernels", "less"), lines) + "\n"


def errors(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        figures = [
            row[key] and f"{float(row[key]):.1e}" for key in ("loss_error", "logp_rms", "dhidden_rms", "dweight_rms")
        ]
        lines.append((*_setting(row), row["tokens"], row["head"], f"{float(row['loss']):.5f}", *figures))
    return _table(
        ("model", "weights", "labels", "head", "loss", "its error", "log-probs, rms", "dH, rms", "dW, rms"), lines
    )


def sparsity(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        share, p_y = f"{100 * float(row['kept_share']):.1f} %", f"{float(row['median_p_y']):.2f}"
        lines.append((NAMES[row["model"]], row["tokens"], row["tiles"], row["kept"], share, p_y))
    return _table(("model", "labels", "tiles", "kept", "share", "median p of a label"), lines)


def steps(rows: list[Row]) -> str:
    """A line of each model, dtype, checkpointing and number of tokens: every head's highest MiB and its tokens/s."""
    heads = list(dict.fromkeys(row["head"] for row in rows if row["peak_mib"]))
    heads.sort(key=lambda head: (head != "none", head == "var_kernels"))
    rows = sorted(rows, key=lambda row: (row["model"] == "gemma", row["dtype"] != "float32", row["checkpointing"]))
    settings: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = (*_setting(row), f"{int(row['tokens']):,}", "yes" if row["checkpointing"] == "1" else "no")
        figures = f"{float(row['peak_mib']):,.0f} MiB, {float(row['tokens_per_s']):.0f}/s" if row["peak_mib"] else ""
        settings.setdefault(key, {})[row["head"]] = figures or row["missing"]
    names = ["body alone" if head == "none" else head for head in heads]
    return _table(
        ("model", "weights", "tokens", "checkpointing", *names),
        [(*key, *(found.get(head, "") for head in heads)) for key, found in settings.items()],
    )


def study(rows: list[Row]) -> str:
    """Means over the seeds with their standard errors; at 1 nat: over sqrt(KL), of the means."""
    (reference,) = (row for row in rows if row["method"] == "reference")
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows if row is not reference):
        found = [row for row in rows if row["method"] == name]
        values = {key: [float(row[key]) for row in found if row[key]] for key in reference if key in _AVERAGED}
        gained = [float(reference["weighted_nll"]) - value for value in values["weighted_nll"]]
        kl = sum(values["kl"]) / len(found)
        cells = []
        for change in (gained, values["lift"]):
            at_a_nat = sum(change) / len(change) / math.sqrt(kl) if kl > 0 else math.nan
            cells += [_mean(change, 3), f"{at_a_nat:.3f}"]
        cells += [_mean(values["pair_accuracy"], 3), _mean(values["kl"], 2)]
        cells += [_mean(values["ess_share"], 2) if values["ess_share"] else "", _mean(values["seconds"], 0)]
        lines.append((name, *cells))
    return _table(
        (
            "method",
            "likelihood gained",
            "at 1 nat",
            "lift",
            "at 1 nat",
            "pairs ranked right",
            "KL",
            "ESS share",
            "seconds",
        ),
        lines,
    )


def _setting(row: Row) -> tuple[str, str]:
    return NAMES[row["model"]], NAMES[row["dtype"]]


def _mean(values: list[float], digits: int) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def _table(head: Sequence[str], lines: list[Sequence[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(line)} |".replace("  |", " |").replace("  |", " |")
        for line in (head, ["---"] * len(head), *lines)
    )
