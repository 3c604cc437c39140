"""The examples of other trainers run, and learn."""

import re
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["trl_sft", "trl_dpo", "trl_kto", "trl_grpo"])
def test_trl_example_runs(name, capsys):
    pytest.importorskip("trl", reason="trl is not installed")
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    assert len(re.findall(r"'loss': '?-?\d", capsys.readouterr().out)) == 4


def test_lightning_example_learns(capsys):
    pytest.importorskip("lightning", reason="lightning is not installed")
    runpy.run_path(str(ROOT / "examples" / "lightning_module.py"))
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_accumulation_in_the_accelerate_loop_equals_large_batches(capsys):
    made = runpy.run_path(str(ROOT / "examples" / "accelerate_loop.py"))
    got = [float(x) for x in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    torch.manual_seed(0)
    model = type(made["model"])(made["config"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step, loss in enumerate(got):
        rows = made["rows"][8 * step : 8 * step + 8]
        large = model(**{name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}).loss
        assert loss == pytest.approx(large.item(), abs=6e-4)  # three decimals are printed
        large.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(got) == 4
    for ours, theirs in zip(made["model"].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
