"""The demo's figures into benchmarks/results/cpu-2-cores and README.

make demo && python -m benchmarks.demo [runs/demo]
"""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"
COLUMNS = (
    *("reward", "reward_error", "right", "friendly", "rude", "too_long", "win_rate", "win_rate_error"),
    *("kl", "kl_error", "objective", "objective_error", "seconds"),
)


def write_csv(folder: Path, run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    environment = " ".join(f"{name}={metrics['environment'][name]}" for name in ("torch", "transformers", "python"))
    head = (
        f"# var-kernels demo, seed {metrics['seed']}: {metrics['environment']['device']}; {environment} commit={commit}"
    )
    models = {**metrics["table"], "optimum": metrics["optimum"]}
    with (folder / "demo-models.csv").open("w", newline="") as out:
        print(head, file=out)
        writer = csv.writer(out)
        writer.writerow(["model", *COLUMNS])
        for name, row in models.items():
            writer.writerow([name, *(f"{row[key]:.4f}" if key in row else "" for key in COLUMNS)])
    with (folder / "demo-memory.csv").open("w", newline="") as out:
        print(head, file=out)
        writer = csv.writer(out)
        writer.writerow(["tokens", "vocab", "plain_mib", "fused_mib"])
        for row in metrics["memory"]:
            writer.writerow([row["tokens"], row["vocab"], f"{row['plain_mib']:.1f}", f"{row['fused_mib']:.1f}"])


def read(path: Path) -> list[dict]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def table(folder: Path) -> str:
    """README's table of models."""
    lines = [
        "| model | reward | reward - λ KL | KL to the reference, nats | right | friendly | wins over the reference |",
        "|---|---|---|---|---|---|---|",
    ]

    def number(row, name, sign="+"):
        error = f" ± {float(row[f'{name}_error']):.2f}" if row[f"{name}_error"] else ""
        return f"{float(row[name]):{sign}.2f}{error}"

    for row in read(folder / "demo-models.csv"):
        objective = number(row, "objective")
        if row["model"] == "optimum":
            lines.append(f"| optimum π* | {number(row, 'reward')} | {objective} | {float(row['kl']):.2f} | | | |")
            continue
        shares = [f"{float(row[name]):.0%}".replace("%", " %") for name in ("right", "friendly")]
        wins = f"{float(row['win_rate']):.0%} ± {float(row['win_rate_error']):.0%}".replace("%", " %")
        kl, wins = ("", "") if row["model"] == "reference" else (number(row, "kl", ""), wins)
        name = "**VAR**" if row["model"] == "VAR" else row["model"]
        cells = [name, number(row, "reward"), objective, kl, *shares, wins]
        lines.append(f"| {' | '.join(cells)} |".replace("  |", " |"))
    return "\n".join(lines)


def memory(folder: Path) -> str:
    """README's sentence."""
    first, *_, last = read(folder / "demo-memory.csv")
    parts = [
        f"{float(row['plain_mib']):,.0f} plain, {float(row['fused_mib']):,.0f} fused at {int(row['tokens']):,} tokens"
        for row in (first, last)
    ]
    return f"(vocabulary {int(first['vocab']):,}): {'; '.join(parts)}"


def samples(run: Path) -> str:
    """The first reply of two models to the first two held-out questions about homes: the first that the demo prints."""
    first: dict[str, dict[str, dict]] = {}
    for line in (run / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = row["prompt"].removeprefix("User: ").removesuffix("\nAssistant:")
        first.setdefault(question, {}).setdefault(row["model"], row)
    lines = ["| question | reference, before | VAR, after |", "|---|---|---|"]
    for question in [text for text in first if "live?" in text or "the home of" in text][:2]:
        replies = (first[question][name] for name in ("reference", "VAR"))
        cells = [f"{row['reply'].strip()} ({row['reward']:+.0f})".replace("(+0)", "(0)") for row in replies]
        lines.append(f"| {question} | {' | '.join(cells)} |")
    return "\n".join(lines)


def replace(text: str, pattern: str, new: str) -> str:
    text, count = re.subn(pattern, lambda _: new, text)
    if count != 1:
        raise SystemExit(f"README.md must hold {pattern!r} once, found {count}")
    return text


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    write_csv(RESULTS, run)
    text = (ROOT / "README.md").read_text()
    text = replace(text, r"\| model \| reward(?:.*\n\|)+.*", table(RESULTS))
    text = replace(text, r"\| question \| reference(?:.*\n\|)+.*", samples(run))
    text = replace(text, r"\(vocabulary [\d,]+\):[^(]+ tokens", memory(RESULTS))
    (ROOT / "README.md").write_text(text)
    print(table(RESULTS), samples(run), memory(RESULTS), sep="\n\n")


if __name__ == "__main__":
    main()
