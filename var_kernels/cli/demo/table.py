"""The results in the terminal."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def print_results(console: Console, results: dict) -> None:
    console.print()
    console.print(_result_table(results))
    console.print(_verdict(results) + "\n", highlight=False)
    console.print(_memory_table(results["memory"]))
    console.print()
    console.print(_sample_table(results["samples"]))


def _result_table(results: dict) -> Table:
    table = Table(
        title="Replies to held-out prompts, sampled at temperature 1 (mean ± standard error);\n"
        f"KL to the reference in nats a reply; objective: reward - λ KL, λ = {results['optimum']['lam']:g}",
        title_justify="left",
        box=SIMPLE,  # without rules between the columns a row fits into 80 characters
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("model")
    for column in ("reward", "objective", "KL", "right", "friendly", "time"):
        table.add_column(column, justify="right")
    for name, row in results["table"].items():
        table.add_row(
            name,
            f"{row['reward']:+.2f} ± {row['reward_error']:.2f}",
            f"{row['objective']:+.2f} ± {row['objective_error']:.2f}",
            "" if name == "reference" else f"{row['kl']:.2f} ± {row['kl_error']:.2f}",
            f"{row['right']:.0%}",
            f"{row['friendly']:.0%}",
            f"{row['seconds']:.0f} s",
            style="bold" if name == "VAR" else None,
        )
    best = results["optimum"]
    table.add_section()
    objective = f"{best['objective']:+.2f} ± {best['objective_error']:.2f}"
    table.add_row("optimum π*", f"{best['reward']:+.2f}", objective, f"{best['kl']:.2f}", "", "", "", style="dim")
    return table


def _verdict(results: dict) -> str:
    """What the numbers are to be judged by, and who comes near."""
    rows, best = results["table"], results["optimum"]
    lam, most = best["lam"], max(rows, key=lambda name: rows[name]["reward"])
    text = (
        f"VAR and DPO aim at the highest objective: points gained, less {lam:g} for each nat away from the reference. "
        f"No policy exceeds that of π*, {best['objective']:+.2f}; VAR has {rows['VAR']['objective']:+.2f}, DPO "
        f"{rows['DPO']['objective']:+.2f}."
    )
    if most != "VAR":
        text += f" {most} has the most reward, at a KL of {rows[most]['kl']:.2f}: {rows[most]['objective']:+.2f}."
    return text


def _memory_table(memory: list[dict]) -> Table:
    vocab = f"{memory[0]['vocab']:,}"
    table = Table(title=f"Peak memory of a training step, MiB (vocabulary {vocab})", title_justify="left")
    for column in ("tokens in the batch", "plain loss", "fused loss", "plain / fused"):
        table.add_column(column, justify="right")
    for row in memory:
        ratio = row["plain_mib"] / row["fused_mib"]
        table.add_row(f"{row['tokens']:,}", f"{row['plain_mib']:,.0f}", f"{row['fused_mib']:,.0f}", f"{ratio:.1f}")
    return table


def _sample_table(samples: list[dict]) -> Table:
    table = Table(
        title="The first reply of each model (in points: right +1, friendly +1, rude -1, too long -1)",
        title_justify="left",
        show_lines=True,
    )
    table.add_column("question", ratio=2)
    table.add_column("reference, before", ratio=3)
    table.add_column("VAR, after", ratio=3)
    for row in samples:
        replies = (row["replies"][name] for name in ("reference", "VAR"))
        table.add_row(row["question"], *(f"{reply['text']}  ({_points(reply['score'].reward)})" for reply in replies))
    return table


def _points(reward: float) -> str:
    return f"{reward:+.0f}" if reward else "0"
