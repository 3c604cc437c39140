"""Timing of every loss in turns, in one process, with the bare GEMMs beside them; exact peak memory."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from var_kernels.cli.bench.sides import OURS, OURS_ANY, PLAIN
from var_kernels.cli.memory import PLAIN_BYTES
from var_kernels.measure import peak_extra_bytes

MODES = ("training", "frozen head", "scoring")
# GEMMs that a mode cannot do without: logits; the gradient in hidden; that in the weight.
GEMMS = {"training": 3, "frozen head": 2, "scoring": 1}
BARE = "bare GEMMs"
_MIB = 1 << 20
_SAMPLE = 128  # rows whose loss is compared with fp64
_MOST_ROUNDS = 25
# What a loss needs that is to be shown: a first call, one for its memory, its error, one in a round.
_CALLS = 3.5
# Guesses before a first call: seconds of processor time to compile; times of the bare GEMMs, at most and in the mean.
_COMPILATION, _SLOWEST, _USUAL = 20.0, 4.0, 2.0
_FEWEST = 128
_NO_TIME = "not run: no time left; give more --seconds"


@dataclass
class Row:
    """One loss in one mode. ms: median of the rounds, with p20 and p80; peak_mib: above the operands, with the returned
    gradients; error: of the loss of 128 rows, relative to fp64; note: why there are no figures.
    """

    side: str
    mode: str
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    tokens_per_second: float | None = None
    percent_of_gemms: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    note: str = ""


class Operands:
    """Random hidden states (N, D) and weight (V, D) whose logits have standard deviation 3; labels (N,), of which the
    share ``masked`` is ignored.
    """

    def __init__(self, tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device, masked: float):
        draw = torch.Generator(device).manual_seed(0)
        options: Any = {"generator": draw, "device": device}
        self._hidden = torch.randn(tokens, hidden, **options).to(dtype)
        # Slices, so that the fp32 draws of a large head take no more than its rows.
        self.weight = torch.empty(vocab, hidden, dtype=dtype, device=device)
        for rows in self.weight.split(16384):
            rows.copy_(torch.randn(rows.shape, **options) * (3 * hidden**-0.5))
        self.weight.requires_grad_()
        self._labels, self._masked = torch.randint(vocab, (tokens,), **options), masked
        self._keep(tokens)

    def shorten(self, sides: int, deadline: float) -> None:
        """Keep as many rows, at least 128, as let that many losses be timed twice in every mode before ``deadline``."""
        if len(self.labels) <= _FEWEST:
            return
        tokens = len(self.labels)
        self._keep(_FEWEST)
        gemms = self.bare_gemms(MODES[0])
        _timed(gemms, self.hidden.device)
        probe = _timed(gemms, self.hidden.device) / 1e3
        modes = sum(GEMMS.values()) / GEMMS[MODES[0]]
        needed = probe * modes * (1 + _USUAL * sides) * (_CALLS + 1)
        left = deadline - time.perf_counter() - _COMPILATION
        self._keep(min(tokens, max(1, int(left / needed)) * _FEWEST))

    def _keep(self, rows: int) -> None:
        self.hidden = self._hidden[:rows].clone().requires_grad_()
        self.labels = self._labels[:rows].clone()
        self.labels[: int(self._masked * rows)] = -100

    def call(self, loss: Callable, mode: str) -> Callable[[], object]:
        frozen = self.weight.detach()
        if mode == "training":
            return lambda: torch.autograd.grad(loss(self.hidden, self.weight, self.labels), (self.hidden, self.weight))
        if mode == "frozen head":
            return lambda: torch.autograd.grad(loss(self.hidden, frozen, self.labels), self.hidden)

        def score() -> Tensor:
            with torch.no_grad():
                return loss(self.hidden, frozen, self.labels)

        return score

    def bare_gemms(self, mode: str) -> Callable[[], object]:
        """The products alone, in the operands' dtype; their logits are rounded and there is no loss."""
        hidden, weight = self.hidden.detach(), self.weight.detach()

        def run() -> None:
            logits = hidden @ weight.t()
            if mode != "scoring":
                torch.mm(logits, weight)
            if mode == "training":
                torch.mm(logits.t(), hidden)

        return run

    def error(self, loss: Callable) -> float:
        """Relative error of the loss of the last rows against fp64."""
        rows = slice(-min(_SAMPLE, len(self.hidden)), None)
        hidden, labels = self.hidden.detach()[rows], self.labels[rows]
        logits = hidden.cpu().double() @ self.weight.detach().cpu().double().t()
        truth = F.cross_entropy(logits, labels.cpu()).item()
        with torch.no_grad():
            return abs(loss(hidden, self.weight.detach(), labels).double().item() - truth) / abs(truth)


def measure(
    operands: Operands,
    sides: dict[str, Callable],
    deadline: float,
    free_bytes: int | None,
    advance: Callable[[str], None],
) -> list[Row]:
    """A row for each mode and loss, the bare GEMMs first.

    ``deadline`` is a time of ``time.perf_counter``: nothing begins that would end after it, by what the same loss took
    before, and what is left out says so. ``advance`` is called before each piece of work, with its name before a first
    run, with "" before a timing.
    """
    n, device = len(operands.hidden), operands.hidden.device
    logits_bytes = PLAIN_BYTES * n * len(operands.weight)
    rows: dict[tuple[str, str], Row] = {}
    calls: dict[tuple[str, str], Callable] = {}
    errors: dict[str, float] = {}
    seconds: dict[str, float] = {}  # of one call, in the last mode
    one_round = 0.0
    began_clock, began_cpu = time.perf_counter(), time.process_time()

    def compilation() -> float:
        """On the clock: beside other processes it takes as much longer as the work so far did."""
        clock, cpu = time.perf_counter() - began_clock, time.process_time() - began_cpu
        return _COMPILATION * max(1.0, clock / cpu if cpu else 1.0)

    def late(more: float) -> bool:
        return time.perf_counter() + more + one_round > deadline

    def obstacle(name: str, mode: str) -> str:
        if name == BARE and not seconds:
            return ""
        if name != BARE and rows[BARE, mode].note:
            return rows[BARE, mode].note
        first = _SLOWEST * seconds.get(BARE, 0.0) + (0.0 if name in (BARE, OURS, OURS_ANY, PLAIN) else compilation())
        if late(_CALLS * seconds[name] if name in seconds else first):
            return _NO_TIME
        if free_bytes is not None and logits_bytes > free_bytes and name not in (BARE, OURS, OURS_ANY):
            return f"not run: all logits need about {logits_bytes / 2**30:.0f} GiB"
        return ""

    for mode in MODES:
        for name, loss in ((BARE, None), *sides.items()):
            advance(f"{name}, {mode}")
            row = rows[name, mode] = Row(name, mode, note=obstacle(name, mode))
            if row.note:
                continue
            call = operands.call(loss, mode) if loss else operands.bare_gemms(mode)
            try:
                seconds[name] = _timed(call, device) / 1e3
                if loss and late((_CALLS - 1) * seconds[name]):
                    row.note = _NO_TIME
                    continue
                if loss:
                    began = time.perf_counter()
                    row.peak_mib = peak_extra_bytes(call, device) / _MIB
                    seconds[name] = min(seconds[name], time.perf_counter() - began)  # the first one may compile
                    errors[name] = row.error = errors[name] if name in errors else operands.error(loss)
            except torch.OutOfMemoryError:
                row.note = "out of memory"
            except Exception as error:  # one failure must not end the run
                row.note = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            else:
                calls[name, mode] = call
                one_round += seconds[name]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in _rounds(deadline):
        for key, call in calls.items():
            advance("")
            times[key].append(_timed(call, device))
    for key, values in times.items():
        ordered, row = sorted(values), rows[key]
        row.ms, row.p20 = statistics.median(ordered), ordered[len(ordered) // 5]
        row.p80 = ordered[-1 - len(ordered) // 5]
        row.tokens_per_second = 1e3 * n / row.ms
        row.percent_of_gemms = 100 * statistics.median(times[BARE, row.mode]) / row.ms
    return list(rows.values())


def _rounds(deadline: float) -> Iterator[int]:
    """Yield as many rounds as end in time, at least one: time for it was kept."""
    for number in range(_MOST_ROUNDS):
        began = time.perf_counter()
        yield number
        now = time.perf_counter()
        if now + (now - began) > deadline:
            return


def _timed(call: Callable, device: torch.device) -> float:
    """Milliseconds on the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - began)
