"""The forms a row of training data may take, and what is wrong with a row that takes none of them."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from numbers import Real
from typing import Any, Literal

Text = str | list[dict]  # plain text, or messages [{"role": ..., "content": ...}, ...]
RewardNeed = Literal["required", "unless_pair", "optional", "prompt"]  # prompt: not even a completion

FORMS = (
    "prompt + completion + reward",
    "prompt + completions + rewards",
    "prompt + chosen + rejected (+ chosen_reward + rejected_reward, or rewards)",
    "messages",
)
# What the forms, and the files of online training, give a meaning.
FORM_KEYS = {
    *("prompt", "completion", "completions", "chosen", "rejected", "messages", "reward", "rewards", "chosen_reward"),
    *("rejected_reward", "label", "tools", "chat_template_kwargs", "where", "prompt_ids", "completion_ids"),
}
SHOWN_PROBLEMS = 10
_SHOWN_KEYS = 12
MAX_REWARD = 3.4e38
_NUMBERS: Any = Real | Decimal
_DECIMAL = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_LABELS = {"true": True, "false": False, "1": True, "0": False}
# What the encoder itself passes to apply_chat_template.
_RESERVED = {
    *("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the data: ``where`` is "FILE:LINE" (or "NAME row N"), ``reason`` says what was expected and
    what came."""

    where: str
    reason: str

    def __str__(self):
        return f"{self.where}: {self.reason}"


class DataError(ValueError):
    """Every problem found in the data; the message shows the first ten reasons, each once with the number of rows that
    share it, and a single problem in a single line."""

    def __init__(
        self, problems: list[Problem], remedy: str = "mend what is malformed, or pass skip_malformed (--skip-malformed)"
    ) -> None:
        self.problems, self.remedy = problems, remedy
        if len(problems) == 1:
            super().__init__(f"{problems[0]}; {remedy}")
            return
        rows: dict[str, list[str]] = {}
        for problem in problems:
            rows.setdefault(problem.reason, []).append(problem.where)
        shown = [
            f"  {where[0]}: {reason}" + (f" (and {len(where) - 1} more rows like it)" if len(where) > 1 else "")
            for reason, where in list(rows.items())[:SHOWN_PROBLEMS]
        ]
        hidden = sum(map(len, list(rows.values())[SHOWN_PROBLEMS:]))
        if hidden:
            shown.append(f"  ... and {hidden} more")
        super().__init__("\n".join([f"{len(problems)} malformed rows: {remedy}", *shown]))


@dataclass
class Example:
    """A prompt with its completions. ``rewards`` and ``where`` run parallel to ``completions``; a pair is (chosen,
    rejected). A prompt alone has one ``where``."""

    prompt: Text
    completions: list[Text]
    rewards: list[float] | None
    where: list[str] = field(default_factory=list)
    is_pair: bool = False
    tools: list | None = None  # for the chat template
    template_kwargs: dict | None = None  # of the row's own, for the chat template
    columns: list[dict] = field(default_factory=list, compare=False)  # parallel to where: the rest of each row

    @property
    def prompt_key(self) -> str:
        """Equal for equal prompts: what the prompt's tokens depend on."""
        return json.dumps([self.prompt, self.tools, self.template_kwargs], sort_keys=True, default=repr)


class _BadRowError(Exception):
    """Carries the reason from a check to ``parse_row``."""


def parse_row(row: object, where: str, need_rewards: RewardNeed = "optional") -> Example | Problem:
    """Turn one row of any form into an ``Example``, or say what is wrong with it. Keys that no form knows are kept for
    reward functions (``columns``)."""
    try:
        return _parse(row, where, need_rewards)
    except _BadRowError as error:
        return Problem(where, str(error))


def _parse(row: object, where: str, need_rewards: RewardNeed) -> Example:
    if not isinstance(row, Mapping):
        raise _BadRowError(f"expected an object with keys ({' | '.join(FORMS)}), got {_kind(row)}")
    # A Parquet file of mixed forms has every column in every row, null where unused.
    present = {key for key, value in row.items() if value is not None} or set(row)
    columns = {key: value for key, value in row.items() if key not in ("prompt", "completion", "completions")}
    row = _with_prompt(dict(row), present)
    present |= {key for key in ("prompt", "completion") if key in row}
    template_kwargs = _template_kwargs(row) if row.get("chat_template_kwargs") is not None else {}
    tools = template_kwargs.pop("tools", None) or (_tools(row) if row.get("tools") is not None else None)
    prompt = _text(row, "prompt")
    is_pair = "chosen" in present or "rejected" in present
    if is_pair:
        completions = [_text(row, "chosen", prompt), _text(row, "rejected", prompt)]
        rewards = _pair_rewards(row, present)
    elif {"completion", "completions"} <= present:
        raise _BadRowError("a row must have completion or completions, got both; drop one of them")
    elif "completions" in present or ("rewards" in present and "completion" not in present):
        completions = [_text(row, "completions", prompt, item=i) for i in range(len(_list(row, "completions")))]
        if not completions:
            raise _BadRowError("completions must have at least one entry, got an empty list; drop the row")
        rewards = _rewards(row, "rewards", len(completions)) if "rewards" in row else None
    elif "completion" in row:
        completions = [_text(row, "completion", prompt)]
        rewards = _reward(row, present, need_rewards)
    elif need_rewards == "prompt":
        completions, rewards = [], None
    else:
        raise _BadRowError(
            f"a row must have the keys {' | '.join(FORMS)}, got {key_names(row)}; --columns completion=NAME "
            "(columns={'completion': NAME}) reads another column"
        )
    if rewards is None and (need_rewards == "required" or (need_rewards == "unless_pair" and not is_pair)):
        name = "chosen_reward and rejected_reward" if is_pair else "rewards" if "completions" in present else "reward"
        remedy = "; pairs without rewards are for method 'dpo' (--method dpo) and its kin" if is_pair else ""
        raise _BadRowError(
            f"{name} must be in the data, since this method needs rewards, got the keys {key_names(row)}; add it, or "
            f"pass a reward function (--reward){remedy}"
        )
    count = max(1, len(completions))
    return Example(
        prompt, completions, rewards, [where] * count, is_pair, tools, template_kwargs or None, [columns] * count
    )


def _with_prompt(row: dict, present: set) -> dict:
    """The row with the prompt that a conversation holds: all before its last answer, or what a pair has in common, a
    prompt of text that says it again or not."""
    halves = isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list)
    if "prompt" in present and not (halves and isinstance(row["prompt"], str)):
        return row
    if "messages" in present and not present & {"chosen", "rejected", "completion", "completions"}:
        messages = _text(row, "messages")
        if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            got = "text" if isinstance(messages, str) else "those of " + ", ".join(m["role"] for m in messages[-9:])
            raise _BadRowError(
                f"messages must be a conversation of two messages or more that the assistant ends, got {got}; add the "
                "answer, or drop the row"
            )
        return {**row, "prompt": messages[:-1], "completion": messages[-1:]}
    if halves:
        beside = list(zip(row["chosen"], row["rejected"], strict=False))
        shared = next((n for n, (a, b) in enumerate(beside) if a != b), len(beside))
        said = beside[shared - 1][0] if shared else None
        if shared and ("prompt" not in present or (_is_message(said) and said.get("content") == row["prompt"])):
            cut = {key: row[key][shared:] for key in ("chosen", "rejected")}
            return {**row, "prompt": row["chosen"][:shared], **cut}
    return row


def _template_kwargs(row: dict) -> dict:
    given = row["chat_template_kwargs"]
    if not isinstance(given, Mapping):
        raise _BadRowError(f"chat_template_kwargs must be an object, got {_kind(given)}")
    if taken := sorted(_RESERVED & set(given)):
        raise _BadRowError(f"chat_template_kwargs must be for the template, got {', '.join(taken)}; drop it")
    return {name: value for name, value in given.items() if value is not None}


def _tools(row: dict) -> list | None:
    if not isinstance(row["tools"], str):
        return _list(row, "tools") or None
    try:  # one Parquet column holds tools of different shapes as JSON
        return _list({"tools": json.loads(row["tools"])}, "tools") or None
    except json.JSONDecodeError:
        raise _BadRowError(f"tools must be a list, or JSON of one, got {_kind(row['tools'])}") from None


def _reward(row: dict, present: set, need_rewards: RewardNeed) -> list[float] | None:
    if "reward" in row and not (row["reward"] is None and "label" in present):
        return [_number(row["reward"], "reward")]
    if "label" in present:
        if (label := as_label(row["label"])) is not None:
            return [1.0 if label else -1.0]
        if need_rewards in ("required", "unless_pair"):  # elsewhere it may be a column of another meaning
            raise _BadRowError(f"label must be true or false (or 1 or 0), got {_kind(row['label'])}")
    return None


def _plain(value: object) -> object:
    """A scalar of numpy or torch as Python's own."""
    item = getattr(value, "item", None)
    if not callable(item):
        return value
    try:
        return item()
    except (TypeError, ValueError, RuntimeError):  # more than one element
        return value


def as_label(value: object) -> bool | None:
    """True or False for a bool, 1 or 0, or the text of one, of numpy and torch too; None for anything else."""
    value = _plain(value)
    if isinstance(value, str):
        return _LABELS.get(value.strip().lower())
    return bool(value) if isinstance(value, Real) and value in (0, 1) else None


def as_number(value: object) -> float | None:
    """A number of Python, numpy or torch, or the text of a decimal number; None for anything else, booleans among it.
    Beyond fp64: infinite."""
    number: Any = _plain(value)
    if isinstance(number, str):
        number = float(number) if _DECIMAL.fullmatch(number) else None
    if isinstance(number, bool) or not isinstance(number, _NUMBERS):
        return None
    try:
        return float(number)
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")
    except ValueError:  # a signalling NaN
        return float("nan")


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.60}"


def key_names(row: Iterable) -> str:
    """The keys of a row for an error: twelve of many."""
    keys = sorted(map(str, row))
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return f"{keys[:_SHOWN_KEYS]}{more}"


def _missing(row: dict, key: str) -> _BadRowError:
    return _BadRowError(
        f"a row must have {key} ({' | '.join(FORMS)}), got the keys {key_names(row)}; --columns {key}=NAME "
        f"(columns={{{key!r}: NAME}}) reads another column"
    )


def _list(row: dict, key: str) -> list:
    if key not in row:
        raise _missing(row, key)
    value = row[key].tolist() if hasattr(row[key], "tolist") else row[key]  # an array of numpy or torch
    if not isinstance(value, list | tuple):
        raise _BadRowError(f"{key} must be a list, got {_kind(row[key])}")
    return list(value)


def _text(row: dict, key: str, prompt: Text | None = None, item: int | None = None) -> Text:
    if key not in row:
        raise _missing(row, key)
    value, name = (row[key], key) if item is None else (row[key][item], f"{key}[{item}]")
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, str):
        if key == "prompt" and not value:
            raise _BadRowError(
                "prompt must not be empty, since a completion's first token follows it, got ''; add text, or drop the "
                "row"
            )
    elif isinstance(value, list):
        if not value:
            raise _BadRowError(f"{name} must hold at least one message, got an empty list; drop the row")
        for i, message in enumerate(value):
            if not _is_message(message):
                raise _BadRowError(f"{name} message {i} must be {{'role': str, 'content': str}}, got {_kind(message)}")
            _check_parts(message.get("content"), f"{name} message {i}")
    else:
        raise _BadRowError(f"{name} must be text or a list of messages, got {_kind(value)}")
    if prompt is not None and isinstance(value, str) != isinstance(prompt, str):
        words = {True: "text", False: "messages"}
        raise _BadRowError(
            f"{name} must be {words[isinstance(prompt, str)]} like prompt, got {words[isinstance(value, str)]}; use "
            "the same for both"
        )
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)).encode()
    except UnicodeEncodeError as error:  # no tokenizer takes it
        raise _BadRowError(
            f"{name} must be Unicode text, got a lone surrogate, {error.object[error.start]!a}; mend the row"
        ) from None
    return value


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    calls = message.get("content") is None and isinstance(message.get("tool_calls"), list)
    return calls or isinstance(message.get("content"), str | list)


def _check_parts(content: object, name: str) -> None:
    """Content as a list of parts: every one of text."""
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise _BadRowError(f"{name} part must be {{'type': 'text', 'text': str}}, got {_kind(part)}")
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise _BadRowError(f"{name} part must be of type 'text', got {part['type']!r}; drop it, or the row")


def _number(value: object, name: str) -> float:
    number = as_number(value)
    if number is None:
        raise _BadRowError(f"{name} must be a number, got {_kind(value)}")
    if not abs(number) <= MAX_REWARD:
        raise _BadRowError(f"{name} must be finite, got {value!r:.40}; rewards are kept in fp32, up to {MAX_REWARD}")
    return number


def _rewards(row: dict, key: str, count: int) -> list[float]:
    values = _list(row, key)
    if len(values) != count:
        raise _BadRowError(f"{key} must have one entry per completion, {count}, got {len(values)}")
    return [_number(value, f"{key}[{i}]") for i, value in enumerate(values)]


def _pair_rewards(row: dict, present: set) -> list[float] | None:
    if "chosen_reward" in present or "rejected_reward" in present:
        for key in ("chosen_reward", "rejected_reward"):
            if key not in row:
                raise _BadRowError(
                    f"chosen_reward and rejected_reward must be given together, got no {key}; add it, or drop the other"
                )
        return [_number(row[key], key) for key in ("chosen_reward", "rejected_reward")]
    return _rewards(row, "rewards", 2) if "rewards" in present else None


def merge_prompts(examples: Iterable[Example]) -> list[Example]:
    """Join the completions of equal prompts, in the order of first appearance. Pairs stay as they are."""
    merged: dict[object, Example] = {}
    for i, example in enumerate(examples):
        key = i if example.is_pair else (example.prompt_key, example.rewards is None)
        if key not in merged:
            rewards: Any = None if example.rewards is None else []
            merged[key] = replace(example, completions=[], rewards=rewards, where=[], columns=[])
        kept = merged[key]
        kept.completions += example.completions
        kept.where += example.where
        kept.columns += example.columns or [{}] * len(example.where)
        if kept.rewards is not None:
            kept.rewards += example.rewards
    return list(merged.values())
