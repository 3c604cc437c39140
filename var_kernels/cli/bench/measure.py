"""Timing of every loss in turns, in one process, with the bare GEMMs beside them; exact peak memory."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from var_kernels.measure import peak_extra_bytes

MODES = ("training", "frozen head", "scoring")
# GEMMs that a mode cannot do without: logits; the gradient in hidden; that in the weight.
GEMMS = {"training": 3, "frozen head": 2, "scoring": 1}
BARE = "bare GEMMs"
_MIB = 1 << 20
_SAMPLE = 128  # rows whose loss is compared with fp64
_ROUNDS = (3, 25)
# Logits, log-softmax and two gradients in fp32, of a loss that makes them all.
_PLAIN_BYTES = 12


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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Operands:
    """Random hidden states (N, D) and weight (V, D) whose logits have standard deviation 3; labels (N,), of which the
    share ``masked`` is ignored.
    """

    def __init__(self, tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device, masked: float):
        draw = torch.Generator(device).manual_seed(0)
        options = {"generator": draw, "device": device}
        self.hidden = torch.randn(tokens, hidden, **options).to(dtype).requires_grad_()
        # Slices, so that the fp32 draws of a large head take no more than its rows.
        self.weight = torch.empty(vocab, hidden, dtype=dtype, device=device)
        for rows in self.weight.split(16384):
            rows.copy_(torch.randn(rows.shape, **options) * (3 * hidden**-0.5))
        self.weight.requires_grad_()
        self.labels = torch.randint(vocab, (tokens,), **options)
        self.labels[: int(masked * tokens)] = -100

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
    seconds: float,
    free_bytes: int | None,
    advance: Callable[[str], None],
) -> list[Row]:
    """A row for each mode and loss, the bare GEMMs first. ``advance`` is called before each piece of work, with its
    name before a first run, with "" before a timing.
    """
    started = time.perf_counter()
    n, vocab = len(operands.hidden), len(operands.weight)
    logits_bytes = _PLAIN_BYTES * n * vocab
    rows: dict[tuple[str, str], Row] = {}
    calls: dict[tuple[str, str], Callable] = {}
    errors: dict[str, float] = {}
    for mode in MODES:
        rows[BARE, mode], calls[BARE, mode] = Row(BARE, mode), operands.bare_gemms(mode)
        calls[BARE, mode]()
        for name, loss in sides.items():
            advance(f"{name}, {mode}")
            row = rows[name, mode] = Row(name, mode)
            if free_bytes is not None and not name.startswith("var_kernels") and logits_bytes > free_bytes:
                row.note = f"not run: all logits need about {logits_bytes / 2**30:.0f} GiB"
                continue
            call = operands.call(loss, mode)
            try:
                call()
                row.peak_mib = peak_extra_bytes(call, operands.hidden.device) / _MIB
                errors[name] = row.error = errors[name] if name in errors else operands.error(loss)
            except torch.OutOfMemoryError:
                row.note = "out of memory"
            except Exception as error:  # one failure must not end the run
                row.note = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            else:
                calls[name, mode] = call
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in _rounds(started, seconds):
        for key, call in calls.items():
            advance("")
            times[key].append(_timed(call, operands.hidden.device))
    for key, values in times.items():
        ordered, row = sorted(values), rows[key]
        row.ms, row.p20 = statistics.median(ordered), ordered[len(ordered) // 5]
        row.p80 = ordered[-1 - len(ordered) // 5]
        row.tokens_per_second = 1e3 * n / row.ms
        row.percent_of_gemms = 100 * statistics.median(times[BARE, row.mode]) / row.ms
    return list(rows.values())


def _rounds(started: float, seconds: float) -> Iterator[int]:
    """Yield as many rounds as end in time; at least three."""
    least, most = _ROUNDS
    for number in range(most):
        began = time.perf_counter()
        yield number
        now = time.perf_counter()
        if number + 1 >= least and now + (now - began) - started > seconds:
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
