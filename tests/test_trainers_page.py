"""Every block of docs/trainers.md runs in at most ten lines, and so do the examples of other trainers."""

import copy
import re
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import TrainingArguments

from tests.tiny_training import ROWS, tiny_model, tokenizer

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trainers.md").read_text(), re.DOTALL)
SETTINGS = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no", "use_cpu": True}


def lines_of(code):
    return [line for line in code.splitlines() if line.strip()]


def name_of(code):
    found = re.search(
        r"from trl import (\w+)|import (LigerF)|import (sequence_logprobs)|import (lightning)|(accelerator)", code
    )
    return next(group for group in found.groups() if group) if found else "Trainer"


def names_for(kind, folder):
    """What the page's reader has already: a model, a tokenizer, data."""
    torch.manual_seed(0)
    model = tiny_model(dtype=torch.float32)
    ids = torch.randint(200, (8, 12))
    names = {"model": model, "reference": copy.deepcopy(model), "tokenizer": tokenizer()}
    rows = [{"input_ids": row, "labels": row} for row in ids]
    if kind == "Trainer":
        return {**names, "rows": rows, "arguments": TrainingArguments(str(folder), **SETTINGS)}
    if kind == "accelerator":
        from accelerate import Accelerator

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(rows, batch_size=4)
        return {**names, "accelerator": Accelerator(cpu=True), "optimizer": optimizer, "loader": loader}
    if kind == "lightning":
        lightning = pytest.importorskip("lightning", reason="lightning is not installed")
        steps = {
            "training_step": lambda module, batch, _index: module.model(**batch).loss,
            "configure_optimizers": lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        }
        module = type("Module", (lightning.LightningModule,), steps)()
        module.model = model
        return {**names, "module": module, "loader": torch.utils.data.DataLoader(rows, batch_size=4)}
    if kind == "sequence_logprobs":
        return {**names, "chosen": {"input_ids": ids[:4]}, "rejected": {"input_ids": ids[4:]}}
    if kind == "LigerF":
        head = torch.nn.Linear(8, 50, bias=False)
        return {"lm_head": head, "hidden": torch.randn(6, 8), "labels": torch.arange(6)}
    return {**names, **names_for_trl(kind, folder)}


def names_for_trl(kind, folder):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    made = {
        "examples": [{"prompt": r["prompt"], "completion": r["completions"][0]} for r in ROWS],
        "pairs": [{"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": "x"} for r in ROWS],
        "judged": [{"prompt": r["prompt"], "completion": "3", "label": n % 2 == 0} for n, r in enumerate(ROWS)],
        "prompts": [{"prompt": r["prompt"]} for r in ROWS],
    }
    short = {"num_generations": 2, "max_completion_length": 4} if kind == "GRPOTrainer" else {}
    arguments = getattr(trl, kind.replace("Trainer", "Config"))(str(folder), bf16=False, **SETTINGS, **short)
    names = {name: Dataset.from_list(rows) for name, rows in made.items()}
    return {**names, "arguments": arguments, "reward": lambda completions, **_: [float(len(c)) for c in completions]}


def test_the_page_has_every_trainer():
    wanted = {"Trainer", "SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "accelerator", "lightning"}
    assert wanted <= {name_of(code) for code in BLOCKS}


@pytest.mark.parametrize("code", BLOCKS, ids=name_of)
def test_block_runs(code, tmp_path):
    assert len(lines_of(code)) <= 10
    names = names_for(name_of(code), tmp_path)
    before = [p.detach().clone() for p in names["model"].parameters()] if "model" in names else []
    exec(compile(code, "trainers.md", "exec"), names)
    if "loss" in names:
        assert torch.isfinite(names["loss"])
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
