"""Checks of the losses' arguments, with the remedy in each error. Metadata everywhere; values on the CPU only."""

import math
from collections.abc import Collection
from typing import Literal, get_args

import torch
from torch import Tensor

from var_kernels.ops.checks import check_choice, values_readable

TokenReduction = Literal["sum", "mean"]
TOKEN_REDUCTIONS: tuple[str, ...] = get_args(TokenReduction)


def wide(values: Tensor) -> Tensor:
    """fp32 at least: bf16 sums of hundreds of nats are off by whole nats, so differences are never formed in it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def times(weight: float | Tensor, values: Tensor) -> Tensor:
    """weight * values, and 0 where the weight is 0, also of -inf: the log-prob of a label that the policy forbids."""
    if isinstance(weight, Tensor):
        return (weight * values).where(weight != 0, 0.0)
    return weight * values if weight else torch.zeros_like(values)


def read_rows(item: str = "sequence", learning: Collection[str] = (), **tensors: Tensor) -> list[Tensor]:
    """``wide`` vectors of one shape and device, one entry per ``item``: named after the arguments. All but those that
    are ``learning`` are constants: finite (read on the CPU only), detached.
    """
    size = "P" if item == "pair" else "B"
    check_floating(tensors, f"({size},)", f"pass one value per {item}")
    first, *others = tensors
    shape = tensors[first].shape
    if len(shape) != 1:
        raise ValueError(
            f"{first} must be ({size},), one per {item}, got {tuple(shape)}; sum tokens with sequence_sum first"
        )
    for name in others:
        check_like(name, tensors[name], first, tensors[first])
    check_constants(**{name: values for name, values in tensors.items() if name not in learning})
    return [wide(values if name in learning else values.detach()) for name, values in tensors.items()]


def read_tokens(**tensors: Tensor) -> list[Tensor]:
    """``wide`` tensors of one shape, any, and one device, one value a token; all but the first detached."""
    check_floating(tensors, "(...)", "pass one value a token")
    first, *others = tensors
    for name in others:
        remedy = "give one value a token (expand_to_tokens repeats a sequence's over its tokens)"
        check_like(name, tensors[name], first, tensors[first], remedy)
    return [wide(tensors[first]), *(wide(tensors[name].detach()) for name in others)]


def check_constants(**tensors: Tensor) -> None:
    """Refuse non-finite constants (log-probs of the reference, rewards, values); read on the CPU only."""
    for name, values in tensors.items():
        if values_readable(values) and not values.isfinite().all():
            at = tuple((~values.isfinite()).nonzero()[0].tolist())
            raise ValueError(
                f"{name} must be finite, got {values[at].item()} at index {at}; repair or drop that sequence"
            )


def check_beside(like: str, values: Tensor, kind: str = "integer", **tensors: Tensor) -> None:
    """Vectors of ids, or of another kind, beside ``values``, the argument named ``like``."""
    remedy = "use .long()" if kind == "integer" else "use .bool(), or value > 0"
    for name, others in tensors.items():
        check_kind(name, others, kind, str(tuple(values.shape)), remedy)
        check_like(name, others, like, values)


def per_token(values: Tensor, lengths: Tensor | None, token_reduction: str = "mean", row: str = "") -> Tensor:
    """Sums over tokens as they are ("sum"), or divided by the number of tokens ("mean"); no token counts as one. row:
    of a pair, "chosen_" or "rejected_".
    """
    name, like = f"{row}lengths", f"policy_{row}logp"
    check_choice("token_reduction", token_reduction, TOKEN_REDUCTIONS)
    if token_reduction == "sum":
        return values
    if lengths is None:
        raise ValueError(
            f"{name} must be {tuple(values.shape)}, one per sequence, for token_reduction='mean', got None; "
            "count the labels of each sequence (sequence_lengths)"
        )
    check_beside(like, values, "integer", **{name: lengths})
    if values_readable(lengths) and (lengths < 0).any():
        raise ValueError(f"{name} must be >= 0, got {int(lengths.min())}; count the labels (sequence_lengths)")
    return values / lengths.clamp(min=1)


def check_range(
    name: str,
    value: float,
    low: float = 0.0,
    high: float = math.inf,
    *,
    closed: bool = False,
    remedy: str = "see the formula for its meaning",
) -> None:
    """low < value < high, finite; ``closed`` admits low itself."""
    _check_python_number(name, value)
    if math.isfinite(value) and value < high and (value > low or (closed and value == low)):
        return
    if high < math.inf:
        wanted = f"in {'[' if closed else '('}{low:g}, {high:g})"
    else:
        wanted = f"finite and {'>=' if closed else '>'} {low:g}"
    raise ValueError(f"{name} must be {wanted}, got {value}; {remedy}")


def check_share(name: str, value: float, remedy: str) -> None:
    """0 <= value <= 1."""
    _check_python_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}; {remedy}")


def _check_python_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}; pass {name}=float(...)")


def check_like(name: str, values: Tensor, like: str, first: Tensor, remedy: str = "one entry for each row") -> None:
    """The shape and device of ``first``, the argument named ``like``."""
    if values.shape != first.shape:
        raise ValueError(f"{name} must be {tuple(first.shape)} like {like}, got {tuple(values.shape)}; {remedy}")
    if values.device != first.device:
        raise ValueError(f"{name} must be on {first.device} like {like}, got {values.device}; move it there")


def check_floating(tensors: dict[str, Tensor], shape: str, remedy: str) -> None:
    for name, values in tensors.items():
        check_kind(name, values, "floating-point", shape, remedy)


_DTYPES = {"integer": (torch.int64, torch.int32, torch.int16, torch.int8), "bool": (torch.bool,)}


def check_kind(name: str, values: Tensor, kind: str, shape: str, remedy: str) -> None:
    """A tensor of a kind of dtypes, a key of ``_DTYPES`` or "floating-point"; the shape is for the message."""
    fits = isinstance(values, Tensor) and (
        values.is_floating_point() if kind == "floating-point" else values.dtype in _DTYPES[kind]
    )
    if not fits:
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        article = "an" if kind == "integer" else "a"
        raise TypeError(f"{name} must be {article} {kind} tensor {shape}, got {got}; {remedy}")
