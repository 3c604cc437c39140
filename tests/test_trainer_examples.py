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
    out = capsys.readouterr().out
    assert len(re.findall(r"'loss': '?-?\d", out)) == 4
    assert re.search(r"no logits made: (loss|reward) -?\d+\.\d+ -> -?\d+\.\d+\n", out)


def test_distillation_example_learns(tmp_path, capsys, monkeypatch):
    from tests.tiny_training import ROWS, tiny_model, tokenizer

    tiny_model(dtype=torch.float32, initializer_range=0.5).save_pretrained(tmp_path / "teacher")  # layers that matter
    tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "texts.txt").write_text(12 * f"{ROWS[0]['prompt']}{ROWS[0]['completions'][0]}\n")
    words = ["distill.py", str(tmp_path / "teacher"), str(tmp_path / "texts.txt"), "--layers", "1"]
    monkeypatch.setattr("sys.argv", [*words, "--learning-rate", "3e-3"])
    runpy.run_path(str(ROOT / "examples" / "distill.py"))
    out = capsys.readouterr().out
    first, last = map(float, re.search(r"1 layers, 12 steps: (\S+) -> (\S+) nats", out).groups())
    assert last < 0.5 * first


def test_lightning_example_learns(capsys):
    pytest.importorskip("lightning", reason="lightning is not installed")
    runpy.run_path(str(ROOT / "examples" / "lightning_module.py"))
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_accumulation_in_the_accelerate_loop_equals_large_batches(capsys, monkeypatch):
    from accelerate.state import AcceleratorState

    # an earlier trainer of this process may have set bf16, in either place
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
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
