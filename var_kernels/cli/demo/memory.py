"""Peak memory of one training step, plain loss against fused loss, measured exactly."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from var_kernels.integrations.hf import fused_lm_head
from var_kernels.integrations.scratch import ScratchSpec, make_model


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes held at once during ``step()`` above those held before it: the CUDA allocator's maximum, or on the CPU
    the running sum of the profiler's memory events."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Some releases of the profiler's native library log every start and stop to file descriptor 2."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def compare(
    rows: tuple[int, ...], vocab: int, device: torch.device, seed: int, advance: Callable[[], None]
) -> list[dict]:
    """For each number of tokens the peak MiB of forward + backward, through ``model(...).loss`` and ``fused_lm_head``.

    A 2-layer Llama of width 256 in fp32, sequences of 256 tokens, every token labelled; gradients count on both sides.
    """
    model = make_model(ScratchSpec(hidden=256, layers=2, heads=4, vocab=vocab), vocab, 256, seed).to(device)
    points = []
    for num_rows in rows:
        ids = torch.randint(vocab, (num_rows // 256, 256), generator=torch.Generator().manual_seed(seed)).to(device)

        def step(ids=ids) -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        plain = _measure(model, step, device)
        advance()
        with fused_lm_head(model):
            fused = _measure(model, step, device)
        advance()
        points.append({"tokens": num_rows, "vocab": vocab, "plain_mib": plain, "fused_mib": fused})
    return points


def _measure(model, step: Callable[[], None], device: torch.device) -> float:
    model.zero_grad(set_to_none=True)
    peak = peak_bytes(step, device) / 2**20
    model.zero_grad(set_to_none=True)
    return peak
