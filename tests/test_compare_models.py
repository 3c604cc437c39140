"""examples/compare_models.py: rewards, win rates and KL of saved models, against numbers computed apart."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_training import ROWS, tiny_model, tokenizer
from var_kernels.integrations.hf import sequence_logprobs

SCRIPT = Path(__file__).parent.parent / "examples" / "compare_models.py"
NUMBER = re.compile(r"(-?[\d.]+) ± (-?[\d.]+|nan)")


def other_model():
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[40:60] += 0.3
    return model


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """What the script leaves behind, and what it printed: {model: [(mean, standard error) of each column]}."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, model in {"base": tiny_model(dtype=torch.float32), "other": other_model()}.items():
        model.save_pretrained(name)
        tokenizer().save_pretrained(name)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS))
    Path("compared_rewards.py").write_text(
        "def score(prompts, completions):\n    return [len(c) for c in completions]\n"
    )
    words = "--prompts prompts.jsonl --reward compared_rewards:score --reference base --draws 3 --batch 7"
    monkeypatch.setattr(sys, "argv", ["compare_models.py", *words.split(), "--max-new-tokens", "6", "base", "other"])
    left = runpy.run_path(str(SCRIPT))
    lines = capsys.readouterr().out.splitlines()[-3:]
    return left, [[tuple(map(float, pair)) for pair in NUMBER.findall(line)] for line in lines]


def test_the_reference_against_itself_and_another_against_numbers_computed_apart(compared):
    left, (reference, same, other) = compared
    assert same[0] == reference[0]
    assert same[1:] == [(50.0, 0.0), (0.0, 0.0)]
    drawn, base = left["drawn"], left["base"]
    assert len(drawn) == len(ROWS)
    lengths = torch.tensor([[len(tokenizer().decode(ids, skip_special_tokens=True)) for ids in row] for row in drawn])
    assert other[0][0] == pytest.approx(lengths.float().mean().item(), abs=0.006)
    assert other[0][1] == pytest.approx(lengths.float().mean(1).std().item() / 8**0.5, abs=0.006)
    wins = (lengths > base).float() + 0.5 * (lengths == base).float()
    assert other[1][0] == pytest.approx(100 * wins.mean().item(), abs=0.006)
    kl = []
    for (_, _, prompt, _), completions in zip(left["prompts"], drawn, strict=True):
        for ids in completions:
            batch = {"input_ids": torch.tensor([[*prompt, *ids]]), "labels": torch.tensor([[-100] * len(prompt) + ids])}
            with torch.no_grad():
                pair = [sequence_logprobs(model, batch) for model in (other_model(), tiny_model(dtype=torch.float32))]
            kl.append((pair[0] - pair[1]).item())
    assert other[2][0] == pytest.approx(sum(kl) / len(kl), abs=0.006)
    assert other[2][0] > 0.05
