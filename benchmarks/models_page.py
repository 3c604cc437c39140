"""docs/models.md from the records of a sweep over one or more versions of transformers."""

import re
from collections import Counter

from tests.zoo.build import MAPPINGS
from tests.zoo.check import REFUSED, RIGHT, UNBUILT, WRONG

_HEAD = """# Which Hugging Face models

{summary}
With {versions}.

- **right**: loss, log-probs and every gradient are those of the model's own logits;
- **refused**: an error says why before anything is computed; use the model's own loss;
- **not causal**: refused for log-probs alone. Hidden states depend on later tokens, so there are no next-token
  log-probabilities; a BERT-like model needs `config.is_decoder = True`;
- **cannot be built**: the class does not run here by itself, for the reason given;
- **wrong**: a number is off. None may be.

Every class of transformers' causal-LM, image-text-to-text, multimodal-LM and sequence-to-sequence mappings is shrunk,
given random weights and compared with itself: `token_logprobs` with the log-softmax of its logits, `fused_lm_head`'s
loss with its own loss, and every gradient under both. The loss is compared again with labels on padding, with
`num_items_in_batch` and with a tuple as output. The bound is 2^-17 (of a gradient's root mean square), or 4 times what
rounding moves the model's own numbers. Models run in fp64, or in fp32 where their forward supports only that;
multimodal ones get text alone where they accept it.

Made by `python -m benchmarks.models` (`--merge RESULTS` adds a column); do not edit.
"""
_TITLES = {
    "CAUSAL_LM": "Causal language models",
    "IMAGE_TEXT_TO_TEXT": "Image-text-to-text models",
    "MULTIMODAL_LM": "Further multimodal language models",
    "SEQ_TO_SEQ_CAUSAL_LM": "Sequence-to-sequence models",
}


def page(sweeps: list[list[dict]]) -> str:
    """The page; the first sweep is that of the newest version, whose classes are listed."""
    sweeps = sorted((s for s in sweeps if s), key=lambda s: _number(_version(s)), reverse=True)
    parts = [_HEAD.format(versions="; ".join(map(_versions, sweeps)), summary="\n".join(map(summary, sweeps)))]
    merged: dict[tuple[str, str], dict[str, dict]] = {}
    for records in sweeps:
        for record in records:
            merged.setdefault((record["type"], record["class"]), {})[_version(records)] = record
    versions = [_version(records) for records in sweeps]
    for mapping in MAPPINGS:
        rows = [_row(key, found, versions) for key, found in sorted(merged.items()) if _first(found) == mapping]
        if rows:
            parts += [f"## {_TITLES[mapping]}", "", *section(rows, versions)]
    return "\n".join(parts)


def section(rows: list[list[str]], versions: list[str]) -> list[str]:
    """Lines: what is right as lists, by versions and remark, where three share them; a table of the others."""
    lists: dict[str, list[list[str]]] = {}
    for row in rows:
        _, _, *verdicts, remark = row
        right_in = [version for version, verdict in zip(versions, verdicts, strict=True) if verdict]
        shared = " and ".join(right_in) + (f", {remark}" if remark else "")
        lists.setdefault(shared if not set(verdicts) - {RIGHT, ""} else "", []).append(row)
    lines, others = [], lists.pop("", [])
    for shared, alike in lists.items():
        if len(alike) < 3:
            others += alike
        else:
            lines += [f"Right in {shared}: {', '.join(f'{kind} `{name}`' for kind, name, *_ in alike)}.", ""]
    if others:
        lines += [f"| model type | class | {' | '.join(versions)} | head and remarks |"]
        lines += ["|" + "---|" * (len(versions) + 3), *(f"| {' | '.join(row)} |" for row in sorted(others)), ""]
    return lines


def summary(records: list[dict]) -> str:
    """The line that a test reads: counts over all pairs."""
    counts = Counter(record["verdict"] for record in records)
    buildable = len(records) - counts[UNBUILT]
    return (
        f"transformers {_version(records)}: {len(records)} pairs of model type and class, {counts[RIGHT]} right, "
        f"{counts[REFUSED]} refused, {counts[WRONG]} wrong, {counts[UNBUILT]} cannot be built here; "
        f"{100 * counts[RIGHT] / max(buildable, 1):.1f} % of what can be built is right.\n"
    )


def _row(key: tuple[str, str], found: dict[str, dict], versions: list[str]) -> list[str]:
    """Model type, class, a verdict or "" for each version, remark."""
    record = next(found[version] for version in versions if version in found)
    said: dict[str, list[str]] = {}
    for version, each in found.items():
        said.setdefault(_shortened(each), []).append(version)
    remarks = [record.get("head", "")]
    remarks += [f"{' and '.join(at)}: {text}" if len(at) < len(found) else text for text, at in said.items() if text]
    remark = "; ".join(filter(None, remarks)).replace("|", "\\|").replace("\n", " ")
    cells = [found[version]["verdict"] if version in found else "" for version in versions]
    return [*key, *cells, remark]


def _shortened(record: dict) -> str:
    """What failed, without what the row and the page's head say: the class, the remedy, one reason twice."""
    name, detail = re.escape(record["class"]), record["detail"]
    detail = re.sub(r" Use (its own|the model's own) loss[^;]*| Change the hidden states before.*", "", detail)
    if record.get("loss") == RIGHT:
        detail = re.sub(rf"log-probs: {name} is not causal: [^;]*", "not causal", detail)
    detail = re.sub(rf"{name}:? ", "", detail)
    detail = re.sub(r"log-probs: (.*); loss: \1$", r"\1", detail)
    return detail if len(detail) <= 300 else detail[:297] + "..."


def _first(found: dict[str, dict]) -> str:
    return next(iter(found.values()))["mappings"][0]


def _version(records: list[dict]) -> str:
    return records[0]["versions"]["transformers"]


def _versions(records: list[dict]) -> str:
    return ", ".join(f"{name} {number}" for name, number in records[0]["versions"].items())


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
