"""Peak memory and time of one training step of a saved model, plain loss and fused loss, each in a process of its own.

python -m benchmarks.demo.memory FOLDER plain|fused cpu|cuda DTYPE TOKENS ...
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from var_kernels.measure import peak_resident_mb

_LENGTH = 256  # tokens of a sequence
_WARM_UP = 32  # tokens of the step before those that are measured: it brings the gradients' memory


def compare(
    folder: Path, rows: tuple[int, ...], device: torch.device, dtype: str, advance: Callable[[], None]
) -> list[dict]:
    """For each number of tokens {"tokens", "plain", "fused"}: the figures of ``steps`` on either side, None where the
    process was ended for want of memory."""
    points: list[dict[str, Any]] = [{"tokens": tokens, "plain": None, "fused": None} for tokens in rows]
    for loss in ("plain", "fused"):
        for point, figures in zip(points, steps(folder, loss, device.type, dtype, rows), strict=False):
            point[loss] = figures
            advance()
    return points


def steps(folder: Path, loss: str, device: str, dtype: str, rows: tuple[int, ...]) -> Iterator[dict]:
    """{"peak_mib", "seconds", "before_mib"} of a step of each number of tokens, forward and backward, every token
    labelled, gradients kept; as many as there was memory for.

    peak_mib: of the whole process on a CPU, of the CUDA allocator on a GPU; before_mib: the same before the step.
    """
    command = [sys.executable, "-m", __name__, str(folder), loss, device, dtype, *map(str, rows)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        said = process.stderr.read()
    if process.returncode not in (0, -9, 137) and "OutOfMemory" not in said:
        raise RuntimeError(f"a step, {loss} loss, failed: {(said.strip() or 'nothing was said').splitlines()[-1]}")


def main(folder: str, loss: str, device: str, dtype: str, *rows: str) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from var_kernels.integrations.hf import fused_lm_head

    logging.disable_progress_bar()  # its lines would fill the pipe that nobody reads yet
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).train()
    config = model.config.get_text_config()
    length = min(_LENGTH, config.max_position_embeddings)

    def step(count: int) -> None:
        shape = (max(1, count // length), min(length, count))
        ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    with fused_lm_head(model) if loss == "fused" else contextlib.nullcontext():
        step(_WARM_UP)
        for tokens in rows:
            read = peak_reader(device)
            before, began = read(), time.perf_counter()
            step(int(tokens))
            peak = read()  # on a GPU it waits for the step
            figures = {"peak_mib": peak, "seconds": time.perf_counter() - began, "before_mib": before}
            print(json.dumps(figures), flush=True)


def peak_reader(device: str) -> Callable[[], float]:
    """MiB at the highest since this call: where the system keeps no resettable maximum, since the process began."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

        def read() -> float:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 2**20

        return read
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_resident_mb


if __name__ == "__main__":
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    main(*sys.argv[1:])
