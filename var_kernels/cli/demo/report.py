"""report.html: the template beside this file, filled with the results. Self-contained: no script, nothing fetched."""

from html import escape
from pathlib import Path
from string import Template

from var_kernels.cli.demo import plots
from var_kernels.cli.demo.world import MAX_WORDS, Score


def write_report(path: Path, results: dict) -> None:
    template = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    path.write_text(template.substitute(_values(results)), encoding="utf-8")


def _values(results: dict) -> dict[str, str]:
    plan, table, data, environment = results["plan"], results["table"], results["data"], results["environment"]
    last = results["memory"][-1]
    on_gpu = not environment["device"].startswith("the CPU")
    return {
        "minutes": _duration(results["seconds"]["all"]),
        "device": escape(environment["device"]),
        "before": _signed(table["reference"]["reward"]),
        "after": _signed(table["VAR"]["reward"]),
        "kl": f"{table['VAR']['kl']:.2f}",
        "objective_before": _signed(table["reference"]["objective"]),
        "objective_after": _signed(table["VAR"]["objective"]),
        "objective_best": _signed(results["optimum"]["objective"]),
        "objectives": _objectives(results),
        "ratio": f"{last['plain_mib'] / last['fused_mib']:.1f}x",
        "tokens": f"{last['tokens']:,}",
        "vocab": f"{last['vocab']:,}",
        "parameters": f"{plan['parameters']:,}",
        "corpus_rows": f"{plan['pretrain_steps'] * plan['pretrain_batch']:,}",
        "prompts": str(data["prompts"]),
        "completions": str(plan["completions"]),
        "replies": f"{len(data['rewards']):,}",
        "max_words": str(MAX_WORDS),
        "held_out": str(data["held_out"]),
        "eval_samples": str(plan["eval_samples"]),
        "steps": str(plan["align_steps"]),
        "lam": f"{plan['lam']:g}",
        "ess": f"{data['ess_per_prompt']:.1f}",
        "example": _example(data["example"]),
        "samples": "".join(_sample(row) for row in results["samples"]),
        "table": _table(results),
        "curves": plots.training_curves(results),
        "weights": plots.weights_against_rewards(results),
        "frontier": plots.reward_against_kl(results),
        "memory": plots.memory_bars(results),
        "memory_how": "the CUDA allocator's peak"
        if on_gpu
        else "the sum of all allocations alive at once, from the profiler's memory events",
        "question": escape(results["samples"][0]["question"]),
        "seed": str(results["seed"]),
        "environment": escape(
            " · ".join(f"{name} {version}" for name, version in environment.items() if name != "device")
        ),
        "seconds": escape(
            " · ".join(f"{name.lower() if name != 'all' else name} {s:.0f} s" for name, s in results["seconds"].items())
        ),
    }


def _table(results: dict) -> str:
    best = results["optimum"]
    heads = (
        *(
            "model",
            "reward, points",
            f"reward \N{MINUS SIGN} {best['lam']:g} KL",
            "KL, nats",
            "right",
            "friendly",
            "rude",
        ),
        *("too long", "wins over reference", "seconds"),
    )
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for name, row in results["table"].items():
        first = name == "reference"
        cells = [
            name,
            f"{_signed(row['reward'])} ± {row['reward_error']:.2f}",
            f"{_signed(row['objective'])} ± {row['objective_error']:.2f}",
            "" if first else f"{row['kl']:.2f} ± {row['kl_error']:.2f}",
            *(f"{row[key]:.0%}" for key in ("right", "friendly", "rude", "too_long")),
            "" if first else f"{row['win_rate']:.0%} ± {row['win_rate_error']:.0%}",
            f"{row['seconds']:.0f}",
        ]
        rows.append(f'<tr class="{name.lower()}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    objective = f"{_signed(best['objective'])} ± {best['objective_error']:.2f}"
    cells = ["optimum π*", _signed(best["reward"]), objective, f"{best['kl']:.2f}", *[""] * 6]
    rows.append('<tr class="target">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "".join(rows)


def _objectives(results: dict) -> str:
    """The models by reward - lam KL, the best first."""
    rows = sorted(results["table"].items(), key=lambda item: -item[1]["objective"])
    return ", ".join(f"{name} {_signed(row['objective'])}" for name, row in rows)


def _example(example: dict) -> str:
    """One answer for each reward that the answers to this question got."""
    question = example["prompt"].removeprefix("User: ").removesuffix("\nAssistant:")
    shown = {reward: (text, weight) for text, reward, weight in reversed(example["answers"])}
    rows = [f"<tr><th>answers to “{escape(question)}”</th><th>reward</th><th>weight</th></tr>"]
    for reward in sorted(shown, reverse=True):
        text, weight = shown[reward]
        rows.append(f"<tr><td>{escape(text.strip())}</td><td>{_signed(reward, 0)}</td><td>{weight:.2f}</td></tr>")
    return "".join(rows)


def _sample(row: dict) -> str:
    cells = [escape(row["question"])]
    for name in ("reference", "VAR"):
        reply = row["replies"][name]
        cells.append(f"{escape(reply['text'])}<br>{_tags(reply['score'])}")
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _tags(score: Score) -> str:
    tags = [("points", _signed(score.reward, 0)), ("good", "right") if score.right else ("bad", "wrong")]
    tags += [
        (kind, text)
        for kind, text, holds in (
            ("good", "friendly", score.friendly),
            ("bad", "rude", score.rude),
            ("bad", "too long", score.too_long),
        )
        if holds
    ]
    return "".join(f'<span class="tag {kind}">{text}</span>' for kind, text in tags)


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}") if round(value, digits) else f"{0:.{digits}f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
