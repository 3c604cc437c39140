"""Peak memory: of a piece of work, exact to the byte, and of the whole process."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Highest number of bytes allocated above those held before ``step()``; what step returns counts while it lives.

    CUDA: the allocator's own maximum (its statistics are reset). CPU: the running sum of the profiler's memory events;
    garbage of before is not collected meanwhile, since what that frees would be taken off the sum.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_stderr(), _no_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
    del result
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def peak_resident_mb() -> float:
    """MiB, the highest resident size of this process since it began, or since it wrote to /proc/self/clear_refs."""
    status = Path("/proc/self/status")
    if status.exists():
        high = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if high is not None:
            return int(high.split()[1]) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # accelerate needs it, too

        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The native profiler of some torch releases logs every start and stop to file descriptor 2."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
