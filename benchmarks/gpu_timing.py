"""How every GPU section measures: interleaved runs by CUDA events, the bare GEMMs beside them, the allocator's peak."""

import functools
import importlib.metadata
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from var_kernels.measure import peak_extra_bytes

TFLOP, GIGA, MIB = 1e12, 1e9, 2**20
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "trl",
)


# 10 ms at 2 GHz: longer than the launches of a step.
QUEUE_CYCLES = 20_000_000
QUEUED_ROUNDS = 7


@dataclass(frozen=True)
class Item:
    """One measurement. run(bench) gives its rows (without the key); seconds: how long it takes at the floors' rate,
    compilation included; other: another library, whose failure is only noted; rank: 0 for ours at the shapes of the
    bars, 1 for what decides a default and for the few peers, 2 for other shapes, 3 for the rest.
    """

    section: str
    key: str
    run: Callable
    seconds: float
    other: bool = False
    rank: int = 2

    @property
    def limit(self) -> float:
        """After this many seconds it hangs."""
        return 45 + 4 * self.seconds


class Bench:
    """Where to run and how to time. A step returns nothing; one in parts returns a function for the next part."""

    def __init__(self, dry_run: bool, seconds_each: float = 1.0):
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dry_run = dry_run
        self.seconds_each = seconds_each
        self._flush = None if dry_run else torch.empty(256 * MIB, dtype=torch.uint8, device=self.device)

    def once(self, step: Callable, *, queued: bool = False) -> list[float]:
        """Milliseconds of each part of one run: a step may return the part that follows it. queued: the device is busy
        until the step's launches are in its queue: its own time alone is measured, unless it waits for the device.
        """
        if self.dry_run:
            marks = [time.perf_counter()]
            while step is not None:
                step = step()
                marks.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
        self._flush.zero_()
        if queued:
            torch.cuda._sleep(QUEUE_CYCLES)
        marks = [self._mark()]
        while step is not None:
            step = step()
            marks.append(self._mark())
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def times(self, steps: dict[str, Callable]) -> dict[str, list[dict[str, float]]]:
        """Interleaved: every step once a round, 5 to 20 rounds. For each step a {ms, p20, p80, queued_ms} of all its
        parts, then a {ms, p20, p80} of each of them. queued_ms: see ``once``.
        """
        for step in steps.values():
            self.once(step)
        round_ms = sum(sum(self.once(step)) for step in steps.values())
        rounds = 2 if self.dry_run else int(min(20, max(5, 1e3 * self.seconds_each / max(round_ms, 1e-3))))
        found = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                found[name].append(self.once(step))
        queued = {name: [] for name in steps}
        for _ in range(1 if self.dry_run else QUEUED_ROUNDS):
            for name, step in steps.items():
                queued[name].append(sum(self.once(step, queued=True)))
        timings = {}
        for name, runs in found.items():
            whole, *parts = ([sum(run) for run in runs], *zip(*runs, strict=True))
            whole = {**_quantiles(whole), "queued_ms": _quantiles(queued[name])["ms"]}
            timings[name] = [whole, *map(_quantiles, parts)]
        return timings

    def total(self, steps: dict[str, Callable]) -> dict[str, dict[str, float]]:
        """``times`` of the steps in all."""
        return {name: parts[0] for name, parts in self.times(steps).items()}

    def peak_mib(self, step: Callable) -> float:
        """Peak above what is held before; the parts of a step one after the other."""

        def whole():
            part = step
            while part is not None:
                part = part()

        return peak_extra_bytes(whole, self.device) / MIB

    def randn(self, *shape, dtype=torch.bfloat16, scale=1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(dtype)

    @functools.cached_property
    def roof(self) -> float:
        """TFLOP/s of the bf16 GEMM of an 8192 cube, once in this process."""
        size = 64 if self.dry_run else 8192
        left, right = self.randn(size, size), self.randn(size, size)
        ms = self.total({"mm": lambda: _do(torch.mm, left, right.t())})["mm"]["ms"]
        return 2 * size**3 / ms * 1e3 / TFLOP

    def percent_of_roof(self, flop: float, ms: float) -> float:
        return 100 * flop / ms * 1e3 / TFLOP / self.roof


def _do(function, *arguments) -> None:
    function(*arguments)


def _quantiles(ms) -> dict[str, float]:
    values = torch.tensor(ms, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return dict(zip(("ms", "p20", "p80"), values.tolist(), strict=True))


def bare_gemms(count: int, hidden, weight) -> Callable:
    """What no implementation can beat: 1 logits, 2 and dH, 3 and dW, 4 and the logits again; bf16 results."""

    def step():
        with torch.no_grad():
            logits = torch.mm(hidden, weight.t())
            for _ in range(count - 3):
                torch.mm(hidden, weight.t(), out=logits)
            if count >= 2:
                torch.mm(logits, weight)
            if count >= 3:
                torch.mm(logits.t(), hidden)

    return step


_LEFT_OPERAND = {"mm": 0, "addmm": 1, "addmm_": 1}


class _CountProducts(TorchDispatchMode):
    """FLOP of the matrix products that torch is asked for, in the backward too."""

    def __init__(self):
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        left = _LEFT_OPERAND.get(func.overloadpacket.__name__)
        if left is not None:
            self.flop += 2 * args[left].numel() * args[left + 1].shape[1]
        return func(*args, **(kwargs or {}))


def products_run(step: Callable, n: int, d: int, v: int) -> float:
    """How many products of (n, d, v) a step computes by torch's GEMMs; those in kernels of its own are not counted."""
    with _CountProducts() as counted:
        while step is not None:
            step = step()
    return counted.flop / (2 * n * d * v)


def header(dry_run: bool) -> str:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package}={importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if dry_run:
        return f"# dry run on a CPU: no figure here means anything; {' '.join(versions)}"
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here
    ).stdout.strip()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        machine = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        machine = torch.cuda.get_device_name()
    commit = commit or os.environ.get("COMMIT", "unknown")
    return f"# {machine}; python={platform.python_version()} {' '.join(versions)} commit={commit}"
