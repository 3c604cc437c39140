"""What ``var_weights`` refuses, by name and with the remedy. Metadata everywhere; values on the CPU only."""

from typing import Literal, get_args

from torch import Tensor

from var_kernels.losses.checks import INTEGERS, check_choice

Normalizer = Literal["batch", "batch_mean", "cross", "group", "self_normalised"]
Reference = Literal["sum", "mean", "none"]
NORMALIZERS: tuple[str, ...] = get_args(Normalizer)
REFERENCES: tuple[str, ...] = get_args(Reference)


def check_options(lam: float, normalizer: str, reference: str | None) -> str:
    """Refuse options that are wrong by themselves; returns the reference term with None resolved."""
    if isinstance(lam, bool) or not isinstance(lam, (int, float)):
        raise TypeError(f"lam must be a Python number > 0, got {type(lam).__name__}; pass lam=float(...)")
    if not lam > 0:
        raise ValueError(f"lam must be > 0 (reward units), got {lam}; negate the rewards to minimise them")
    check_choice("normalizer", normalizer, NORMALIZERS)
    if reference is not None:
        check_choice("reference", reference, REFERENCES)
    if normalizer != "self_normalised":
        return reference or "sum"
    if reference in ("sum", "mean"):
        raise ValueError(
            f"reference must be 'none' for normalizer='self_normalised', got {reference!r}; drop it, or take "
            "normalizer='group' to weigh by the reference as well"
        )
    return "none"


def check_tensors(rewards, ref_logp, normalizer: str, reference: str, lengths, group_ids, process_group) -> None:
    """Refuse missing arguments and wrong dtypes, shapes and devices."""
    cross = normalizer == "cross"
    _check_floating("rewards", rewards)
    if rewards.dim() != 1 and not (cross and rewards.dim() == 2):
        remedy = "flatten prompts x completions and say which is whose with group_ids"
        allowed = "(B,) or (B, B)" if cross else "(B,), one per sequence"
        raise ValueError(f"rewards must be {allowed}, got shape {tuple(rewards.shape)}; {remedy}")
    rows = rewards.shape[0]
    if rows == 0 and process_group is None:
        raise ValueError("rewards must hold at least one sequence, got an empty batch; skip the step")
    # over several ranks the columns of "cross" are known only after a collective, and are checked there
    pairwise = (rows, rows if process_group is None else None)
    if cross and rewards.dim() == 2:
        _check_like("rewards", rewards, pairwise, rewards)
    if reference != "none":
        if ref_logp is None:
            wanted = "(B, B) scores" if cross else "(B,) sequence sums"
            raise ValueError(f"ref_logp must be given for reference={reference!r}; pass {wanted}, or reference='none'")
        _check_floating("ref_logp", ref_logp)
        _check_like("ref_logp", ref_logp, pairwise if cross else (rows,), rewards)
    if reference == "mean" and lengths is None:
        raise ValueError(
            "lengths must be given for reference='mean', which divides by them; pass the token counts (B,)"
        )
    if normalizer == "group" and group_ids is None:
        raise ValueError("group_ids must be given for normalizer='group'; pass (B,) ids, equal for the same prompt")
    for name, values in (("lengths", lengths), ("group_ids", group_ids)):
        if values is None:
            continue
        if not isinstance(values, Tensor) or values.dtype not in INTEGERS:
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"{name} must be an integer tensor (B,), got {got}; use .long()")
        _check_like(name, values, (rows,), rewards)


def bad_values(rewards: Tensor, ref_logp: Tensor | None, lengths: Tensor | None) -> str | None:
    """The message for NaN, infinities and negative lengths on the CPU; None where all is well or unread."""
    if rewards.device.type != "cpu":
        return None
    for name, values in (("rewards", rewards), ("ref_logp", ref_logp)):
        if values is not None and not values.isfinite().all():
            first = tuple((~values.isfinite()).nonzero()[0].tolist())
            return f"{name} must be finite, got {values[first].item()} at index {first}; repair or drop that sequence"
    if lengths is not None and (lengths < 0).any():
        return f"lengths must be >= 0, got {int(lengths.min())}; count the labels that carry loss (sequence_lengths)"
    return None


def _check_floating(name: str, values) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}; use torch.tensor(...)")
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {values.dtype}; use {name}.float()")


def _check_like(name: str, values: Tensor, shape: tuple[int | None, ...], rewards: Tensor) -> None:
    """Shape (None: any size) and the device of rewards."""
    fits = values.dim() == len(shape) and all(
        want in (None, got) for got, want in zip(values.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("B_global" if size is None else str(size) for size in shape)
        remedy = "sum tokens with sequence_sum first" if values.dim() > len(shape) else "pass one row per sequence"
        raise ValueError(
            f"{name} must be ({wanted}) beside rewards {tuple(rewards.shape)}, got {tuple(values.shape)}; {remedy}"
        )
    if values.device != rewards.device:
        raise ValueError(f"{name} must be on {rewards.device} like rewards, got {values.device}; move it there")
