"""Choice of the implementation of the row kernels: by device and dtype, or forced."""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

from var_kernels.kernels import gemm_native, gemm_torch, labels_torch, rows_native, rows_torch
from var_kernels.kernels.compile_time import compile_time
from var_kernels.ops.checks import check_choice

BACKENDS = ("torch", "native", "triton")
_ENVIRONMENT = "VAR_KERNELS_BACKEND"
# About 50 ms of a bf16 loss and its gradients on one core.
_MIN_LOGITS_TO_WARN = 1 << 22
_FORCED: ContextVar[str | None] = ContextVar("forced backend", default=None)
_warned = False


class PlainTorchWarning(UserWarning):
    """CPU tensors go through plain torch, since the C++ kernels are not there."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every call inside the block runs on this backend, in this thread or task alone (``VAR_KERNELS_BACKEND``: in a
    whole process).
    """
    check_choice("use_backend: backend", name, BACKENDS)
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


@compile_time
def choose_backend(device: torch.device, tile: torch.dtype) -> tuple[str, str]:
    """(name, reason). A forced backend that cannot run is refused; nothing falls back in silence. Under
    torch.compile it is a constant of the graph.
    """
    if device.type == "meta":
        return "torch", "a meta tensor holds no values"
    forced = _FORCED.get() or os.environ.get(_ENVIRONMENT)
    if forced:
        if forced not in BACKENDS:
            check_choice(f"{_ENVIRONMENT}: backend", forced, BACKENDS)
        obstacle = _OBSTACLES[forced](device, tile) if forced in _OBSTACLES else None
        if obstacle:
            raise ValueError(f"backend {forced!r} was forced but {obstacle}; unset {_ENVIRONMENT} to choose by device")
        return forced, "forced"
    name = "native" if device.type == "cpu" else "triton"
    obstacle = _OBSTACLES[name](device, tile)
    if obstacle:
        return "torch", obstacle
    if name == "triton":
        return name, f"tiles on {device.type}"
    rows, gemm = rows_native.LEVEL_NAMES[rows_native.best_level()], gemm_native.LEVEL_NAMES[gemm_native.best_level()]
    return name, f"{rows}; bf16 GEMM by {gemm}"


def uses_triton(device: torch.device) -> bool:
    """Return whether tiles on the device are Triton's: on an accelerator, or interpreted."""
    return choose_backend(device, torch.float32)[0] == "triton"


def triton_obstacle(device: torch.device, tile: torch.dtype) -> str | None:
    """Reason why Triton cannot run on such a tile, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if tile == torch.float64:
        return "the Triton kernels compute in fp32, and this tile is fp64"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton has no CPU target (TRITON_INTERPRET=1 interprets it, for tests)"
    return None


def native_obstacle(device: torch.device, tile: torch.dtype) -> str | None:
    """Reason why the C++ kernels cannot run on such a tile, or None."""
    if device.type != "cpu":
        return f"the C++ kernels run on a CPU, and this tile is on {device.type}"
    if tile == torch.float64:
        return "the C++ kernels compute in fp32, and this tile is fp64"
    return rows_native.obstacle()


def warn_in_plain_torch(device: torch.device, tile: torch.dtype, num_logits: int) -> None:
    """Once a process, for a call of some size that the C++ kernels would make faster if they were built; never where
    the backend is forced.
    """
    global _warned
    if _warned or device.type != "cpu" or num_logits < _MIN_LOGITS_TO_WARN or tile == torch.float64:
        return
    obstacle = rows_native.obstacle()
    if obstacle is None or _FORCED.get() or os.environ.get(_ENVIRONMENT):
        return
    _warned = True
    warnings.warn(
        f"the CPU kernels in C++ are not used, since {obstacle}: plain torch takes 2 to 2.6 times as long in bf16 and "
        f"1.1 to 1.2 times in fp32. In a checkout of var_kernels: {rows_native.BUILD_COMMAND} (needs a C++ compiler). "
        f"{_ENVIRONMENT}=torch keeps plain torch without this warning.",
        PlainTorchWarning,
        stacklevel=4,
    )


_OBSTACLES = {"native": native_obstacle, "triton": triton_obstacle}


def kernels_of(name: str) -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules of a backend: its row kernels (kernels/rows.py says what such a module holds), its label kernels
    (kernels/labels_torch.py) and its matrix products (kernels/gemm_torch.py).
    """
    # Statements, not importlib: torch.compile traces them.
    if name == "triton":
        from var_kernels.kernels import labels_triton, rows_triton

        return rows_triton, labels_triton, gemm_torch
    return (rows_native, labels_torch, gemm_native) if name == "native" else (rows_torch, labels_torch, gemm_torch)


def fused_forward(name: str) -> Callable[..., None] | None:
    """The kernel of a backend that computes statistics with the logits in registers, or None."""
    if name != "triton":
        return None
    from var_kernels.kernels.forward_triton import fused_forward as kernel

    return kernel


def pair_kernels(name: str) -> ModuleType:
    """The module of a backend's kernels over two models' logits: pair_rows, temporary_bytes, COPIES_GRADIENT."""
    if name == "torch":
        from var_kernels.kernels import pairs_torch as kernels
    elif name == "native":
        from var_kernels.kernels import pairs_native as kernels
    else:
        from var_kernels.kernels import pairs_triton as kernels
    return kernels
