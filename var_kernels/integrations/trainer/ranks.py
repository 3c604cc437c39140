"""Work that the ranks share: what one of them finds or refuses, all of them do."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from var_kernels.integrations.data import DataError


def rank_and_size() -> tuple[int, int]:
    """This rank's number and the number of ranks, (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _of_all_ranks(value: Any) -> list:
    """Every rank's value, in the order of the ranks, on every rank."""
    found = [value] * rank_and_size()[1]
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def of_first_rank(value: Any, device: torch.device) -> Any:
    """The first rank's value on every rank: hashes of weights that only it has, a calibration."""
    if rank_and_size()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=device if device.type != "cpu" else None)
    return box[0]


def together(work: Callable) -> Any:
    """``work()`` on every rank; if it fails on one, all stop, with the same message."""
    rank, size = rank_and_size()
    if size == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    says = getattr(failure, "remedy", f"{failure}")
    mine = None if failure is None else (rank, getattr(failure, "problems", None), says)
    failures = [entry for entry in _of_all_ranks(mine) if entry is not None]
    if not failures:
        return result
    if failure is not None and not isinstance(failure, DataError):
        raise failure
    problems = [problem for _, found, _ in failures for problem in found or []]
    if problems:
        raise DataError(problems, remedy=failures[0][2]) from failure
    raise RuntimeError(f"rank {failures[0][0]} failed: {failures[0][2]}")


def in_shares(work: Callable[[], list]) -> list:
    """The lists that ``work()`` returns on the ranks, one after the other, on every rank; failures as ``together``."""
    return [entry for share in _of_all_ranks(together(work)) for entry in share]


def check_same_rows(fingerprint: str, name: str) -> None:
    """Refuse a set of which the ranks hold other rows: each takes its share of the same ones, by number.

    Raises:
        ValueError: on every rank.
    """
    found = _of_all_ranks(fingerprint)
    if others := [rank for rank, text in enumerate(found) if text != found[0]]:
        raise ValueError(
            f"{name} must hold the same rows in the same order on every rank, which takes its share of them by number, "
            f"got other ones on rank {others[0]} than on rank 0; seed what shuffles or draws them, or read one file"
        )
