"""Rewards from a function of the user's: ``function(prompts, completions, **columns) -> list of floats``."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from var_kernels.integrations.data import DataError, Example, Problem
from var_kernels.integrations.data.forms import FORM_KEYS, MAX_REWARD, Text, as_label, as_number, key_names
from var_kernels.integrations.trainer.progress import progress_bar
from var_kernels.integrations.trainer.ranks import in_shares, rank_and_size

RewardFunction = Callable[..., Sequence[float]]
_CHUNK = 64
_MAIN = ("prompts", "completions")
_REMEDY = "mend the reward function, or drop these rows"


def load_function(spec: str, option: str = "reward") -> Callable:
    """Import "module:name", from the current directory too; ``option`` is named in an error.

    Raises:
        ValueError: not of that form, no such module or function, or not callable.
    """
    module_name, colon, name = spec.partition(":")
    if not (colon and module_name and name):
        raise ValueError(f"{option} must be module:function, got {spec!r}; my_rewards:score is score in my_rewards.py")
    if "" not in sys.path:
        sys.path.insert(0, "")  # where the command is run, as for `python -m`
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"{option} must name a module that can be imported here or from PYTHONPATH, got {module_name!r}; check its "
            f"name and its imports: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{option}: module {module_name!r} must have a function {name!r}, got none; see its spelling")
    return function


def load_rewards(spec: str) -> "RewardFunction | RewardSum":
    """A reward function, or the weighted sum of several, by their names: "a:f" or "a:f,b:g*0.5".

    Raises:
        ValueError: not of that form, no such module or function, or not callable.
    """
    parts = []
    for part in spec.split(","):
        name, star, weight = part.strip().partition("*")
        if star and as_number(weight) is None:
            raise ValueError(f"reward must be module:function*weight, got {part!r}; the weight is a number")
        parts.append((load_function(name.strip()), as_number(weight) if star else 1.0))
    return RewardSum(parts) if len(parts) > 1 or parts[0][1] != 1.0 else parts[0][0]


class RewardSum:
    """A weighted sum of reward functions, each called in its own way with the columns that it names.

        RewardSum([(correct, 1.0), (short, 0.5)])

    Args:
        parts: (function, weight), or functions alone, of weight 1.

    Raises:
        TypeError, ValueError: no functions, something that is none, weights that are not finite numbers.
    """

    def __init__(self, parts: Iterable) -> None:
        self.parts = [part if isinstance(part, tuple) else (part, 1.0) for part in parts]
        if not self.parts:
            raise ValueError("reward_func must hold one function or more, got none; None takes the rewards of the data")
        for function, weight in self.parts:
            if not callable(function):
                raise TypeError(
                    f"reward_func must hold functions, got {type(function).__name__}; or (function, weight)"
                )
            if as_number(weight) is None or not math.isfinite(weight):
                raise ValueError(f"reward_func must hold finite weights, got {weight!r}; (function, weight)")


def as_reward_function(given: Any) -> Any:
    """One reward function of what the trainer is given: a function, a ``RewardSum``, or a list, which is their sum."""
    return RewardSum(given) if isinstance(given, list | tuple) else given


@dataclass(frozen=True)
class _Call:
    """The call of a reward function, by its signature: as TRL calls one, or with the two lists by position where it
    names them otherwise."""

    function: RewardFunction
    by_name: bool  # prompts=..., completions=...
    main: frozenset[str]  # which of the two it takes by name
    named: frozenset[str]  # columns that it names
    needed: frozenset[str]  # those of them without a default
    takes_all: bool  # **kwargs

    @classmethod
    def of(cls, function: Any) -> "_Call":
        module = isinstance(function, torch.nn.Module)  # whose __call__ takes anything
        try:
            parameters = inspect.signature(function.forward if module else function).parameters
        except (TypeError, ValueError):  # written in C
            return cls(function, False, frozenset(), frozenset(), frozenset(), False)
        kinds = inspect.Parameter
        takes_all = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
        by_position = [p for p in parameters.values() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        rest = any(p.kind is kinds.VAR_POSITIONAL for p in parameters.values())
        by_name = "completions" in parameters and parameters["completions"].kind is not kinds.POSITIONAL_ONLY
        by_name = by_name or (takes_all and len(by_position) < 2 and not rest)  # the completions are in **kwargs
        taken = set(_MAIN) if by_name else {p.name for p in by_position[:2]}
        named = [p for p in (*by_position, *(p for p in parameters.values() if p.kind is kinds.KEYWORD_ONLY))]
        named = [p for p in named if p.name not in taken and p.kind is not kinds.POSITIONAL_ONLY]
        return cls(
            function,
            by_name,
            frozenset(name for name in _MAIN if takes_all or name in parameters),
            frozenset(p.name for p in named),
            frozenset(p.name for p in named if p.default is kinds.empty),
            takes_all,
        )

    def columns(self, available: Iterable[str]) -> list[str]:
        """The columns that it is given, of those that the rows have.

        Raises:
            ValueError: it needs one that no row has.
        """
        available = [
            name for name in available if isinstance(name, str) and name not in (*_MAIN, "prompt", "completion")
        ]
        if missing := sorted(self.needed - set(available)):
            raise ValueError(
                f"reward function: needs a column {missing[0]!r} in the data, got {key_names(available)}; add it to "
                "the rows, or give the argument a default"
            )
        return [name for name in available if self.takes_all or name in self.named]

    def __call__(self, prompts: list, completions: list, columns: dict[str, list]):
        if not self.by_name:
            return self.function(prompts, completions, **columns)
        main = {"prompts": prompts, "completions": completions}
        return self.function(**{name: main[name] for name in _MAIN if name in self.main}, **columns)


def columns_of(example: Example, function: RewardFunction | None) -> dict:
    """The columns of a prompt's row for a reward function: those that it names, and with **kwargs those that no form
    knows."""
    if function is None or not example.columns:
        return {}
    if isinstance(function, RewardSum):
        return {key: value for part, _ in function.parts for key, value in columns_of(example, part).items()}
    call, own = _Call.of(function), example.columns[0]
    return {
        name: value
        for name, value in own.items()
        if name in call.named or (call.takes_all and name not in FORM_KEYS and isinstance(name, str))
    }


def apply_reward_function(
    function: RewardFunction,
    examples: Sequence[Example],
    args=None,
    completion_ids: Callable[[int], list[int]] | None = None,
    *,
    shared: bool = False,
) -> list[Example]:
    """New examples with the function's rewards in place of those in the data. It is called on whole prompts, up to 64
    rows at a time.

    args: the TrainingArguments; with them a progress bar is shown. completion_ids: the token ids of a completion by its
    number, for a function that takes them. shared: the ranks hold the same examples; each row is scored on one of them,
    so that all of them have the same reward.

    Raises:
        ValueError: a function that needs a column which no row has. DataError: rows for which it raises, or returns
            something other than one finite number; a wrong number of results.
    """
    if isinstance(function, RewardSum):
        options: Any = {"shared": shared}
        parts = [apply_reward_function(part, examples, args, completion_ids, **options) for part, _ in function.parts]
        weights = [weight for _, weight in function.parts]

        def total(*rewards: float) -> float:
            return sum(weight * reward for weight, reward in zip(weights, rewards, strict=True))

        return [
            replace(example, rewards=[total(*row) for row in zip(*(part[i].rewards for part in parts), strict=True)])
            for i, example in enumerate(examples)
        ]
    call = _Call.of(function)
    found = dict.fromkeys(key for example in examples for columns in example.columns for key in columns)
    found.pop("completion_ids", None)
    names = call.columns([*found, *(["completion_ids"] if completion_ids is not None else [])])
    rows, sizes = [], []
    for example in examples:
        columns = example.columns or [{}] * len(example.completions)
        for completion, where, own in zip(example.completions, example.where, columns, strict=True):
            rows.append(_Row(example.prompt, completion, where, own, len(rows)))
        sizes.append(len(example.completions))
    rank, size = rank_and_size() if shared else (0, 1)
    chunks = list(_chunks(sizes))[rank::size]

    def value(row: _Row, name: str):
        return completion_ids(row.number) if name == "completion_ids" else row.columns.get(name)

    def score() -> list[tuple[int, float]]:
        rewards, problems = [], []
        with progress_bar(args, "rewards", sum(stop - start for start, stop in chunks), "completion") as advance:
            for start, stop in chunks:
                chunk = rows[start:stop]
                columns = [{name: value(row, name) for name in names} for row in chunk]
                for row, made in zip(chunk, _values(call, chunk, columns), strict=True):
                    if (number := _number(made)) is None:
                        reason = f"the reward function must return finite fp32 numbers, got {made!r:.60}"
                        problems.append(Problem(row.where, reason))
                    else:
                        rewards.append((row.number, number))
                advance(len(chunk))
        if problems:
            raise DataError(problems, remedy=_REMEDY)
        return rewards

    values = (number for _, number in sorted(in_shares(score) if shared else score()))
    return [replace(example, rewards=[next(values) for _ in example.completions]) for example in examples]


class _Row(NamedTuple):
    prompt: Text
    completion: Text
    where: str
    columns: dict
    number: int


def _chunks(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of at most 64 rows: whole prompts, unless one has more completions. A reward model cuts the equal
    prompts of a call alike."""
    start = stop = 0
    for size in sizes:
        if stop > start and stop + size - start > _CHUNK:
            yield start, stop
            start = stop
        stop += size
        while stop - start > _CHUNK:
            yield start, start + _CHUNK
            start += _CHUNK
    if stop > start:
        yield start, stop


def _values(call: _Call, chunk: list[_Row], columns: list[dict]) -> list:
    """One value for each row of the chunk.

    Raises:
        DataError: the function raises, or returns something else.
    """

    def called(size: int, first: int = 0):
        rows, own = chunk[first : first + size], columns[first : first + size]
        given = {name: [row[name] for row in own] for name in columns[0]}
        return call([row.prompt for row in rows], [row.completion for row in rows], given)

    try:
        values = called(len(chunk))
    except Exception as error:
        raise DataError([_failure(called, chunk, error)], remedy=_REMEDY) from error
    of_no_order = isinstance(values, str | bytes | Mapping | Set) or getattr(values, "ndim", 1) == 0
    if of_no_order or not hasattr(values, "__len__") or len(values) != len(chunk):
        came = type(values).__name__ if of_no_order or not hasattr(values, "__len__") else f"{len(values)}"
        reason = f"the reward function must return one float each for {len(chunk)} rows from here on, got {came}"
        raise DataError([Problem(chunk[0].where, reason)], remedy="return a list with one float per completion")
    return list(values)


def _failure(called: Callable, chunk: list[_Row], error: Exception) -> Problem:
    """The first row on which the function raises alone, else the whole chunk; a service that did not answer (OSError)
    is not called again."""
    number, many = 0, ""
    if len(chunk) > 1:
        many = f" on {len(chunk)} rows from here on"
        try:
            for number in [] if isinstance(error, OSError) else range(len(chunk)):
                called(1, number)
            number = 0
        except Exception as alone:
            error, many = alone, ""
    return Problem(chunk[number].where, f"the reward function raised {type(error).__name__}{many}: {error}")


def _number(value: object) -> float | None:
    """A judgement, True or False, is 1 or 0."""
    number = as_number(value)
    if number is None and not isinstance(value, str) and (label := as_label(value)) is not None:
        number = float(label)
    return number if number is not None and abs(number) <= MAX_REWARD else None
