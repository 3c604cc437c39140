"""Machines that lack something: accelerators, a home to write to, float64, modules of the standard library."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_training import tiny_trainer
from var_kernels.cli import main
from var_kernels.integrations.trainer import VARConfig, reference
from var_kernels.integrations.trainer.step import peak_memory_mb

without_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is there")


def test_a_failed_write_of_the_cache_is_said_and_leaves_no_part_of_a_file(tmp_path, monkeypatch, caplog):
    def full_disk(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(reference, "save_file", full_disk)
    tiny_trainer(tmp_path)
    assert "No space left on device); cache_dir (--cache-dir), or $VAR_KERNELS_CACHE, names another" in caplog.text
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_made_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("a home that is none")
    tiny_trainer(tmp_path, cache_dir=str(tmp_path / "file" / "cache")).train()
    assert f"a further run scores the data again: {tmp_path / 'file' / 'cache'}" in caplog.text


@without_accelerator
def test_processes_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    """torchrun on CPUs without use_cpu: transformers makes no process group, each rank is a run of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"must start one process .* got 2, each of which .*\(--use-cpu\)"):
        tiny_trainer(tmp_path, use_cpu=False)
    assert list(tmp_path.iterdir()) == []


@without_accelerator
def test_bf16_without_an_accelerator_says_what_to_pass(capsys):
    words = ["--from-scratch", "hidden=16", "--dataset", "rows.jsonl", "--output-dir", "run", "--bf16"]
    assert main(["train", *words]) == 2
    message = "bf16 must be False where transformers finds no accelerator .* pass use_cpu=True \\(--use-cpu\\)"
    assert re.search(message, capsys.readouterr().err)


def test_a_device_without_fp64_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(VARConfig, "device", torch.device("mps"))
    with pytest.raises(ValueError, match=r"must have float64, .* got Apple's mps.* pass use_cpu=True"):
        tiny_trainer(tmp_path)


def test_memory_where_the_system_has_no_resource_module(monkeypatch):
    """Windows: no /proc, no resource; psutil knows the peak of the working set there."""
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setitem(sys.modules, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * 2**20))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert peak_memory_mb(torch.device("cpu")) == 3.0
