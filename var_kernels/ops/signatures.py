"""Types of the options that the ops over the head share: a type checker then knows each option's name and values, and
whether a call returns one tensor or a tuple."""

from typing import Literal, TypedDict, get_args

from torch import Tensor

Precision = Literal["fp32", "fast"]
Reduction = Literal["sum", "mean", "none"]
Engine = Literal["auto", "one_pass", "two_pass"]
Direction = Literal["reverse", "forward"]

PRECISIONS: tuple[str, ...] = get_args(Precision)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
ENGINES: tuple[str, ...] = get_args(Engine)
DIRECTIONS: tuple[str, ...] = get_args(Direction)


class HeadKeywords(TypedDict, total=False):
    """Options of every op."""

    logit_scale: float
    softcap: float | None
    temperature: float
    low_rank: tuple[Tensor, Tensor] | None
    num_active: int | None
    workspace_mb: float | None
    precision: Precision


class LogprobKeywords(HeadKeywords, total=False):
    ignore_index: int
    label_smoothing: float


class TokenLossKeywords(HeadKeywords, total=False):
    ignore_index: int
    entropy: bool
    engine: Engine


class VARHeadKeywords(HeadKeywords, total=False):
    """What ``var_loss`` hands on to ``linear_weighted_nll``."""

    label_smoothing: float
    z_loss: float
    engine: Engine


class WeightedNLLKeywords(VARHeadKeywords, total=False):
    ignore_index: int
    reduction: Reduction
    num_items: float | Tensor | None
