"""The results in the terminal."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.demo.report import signed


def print_results(console: Console, results: dict) -> None:
    console.print()
    console.print(_result_table(results))
    console.print(_memory_table(results))
    console.print()
    console.print(_sample_table(results))


def _result_table(results: dict) -> Table:
    lam = results["plan"]["lam"]
    table = Table(
        title=f"{results['subject']['name']}: answers to held-out prompts (mean ± standard error);\n"
        f"KL to the reference in nats an answer; objective: reward - λ KL, λ = {lam:g}",
        title_justify="left",
        box=SIMPLE,  # without rules between the columns a row fits into 80 characters
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("model")
    for column in ("reward", "gain", "wins", "KL", "objective", "time"):
        table.add_column(column, justify="right")
    for name, row in results["table"].items():
        first = name == "reference"
        table.add_row(
            name,
            f"{row['reward']:+.2f} ± {row['reward_error']:.2f}",
            "" if first else f"{row['gain']:+.2f} ± {row['gain_error']:.2f}",
            "" if first else f"{row['win_rate']:.0%}",
            "" if first else f"{row['kl']:.2f} ± {row['kl_error']:.2f}",
            f"{row['objective']:+.2f} ± {row['objective_error']:.2f}",
            "" if first else f"{row['seconds']:.0f} s",
            style="bold" if name == "VAR" else None,
        )
    return table


def _memory_table(results: dict) -> Table:
    vocabulary = f"{results['subject']['vocabulary']:,}"
    table = Table(title=f"One training step of this model (vocabulary {vocabulary})", title_justify="left")
    for column in ("tokens", "plain loss", "fused loss"):
        table.add_column(column, justify="right")
    for row in results["memory"]:
        cells = [
            f"{step['peak_mib']:,.0f} MiB, {step['seconds']:.1f} s" if step else "no room"
            for step in (row["plain"], row["fused"])
        ]
        table.add_row(f"{row['tokens']:,}", *cells)
    return table


def _sample_table(results: dict) -> Table:
    table = Table(title="The first answer of each model, and its reward", title_justify="left", show_lines=True)
    table.add_column("question", ratio=2)
    table.add_column("before", ratio=3)
    table.add_column("after VAR", ratio=3)
    for row in results["samples"]:
        replies = (row["replies"][name] for name in ("reference", "VAR"))
        table.add_row(row["question"], *(f"{reply['text']}  ({signed(reply['reward'])})" for reply in replies))
    return table
