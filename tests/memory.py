"""Exact peak of extra memory, from the allocator's own events."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(step: Callable[[], object]) -> int:
    """Largest sum of live allocations made inside ``step`` (CPU), to the byte; its result counts while it lives."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
    del result
    live = peak = 0
    for event in sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
