"""Figures on real weights and real text, into benchmarks/results.

    python -m benchmarks.real errors   --text FILE [--model smollm2|gemma] [--tokens 1024]
    python -m benchmarks.real sparsity --text FILE [--model smollm2|gemma] [--tokens 1024]
    python -m benchmarks.real steps    --text FILE [--model ...] [--tokens 1024 4096 16384] [--dtype float32 bfloat16]
                                       [--heads ...] [--checkpointing]
    python -m benchmarks.real study    --text FILE [--seeds 0 1 2] [--reduced]
    python -m benchmarks.real distill  --text FILE [--seeds 0 1 2] [--reduced]
    python -m benchmarks.real page     the tables and the picture of docs/real.md, from the CSVs

FILE: rows of {"prompt", "completions", "rewards"}, one JSON object a line (.jsonl, .jsonl.gz). Rows are added to the
CSV; those of the same settings are replaced. A study that was cut goes on where it ended; --reduced, a few minutes,
shows that it runs.
"""

import argparse
import csv
import sys
from pathlib import Path

from benchmarks.cpu_machine import header, results_folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=("errors", "sparsity", "steps", "study", "distill", "page"))
    parser.add_argument("--text", type=Path, help="file of rated completions")
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "gemma"))
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--heads", nargs="+")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reduced", action="store_true", help="few steps: the figures mean little")
    parser.add_argument("--out", type=Path, default=results_folder(), help="folder of the CSV (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.section != "page" and not (args.text and args.text.is_file()):
        parser.error(f"--text must be a file of rated completions, got {args.text}")
    sections = {"errors": _errors, "sparsity": _sparsity, "steps": _steps, "study": _study, "distill": _distill}
    (sections | {"page": _page})[args.section](args)
    return 0


def _errors(args) -> None:
    from benchmarks.real.heads import ERROR_COLUMNS, errors

    for tokens in args.tokens or [1024]:
        for dtype in args.dtype:
            rows = errors(args.model, args.text, tokens, dtype)
            _write(args.out / "real-errors.csv", ERROR_COLUMNS, rows, 4)


def _sparsity(args) -> None:
    from benchmarks.real.heads import SPARSITY_COLUMNS, sparsity

    for tokens in args.tokens or [1024]:
        _write(args.out / "real-sparsity.csv", SPARSITY_COLUMNS, [sparsity(args.model, args.text, tokens)], 2)


def _steps(args) -> None:
    from benchmarks.real.steps import COLUMNS, HEADS, measure

    for tokens in args.tokens or [1024, 4096, 16384]:
        for dtype in args.dtype:
            for row in measure(args.model, args.text, dtype, args.checkpointing, tokens, args.heads or HEADS):
                _write(args.out / "real-steps.csv", COLUMNS, [row], 5)


def _study(args) -> None:
    from benchmarks.real.study import COLUMNS, KEYS, REDUCED, Sizes, runs

    path = args.out / ("real-study-reduced.csv" if args.reduced else "real-study.csv")
    done = {tuple(row[:KEYS]) for row in _rows(path)}
    for row in runs(args.text, args.seeds, REDUCED if args.reduced else Sizes(), done):
        _write(path, COLUMNS, [row], KEYS)


def _page(args) -> None:
    from benchmarks.real import plots, tables

    tables.write(args.out)
    for name, draw in (("real-steps", plots.write_steps), ("real-study", plots.write_study)):
        if rows := tables.read(args.out / f"{name}.csv"):
            draw(rows)


def _rows(path: Path) -> list[list[str]]:
    """The file's rows below its names of columns; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list(csv.reader(line for line in lines if not line.startswith("#")))[1:]


def _distill(args) -> None:
    from benchmarks.real.distill import COLUMNS, REDUCED, Sizes, runs

    name = "real-distill-reduced.csv" if args.reduced else "real-distill.csv"
    for seed in args.seeds:
        for row in runs(args.text, seed, REDUCED if args.reduced else Sizes()):
            _write(args.out / name, COLUMNS, [row], 5)


def _write(path: Path, columns: tuple[str, ...], rows: list[dict], keys: int) -> None:
    """The rows beside those of the file with other values in their first ``keys`` columns."""
    told = [[_text(row.get(column, "")) for column in columns] for row in rows]
    new = {tuple(row[:keys]) for row in told}
    old = [row for row in _rows(path) if tuple(row[:keys]) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        print(header(), file=file)
        csv.writer(file).writerows([columns, *old, *told])
    print(*(",".join(row) for row in told), sep="\n", flush=True)


def _text(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
