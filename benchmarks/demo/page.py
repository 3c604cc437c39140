"""The demo's figures into benchmarks/results/cpu-2-cores, docs/demo.svg and README.

make demo && python -m benchmarks.demo.page [runs/demo]
"""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"
PICTURE = ROOT / "docs" / "demo.svg"
MARKS = ("<!-- figures of the demo -->\n", "<!-- end of the figures -->\n")  # in README
COLUMNS = (
    *("reward", "reward_error", "gain", "gain_error", "win_rate", "win_rate_error"),
    *("kl", "kl_error", "objective", "objective_error", "length", "seconds"),
)


def write_csv(folder: Path, run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    environment = " ".join(f"{name}={metrics['environment'][name]}" for name in ("torch", "transformers", "python"))
    plan, data = metrics["plan"], metrics["data"]
    head = (
        f"# the demo, {metrics['subject']['name']}, seed {metrics['seed']}: {metrics['environment']['device']}"
        f"; {environment} commit={commit}\n"
        f"# prompts={data['prompts']} completions={plan['completions']} held_out={data['held_out']} "
        f"eval_samples={plan['eval_samples']} lam={plan['lam']:g} dtype={metrics['subject']['dtype']} "
        f"seconds={metrics['seconds']['all']:.0f}"
    )
    with (folder / "demo-models.csv").open("w", newline="") as out:
        print(head, file=out)
        writer = csv.writer(out)
        writer.writerow(["model", *COLUMNS])
        for name, row in metrics["table"].items():
            writer.writerow([name, *(f"{row[key]:.4f}" for key in COLUMNS)])
    with (folder / "demo-steps.csv").open("w", newline="") as out:
        print(head, file=out)
        writer = csv.writer(out)
        writer.writerow(["tokens", "vocab", "loss", "peak_mib", "seconds"])
        for row in metrics["memory"]:
            for loss in ("plain", "fused"):
                figures = [f"{row[loss]['peak_mib']:.1f}", f"{row[loss]['seconds']:.3f}"] if row[loss] else ["", ""]
                writer.writerow([row["tokens"], metrics["subject"]["vocabulary"], loss, *figures])


def read(path: Path) -> list[dict]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def settings(folder: Path) -> dict[str, str]:
    """The sizes of the run that the CSV is of."""
    return dict(re.findall(r"(\w+)=(\S+)", (folder / "demo-models.csv").read_text().splitlines()[1]))


def table(folder: Path) -> str:
    """README's table of models."""
    lines = ["| model | reward | gain | wins over the reference | KL, nats an answer |", "|---|---|---|---|---|"]
    for row in read(folder / "demo-models.csv"):
        value = {key: float(row[key]) for key in COLUMNS}
        name = "**VAR**" if row["model"] == "VAR" else row["model"]
        cells = [name, f"{value['reward']:+.2f} ± {value['reward_error']:.2f}", "", "", ""]
        if row["model"] != "reference":
            cells[2:] = [
                f"{value['gain']:+.2f} ± {value['gain_error']:.2f}",
                f"{value['win_rate']:.0%} ± {value['win_rate_error']:.0%}".replace("%", " %"),
                f"{value['kl']:.2f} ± {value['kl_error']:.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |".replace("  |", " |").replace("  |", " |"))
    return "\n".join(lines)


def sizes(folder: Path) -> str:
    """The run, in a sentence."""
    run = settings(folder)
    return (
        f"{run['prompts']} prompts with {run['completions']} answers each; {run['held_out']} held-out prompts with "
        f"{run['eval_samples']} answers each; {int(run['seconds']):,} seconds in all"
    )


def steps(folder: Path) -> str:
    """The steps of the model, in a sentence."""
    found: dict[str, list[str]] = {}
    for row in read(folder / "demo-steps.csv"):
        told = f"{float(row['peak_mib']):,.0f} MiB" if row["peak_mib"] else "no room"
        found.setdefault(row["tokens"], []).append(f"{told} {row['loss']}")
    return "; ".join(f"{', '.join(parts)} at {int(tokens):,} tokens" for tokens, parts in found.items())


def block(folder: Path) -> str:
    """What README says between its two marks: nothing where no run was measured."""
    if not (folder / "demo-models.csv").is_file():
        return ""
    vocabulary = int(read(folder / "demo-steps.csv")[0]["vocab"])
    lines = [
        f"{sizes(folder)}",
        f"([demo-models.csv]({_link(folder)}/demo-models.csv)):",
        "",
        table(folder),
        "",
        "![Rewards of the answers before and after VAR, and the mean reward of every prompt](docs/demo.svg)",
        "",
        "Highest memory of the process in one training step of this model, "
        f"{settings(folder)['dtype']}, a vocabulary of {vocabulary:,}:",
        f"{steps(folder)}",
        f"([demo-steps.csv]({_link(folder)}/demo-steps.csv)).",
        "",
    ]
    return "\n".join(lines)


def _link(folder: Path) -> str:
    return folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder.name


def picture(run: Path) -> str:
    """Rewards before and after, as the report draws them."""
    from benchmarks.demo.plots import rewards_before_and_after

    rewards: dict[str, list[float]] = {}
    for line in (run / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        rewards.setdefault(row["model"], []).append(row["reward"])
    return rewards_before_and_after(
        {"rewards": rewards, "plan": json.loads((run / "metrics.json").read_text())["plan"]}
    )


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    write_csv(RESULTS, run)
    PICTURE.write_text(picture(run))
    before, _, rest = (ROOT / "README.md").read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    (ROOT / "README.md").write_text(f"{before}{MARKS[0]}{block(RESULTS)}{MARKS[1]}{after}")
    print(block(RESULTS))


if __name__ == "__main__":
    main()
