"""Checks of ``var_weights``' arguments, and the warning about rewards that move no weight.
Metadata everywhere; values on the CPU only."""

import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from var_kernels.losses.checks import INTEGERS, check_choice, values_readable
from var_kernels.losses.segments import group_rows

Normalizer = Literal["batch", "batch_mean", "cross", "group", "self_normalised"]
Reference = Literal["sum", "mean", "none"]
NORMALIZERS: tuple[str, ...] = get_args(Normalizer)
REFERENCES: tuple[str, ...] = get_args(Reference)
DEFAULT_NORMALIZER: Normalizer = "self_normalised"
DEFAULT_REFERENCE: Reference = "none"  # here, in VARLoss and in VARConfig: docs/var.md
MIN_REWARD_SPREAD = 1e-3  # of r / lam, largest less smallest: below it weights differ by a thousandth at most


class IgnoredRewardsWarning(UserWarning):
    """The rewards of a batch have no effect on its weights, or advantages."""


def check_options(lam: float, normalizer: str, reference: str | None, ref_logp: Tensor | None = None) -> str:
    """Refuse options that are wrong by themselves; returns the reference term with None resolved."""
    if isinstance(lam, bool) or not isinstance(lam, (int, float)):
        raise TypeError(f"lam must be a Python number > 0, got {type(lam).__name__}; pass lam=float(...)")
    if not lam > 0:
        raise ValueError(f"lam must be > 0 (reward units), got {lam}; negate the rewards to minimise them")
    check_choice("normalizer", normalizer, NORMALIZERS)
    if reference is not None:
        check_choice("reference", reference, REFERENCES)
    elif ref_logp is not None:
        remedy = "normalizer='group' or 'batch' with " if normalizer == "self_normalised" else ""
        raise ValueError(
            f"reference must be given with ref_logp, got None, which is {DEFAULT_REFERENCE!r} and reads none; "
            f"leave ref_logp out, or weigh by it: {remedy}reference='mean' or 'sum'"
        )
    if normalizer == "self_normalised" and reference in ("sum", "mean"):
        raise ValueError(
            f"reference must be 'none' for normalizer='self_normalised', got {reference!r}; drop it, or take "
            "normalizer='group' or 'batch' to weigh by the reference as well"
        )
    return reference or DEFAULT_REFERENCE


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


def warn_if_rewards_ignored(
    rewards: Tensor, *, lam: float = 1.0, lengths: Tensor | None = None, group_ids: Tensor | None = None
) -> bool:
    """Warn (IgnoredRewardsWarning) where no reward of the batch can move a weight, plain SFT; True if it did.

    Z is taken over the batch, or over each group: a sequence that is alone there has the weight 1 whatever its reward,
    and so have sequences of equal rewards, or of rewards that differ by less than a thousandth of lam. Not warned about
    where that is so in some of the groups only. Reads values on the host: for CUDA tensors, where ``var_weights`` sees
    no more than the number of rows, call it where metrics are logged.

    Args:
        rewards: (B,), or (B, B) for "cross"; lam: as given to ``var_weights``; lengths, group_ids: (B,), likewise.
    """
    reward = rewards.detach().double()
    kept = torch.ones_like(reward, dtype=torch.bool) if lengths is None else (lengths > 0).expand_as(reward)
    high, low = reward.masked_fill(~kept, -torch.inf), (-reward).masked_fill(~kept, -torch.inf)
    if group_ids is None:
        size, spread = kept.sum(-1), high.amax(-1) + low.amax(-1)
    else:
        groups = group_rows(group_ids)
        size, spread = groups.sum(kept.double()), groups.max(high) + groups.max(low)
    if not kept.any() or (spread >= MIN_REWARD_SPREAD * lam).any():
        return False
    place = "the batch" if group_ids is None else "every group"
    alone = bool((size <= 1).all())
    if alone:
        reason = f"{place} has one sequence, whose weight does not depend on its reward"
    elif (spread <= 0).all():
        reason = f"they are equal within {place}"
    else:
        reason = f"within {place} they differ by less than {MIN_REWARD_SPREAD:g} lam, lam={lam:g}"
    if not alone:
        remedy = "give rewards that tell the sequences apart" + ("" if lam == 1.0 else ", or lower lam")
    elif group_ids is None:
        remedy = "weigh the sequences of the whole optimiser step together"
    else:
        remedy = "give several completions a prompt, or compare sequences of different prompts: no group_ids"
    _warn_ignored(reason, remedy)
    return True


def warn_if_alone(rewards: Tensor) -> None:
    """Check a batch whose values are not read, by metadata alone."""
    if not values_readable(rewards) and rewards.shape[0] == 1:
        _warn_ignored(
            "the batch has one sequence, whose weight does not depend on its reward",
            "weigh the sequences of the whole optimiser step together",
        )


def warn_if_advantages_vanish(deviation: Tensor, reward_B: Tensor, compared: str) -> None:
    """Warn (IgnoredRewardsWarning) where every advantage is 0 up to rounding; read on the CPU only.

    deviation: of the rewards from the mean that they are compared with, any shape; compared: over what it was taken.
    """
    if not (values_readable(deviation) and values_readable(reward_B)) or not reward_B.numel():
        return
    if deviation.abs().max() <= 1e-9 * reward_B.abs().max():
        warnings.warn(
            f"rewards have no effect on this batch: each is alone in its {compared} or equal to the others there, and "
            "its advantage is 0; give several completions with different rewards.",
            IgnoredRewardsWarning,
            stacklevel=3,
        )


def _warn_ignored(reason: str, remedy: str) -> None:
    warnings.warn(
        f"rewards have no effect on this batch: {reason}. Its loss is that of equal rewards, which without a reference "
        f"term is plain SFT; {remedy} (docs/var.md).",
        IgnoredRewardsWarning,
        stacklevel=4,
    )


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
