"""Shared fixtures: devices, small tiles, no network."""

import gc
import importlib.util
import os
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Read when a Triton kernel is defined, so before any is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from var_kernels.kernels import rows_native, rows_torch
from var_kernels.ops import plan
from var_kernels.ops.backend import use_backend

os.fsync = lambda _: None  # of every line of a run's log; what is written outlives its process as it is

# (device, backend): the same test bodies run over all that the machine has; Triton on a CPU is interpreted.
TARGETS = [
    pytest.param(("cpu", "torch"), id="cpu-torch"),
    pytest.param(("cpu", "native"), id="cpu-native"),
    pytest.param(("cpu", "triton"), id="cpu-triton"),
    pytest.param(("cuda", "torch"), id="cuda-torch", marks=pytest.mark.gpu),
    pytest.param(("cuda", "triton"), id="cuda-triton", marks=pytest.mark.gpu),
]


def pytest_collection_modifyitems(config, items):
    """``gpu`` tests run where there is a GPU and are skipped, with the reason, elsewhere."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_collection_finish(session):
    """What is there by now stays. transformers' Trainer collects garbage at every start, and each time would look
    through the 800,000 objects of ten thousand tests and their libraries.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_look_through():
    """What tests have imported and compiled since then stays too: a start of the Trainer costs a tenth less."""
    if len(gc.get_objects()) > 20_000:
        gc.collect()
        gc.freeze()


@pytest.fixture
def small_tiles(monkeypatch):
    """Lets a small problem need several chunks, slices, row blocks and steps of a row, all ragged."""
    monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", 700)
    if importlib.util.find_spec("triton"):
        from var_kernels.kernels import pairs_triton, rows_triton

        monkeypatch.setattr(rows_triton, "BLOCK_COLUMNS", 128)
        monkeypatch.setattr(rows_triton, "EXP_BLOCK_COLUMNS", 64)
        monkeypatch.setattr(pairs_triton, "BLOCK_COLUMNS", 128)
    monkeypatch.setattr(plan, "_MIN_COLUMNS", 50)
    monkeypatch.setattr(plan, "_MIN_ROWS", 4)
    monkeypatch.setattr(plan, "_MIN_ACCELERATOR_ROWS", 4)
    monkeypatch.setattr(plan, "_MIN_CACHED_DEPTH", 1)


@pytest.fixture
def poisoned():
    """Every torch.empty is full of NaN: what the kernels leave unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=TARGETS)
def target(request):
    """Runs the test on one device and backend; yields the device and the dtypes that the backend takes."""
    device, backend = request.param
    if backend == "torch":
        dtypes = rows_torch.DTYPES
    elif backend == "native":
        if rows_native.obstacle():
            pytest.skip(rows_native.obstacle())
        dtypes = rows_native.DTYPES
    else:
        pytest.importorskip("triton", reason="triton is not installed")
        from tests import triton_interpreter
        from var_kernels.kernels import rows_triton

        if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            triton_interpreter.mend()
        elif device == "cpu":
            pytest.skip("Triton runs on the GPU of this machine")
        dtypes = rows_triton.DTYPES
    with use_backend(backend):
        yield Target(device, dtypes, backend)


class Target(NamedTuple):
    device: str
    dtypes: tuple[torch.dtype, ...]
    backend: str

    def require(self, dtype: torch.dtype) -> None:
        if dtype not in self.dtypes:
            pytest.skip(f"this backend has no {dtype}")
