"""Rewards from a function of the user's: ``function(prompts, completions) -> list of floats``."""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from var_kernels.integrations.data import DataError, Example, Problem
from var_kernels.integrations.trainer.progress import progress_bar

RewardFunction = Callable[[list, list], Sequence[float]]
_CHUNK = 64


def load_reward_function(spec: str) -> RewardFunction:
    """The function named by "module:function", looked for in the current directory too.

    Raises:
        ValueError: not of that form, no such module or function, or not callable.
    """
    module_name, colon, name = spec.partition(":")
    if not (colon and module_name and name):
        raise ValueError(f"reward: expected module:function, got {spec!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # where the command is run, as for `python -m`
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"reward: module {module_name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward: module {module_name!r} has no function {name!r}")
    return function


def apply_reward_function(function: RewardFunction, examples: Sequence[Example], args=None) -> list[Example]:
    """New examples with the function's rewards in place of those in the data. It is called on up to 64 rows at a time.

    args: the TrainingArguments; with them a progress bar is shown.

    Raises:
        DataError: rows for which it raises, or returns something other than one finite number; a wrong number of
            results.
    """
    rows = [
        (ex.prompt, completion, where)
        for ex in examples
        for completion, where in zip(ex.completions, ex.where, strict=True)
    ]
    rewards, problems = [], []
    with progress_bar(args, "rewards", len(rows), "completion") as advance:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            for (_, _, where), value in zip(chunk, _call(function, chunk), strict=True):
                if isinstance(value, Exception):
                    problems.append(Problem(where, f"the reward function raised {type(value).__name__}: {value}"))
                elif (number := _number(value)) is None:
                    reason = f"the reward function must return finite numbers, got {value!r:.60}"
                    problems.append(Problem(where, reason))
                else:
                    rewards.append(number)
            advance(len(chunk))
    if problems:
        raise DataError(problems, remedy="the reward function fails on these rows")
    values = iter(rewards)
    return [replace(example, rewards=[next(values) for _ in example.completions]) for example in examples]


def _call(function: RewardFunction, chunk: list[tuple]) -> list:
    """One value, or the exception, for each row of the chunk."""
    try:
        values = function([prompt for prompt, _, _ in chunk], [completion for _, completion, _ in chunk])
    except Exception as error:
        # Which row was it? One by one; where every row alone succeeds, the chunk itself is at fault.
        if len(chunk) == 1:
            return [error]
        alone = [_call(function, [row])[0] for row in chunk]
        return alone if any(isinstance(value, Exception) for value in alone) else [error] * len(chunk)
    if isinstance(values, str | bytes) or not hasattr(values, "__len__") or len(values) != len(chunk):
        came = f"{len(values)} of them" if hasattr(values, "__len__") else type(values).__name__
        raise DataError(
            [Problem(chunk[0][2], f"for {len(chunk)} rows from here on it returned {came}")],
            remedy="the reward function must return a list with one float per completion",
        )
    return list(values)


def _number(value: object) -> float | None:
    if isinstance(value, bool | str | bytes):
        return float(value) if isinstance(value, bool) else None
    try:
        number = float(value)  # also 0-d tensors and numpy scalars
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
