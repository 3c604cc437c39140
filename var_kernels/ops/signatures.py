"""Options that the ops over the head share, declared once: names, types and defaults. A type checker, ``help`` and
``inspect.signature`` show them for each op.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, get_args

from torch import Tensor
from typing_extensions import get_type_hints

Precision = Literal["fp32", "fast"]
Reduction = Literal["sum", "mean", "none"]
Engine = Literal["auto", "one_pass", "two_pass"]
Direction = Literal["reverse", "forward", "jsd"]

PRECISIONS: tuple[str, ...] = get_args(Precision)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
ENGINES: tuple[str, ...] = get_args(Engine)
DIRECTIONS: tuple[str, ...] = get_args(Direction)

Op = TypeVar("Op", bound=Callable[..., Any])


class HeadKeywords(TypedDict, total=False):
    """Options of the head and of the run."""

    logit_scale: float
    softcap: float | None
    temperature: float
    low_rank: tuple[Tensor, Tensor] | None
    num_active: int | None
    workspace_mb: float | None
    precision: Precision


class RowKeywords(HeadKeywords, total=False):
    """Options of every op."""

    ignore_index: int


class LogprobKeywords(RowKeywords, total=False):
    label_smoothing: float


class TokenLossKeywords(RowKeywords, total=False):
    entropy: bool
    engine: Engine


class VARHeadKeywords(HeadKeywords, total=False):
    """Options that ``var_loss`` hands on to ``linear_weighted_nll``."""

    label_smoothing: float
    z_loss: float
    engine: Engine


class WeightedNLLKeywords(VARHeadKeywords, total=False):
    ignore_index: int
    reduction: Reduction
    num_items: float | Tensor | None


DEFAULTS: LogprobKeywords = {
    "ignore_index": -100,
    "logit_scale": 1.0,
    "softcap": None,
    "temperature": 1.0,
    "label_smoothing": 0.0,
    "low_rank": None,
    "num_active": None,
    "workspace_mb": None,
    "precision": "fp32",
}


def names_options(op: Op) -> Op:
    """The op itself, its ``**options: Unpack[...]`` shown by name, type and default."""
    signature = inspect.signature(op)
    *named, options = signature.parameters.values()
    (keywords,) = get_args(options.annotation)
    types = get_type_hints(keywords)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
        for name, default in DEFAULTS.items()
        if name in types
    ]
    vars(op)["__signature__"] = signature.replace(parameters=[*named, *shared])
    return op
