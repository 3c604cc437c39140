"""Every block of docs/trainers.md runs in at most ten lines, and so do the examples of other trainers."""

import re
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")


ROOT = Path(__file__).parents[1]
START, *BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trainers.md").read_text(), re.DOTALL)


def lines_of(code):
    return [line for line in code.splitlines() if line.strip()]


def name_of(code):
    found = re.search(
        r"from trl import \w+, (\w+)|import (LigerF)|import (sequence_logprobs)|import (lightning)|(accelerator)", code
    )
    return next(group for group in found.groups() if group) if found else "Trainer"


def module_of(model):
    """A LightningModule that holds the model: the one name that the page does not make."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    steps = {
        "training_step": lambda module, batch, _index: module.model(**batch).loss,
        "configure_optimizers": lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
    }
    module = type("Module", (lightning.LightningModule,), steps)()
    module.model = model
    return module


def test_the_page_has_every_trainer():
    wanted = {"Trainer", "SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "accelerator", "lightning"}
    assert wanted <= {name_of(code) for code in BLOCKS}


@pytest.mark.parametrize("code", BLOCKS, ids=name_of)
def test_block_runs_as_pasted(code, tmp_path, monkeypatch):
    """After the page's own beginning, with no name from here."""
    assert len(lines_of(code)) <= 10
    if "from trl" in code:
        pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(compile(START, "trainers.md", "exec"), names)
    if name_of(code) == "lightning":
        names["module"] = module_of(names["model"])
    before = [p.detach().clone() for p in names["model"].parameters()]
    exec(compile(code, "trainers.md", "exec"), names)
    if "loss" in names:
        assert torch.isfinite(names["loss"])
        assert names["loss"].grad_fn is not None
    else:
        after = list(getattr(names["model"], "module", names["model"]).parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), "nothing was trained"


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
