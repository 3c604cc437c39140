"""Shared fixtures: devices, small tiles, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from var_kernels.kernels import rows_torch
from var_kernels.ops import workspace


def pytest_collection_modifyitems(config, items):
    """``gpu`` tests run where there is a GPU and are skipped, with the reason, elsewhere."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture
def small_tiles(monkeypatch):
    """Lets a small problem need several chunks, slices and row blocks, all ragged."""
    monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", 700)
    monkeypatch.setattr(workspace, "_MIN_COLUMNS", 50)
    monkeypatch.setattr(workspace, "_MIN_ROWS", 4)
