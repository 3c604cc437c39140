"""Which implementation of the row kernels runs: chosen by device and dtype, or forced."""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

BACKENDS = ("torch", "triton")
_ENVIRONMENT = "VAR_KERNELS_BACKEND"
_forced: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every call inside the block runs on this backend (``VAR_KERNELS_BACKEND`` does it for a whole process)."""
    global _forced
    _known(name, "use_backend")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _known(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def choose_backend(device: torch.device, tile: torch.dtype) -> tuple[str, str]:
    """(name, reason). A forced backend that cannot run is refused; nothing falls back in silence."""
    forced = _forced or os.environ.get(_ENVIRONMENT)
    if forced:
        _known(forced, _ENVIRONMENT if _forced is None else "use_backend")
        obstacle = triton_obstacle(device, tile) if forced == "triton" else None
        if obstacle:
            raise ValueError(f"backend 'triton' was forced but {obstacle}; unset {_ENVIRONMENT} to choose by device")
        return forced, "forced"
    obstacle = "Triton has no CPU target" if device.type == "cpu" else triton_obstacle(device, tile)
    return ("torch", obstacle) if obstacle else ("triton", f"tiles on {device.type}")


def triton_obstacle(device: torch.device, tile: torch.dtype) -> str | None:
    """Why Triton cannot run on such a tile, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if tile == torch.float64:
        return "the Triton kernels compute in fp32, and this tile is fp64"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton has no CPU target (TRITON_INTERPRET=1 interprets it, for tests)"
    return None


def row_kernels(name: str) -> ModuleType:
    """The module of a backend: row_stats, row_grad, temporary_bytes, COPIES_GRADIENT."""
    return importlib.import_module(f"var_kernels.kernels.rows_{name}")
