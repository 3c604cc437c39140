"""report.html: the template beside this file, filled with the results. Self-contained: no script, nothing fetched."""

from html import escape
from pathlib import Path
from string import Template

from benchmarks.demo import plots

_MINUS = "\N{MINUS SIGN}"
_POSITIVE = 0.05  # VADER's own threshold of a positive text


def write_report(path: Path, results: dict) -> None:
    template = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    path.write_text(template.substitute(_values(results)), encoding="utf-8")


def _values(results: dict) -> dict[str, str]:
    plan, table, data, environment = results["plan"], results["table"], results["data"], results["environment"]
    subject, var = results["subject"], table["VAR"]
    on_gpu = not environment["device"].startswith("the CPU")
    return {
        "name": escape(subject["name"]),
        "model_says": escape(subject["says"][0]),
        "reward_says": escape(subject["says"][1]),
        "minutes": _duration(results["seconds"]["all"]),
        "device": escape(environment["device"]),
        "before": signed(table["reference"]["reward"]),
        "after": signed(var["reward"]),
        "gain": f"{signed(var['gain'])} ± {var['gain_error']:.2f}",
        "wins": f"{var['win_rate']:.0%}",
        "kl": f"{var['kl']:.1f}",
        "saved": _saved(results["memory"]),
        "prompts": str(data["prompts"]),
        "completions": str(plan["completions"]),
        "held_out": str(data["held_out"]),
        "eval_samples": str(plan["eval_samples"]),
        "cut": f"{data['cut']:.0%}",
        "tokens_at_most": str(plan["sampling"]["max_new_tokens"]),
        "temperature": f"{plan['sampling']['temperature']:g}",
        "asked": " Each question ends with “Answer in one short sentence.”" if subject["chat"] else "",
        "steps": str(plan["align_steps"]),
        "trains": f"a LoRA adapter of rank {plan['lora']}" if plan["lora"] else "every weight",
        "others": _others(plan),
        "lam": f"{plan['lam']:g}",
        "ess": f"{data['ess_per_prompt']:.1f}",
        "kept": _kept(plan["kept"], data["kept_share"]),
        "kl_samples": str(plan["kl_samples"] or plan["eval_samples"]),
        "per_prompt": f"{data['replies_per_prompt']:.1f}",
        "example": _example(data["example"]),
        "samples": "".join(_sample(row) for row in results["samples"]),
        "table": _table(results),
        "rewards": plots.rewards_before_and_after(results),
        "weights": plots.weights_against_rewards(results),
        "memory": plots.step_bars(results),
        "memory_table": _memory_table(results["memory"]),
        "memory_how": "the CUDA allocator's highest" if on_gpu else "the highest that the whole process held",
        "dtype": subject["dtype"],
        "vocabulary": f"{subject['vocabulary']:,}",
        "load": _load(results["samples"][0]["question"], subject["chat"]),
        "seed": str(results["seed"]),
        "environment": escape(
            " · ".join(f"{name} {version}" for name, version in environment.items() if name != "device")
        ),
        "seconds": escape(
            " · ".join(f"{name.lower() if name != 'all' else name} {s:.0f} s" for name, s in results["seconds"].items())
        ),
    }


def _kept(kept: int | None, share: float) -> str:
    return f"VAR trains on the {kept} best of each question, which hold {share:.0%} of the weight." if kept else ""


def _saved(memory: list[dict]) -> str:
    """The card: the peak of the largest step that both losses could make."""
    both = [row for row in memory if row["plain"] and row["fused"]]
    if not both:
        return "no figure"
    plain, fused = (both[-1][loss]["peak_mib"] / 1024 for loss in ("plain", "fused"))
    return f"{plain:.1f} → {fused:.1f} GiB"


def _others(plan: dict) -> str:
    said = {
        "SFT": "SFT on all of them",
        "Best-of-n SFT": "best-of-n SFT on the best of each question",
        "DPO": f"DPO on the best against the worst (β = {plan['lam']:g}, at 0.3 of the learning rate: at the full one "
        "it drifts far off)",
    }
    parts = [said[name] for name in plan["methods"] if name != "VAR"]
    return f"The others saw the same answers: {', '.join(parts)}." if parts else ""


def _table(results: dict) -> str:
    lam = results["plan"]["lam"]
    heads = ("model", "reward", "gain", "wins over reference", "KL, nats", f"reward {_MINUS} {lam:g} KL", "tokens")
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in (*heads, "seconds")) + "</tr>"]
    for name, row in results["table"].items():
        first = name == "reference"
        cells = [
            name,
            f"{signed(row['reward'])} ± {row['reward_error']:.2f}",
            "" if first else f"{signed(row['gain'])} ± {row['gain_error']:.2f}",
            "" if first else f"{row['win_rate']:.0%} ± {row['win_rate_error']:.0%}",
            "" if first else f"{row['kl']:.2f} ± {row['kl_error']:.2f}",
            f"{signed(row['objective'])} ± {row['objective_error']:.2f}",
            f"{row['length']:.0f}",
            "" if first else f"{row['seconds']:.0f}",
        ]
        rows.append(f'<tr class="{name.lower()}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "".join(rows)


def _memory_table(memory: list[dict]) -> str:
    heads = ("tokens in the step", "plain, MiB", "fused, MiB", "plain, s", "fused, s")
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for row in memory:
        cells = [f"{row['tokens']:,}"]
        for key, form in (("peak_mib", ",.0f"), ("seconds", ".1f")):
            cells += [format(row[loss][key], form) if row[loss] else "no room" for loss in ("plain", "fused")]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "".join(rows)


def _example(example: dict) -> str:
    """The answers to one question with their weights, the best first."""
    rows = [f"<tr><th>answers to “{escape(example['question'])}”</th><th>reward</th><th>weight</th></tr>"]
    for text, reward, weight in example["answers"][:8]:
        rows.append(f"<tr><td>{escape(text.strip())}</td><td>{signed(reward)}</td><td>{weight:.2f}</td></tr>")
    return "".join(rows)


def _sample(row: dict) -> str:
    cells = [escape(row["question"])]
    for name in ("reference", "VAR"):
        reply = row["replies"][name]
        kind = "good" if reply["reward"] > _POSITIVE else "bad" if reply["reward"] < 0 else "points"
        cells.append(f'{escape(reply["text"])}<br><span class="tag {kind}">{signed(reply["reward"])}</span>')
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _load(question: str, chat: bool) -> str:
    asked = (
        f'inputs = tokenizer.apply_chat_template([{{"role": "user", "content": "{question}"}}],\n'
        '    add_generation_prompt=True, return_dict=True, return_tensors="pt")'
        if chat
        else f'inputs = tokenizer("User: {question}\\nAssistant:", return_tensors="pt")'
    )
    return escape(asked, quote=False)


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", _MINUS) if round(value, digits) else f"{0:.{digits}f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
