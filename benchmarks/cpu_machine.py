"""Where the CPU benchmarks write, and the line that heads their files."""

import platform
import subprocess
from pathlib import Path

import torch

from var_kernels.kernels import gemm_native

RESULTS = Path(__file__).parent / "results"


def results_folder() -> Path:
    """By the instructions of this machine's GEMM, which decide more than the processor's name."""
    gemm = gemm_native.LEVEL_NAMES[gemm_native.best_level()].lower().replace(" ", "-")
    return RESULTS / f"cpu-{gemm}"


def header() -> str:
    """Processor, instructions of the bf16 GEMM, threads, versions, commit."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        flags = " ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split())
        model = f"{fields.get('model name', model)} model {fields.get('model', '?')} ({flags})"
        model += f"; bf16 GEMM by {gemm_native.LEVEL_NAMES[gemm_native.best_level()]}"
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    versions = f"torch={torch.__version__} python={platform.python_version()}"
    return f"# {model}; threads={torch.get_num_threads()} {versions} commit={commit}; processor time"
