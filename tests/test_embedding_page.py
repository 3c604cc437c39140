"""Every block of docs/embedding.md runs, in at most ten lines."""

import functools
import re
from pathlib import Path

import pytest
import torch

from tests.hf_zoo import build, llama

pytest.importorskip("transformers")
pytest.importorskip("peft")

PAGE = (Path(__file__).parents[1] / "docs" / "embedding.md").read_text()
BLOCKS = dict(re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.parametrize("title", BLOCKS)
def test_block_runs(title, tmp_path, monkeypatch):
    code = BLOCKS[title]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    for package in re.findall(r"^from (\w+)", code, re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # no compiler here
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (2, 9))
    hidden, weight = torch.randn(7, 64, requires_grad=True), torch.randn(5000, 64)
    names = {
        "model": build(llama("LlamaForCausalLM")).float(),
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "pairs": {"input_ids": torch.randint(3, 90, (8, 9))},
        "rows": [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids],
        "rewards": torch.tensor([1.0, -1.0]),
        "folder": tmp_path,
        "hidden": hidden,
        "lm_head_weight": weight,
        "labels": torch.randint(5000, (7,)),
    }
    exec(compile(code, title, "exec"), names)
    if title == "Evaluation, generation, files":
        assert all(p.equal(q) for p, q in zip(names["same"].parameters(), names["model"].parameters(), strict=True))
        assert names["loss"].item() > 0
        assert names["text"].shape == (2, 13)
        return
    learned = [p for p in names["model"].parameters() if p.grad is not None and p.grad.any()]
    assert learned or (names["A"].grad is not None and names["B"].grad.any())


def test_the_page_has_its_blocks():
    assert len(BLOCKS) == PAGE.count("```python") == 12
