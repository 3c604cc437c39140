"""Peak memory of this process, for the logs."""

import sys
from pathlib import Path

import torch


def peak_memory_mb(device: torch.device) -> float:
    """MiB: the CUDA allocator's peak since training began, or on the CPU the highest resident size of the whole
    process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
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
