"""Every block of docs/embedding.md runs, in at most ten lines."""

import functools
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

PAGE = (Path(__file__).parents[1] / "docs" / "embedding.md").read_text()
BLOCKS = dict(re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL))


START = BLOCKS.pop("What the blocks start from")


@pytest.mark.parametrize("title", BLOCKS)
def test_block_runs_as_pasted(title, tmp_path, monkeypatch):
    """After the page's own beginning, with no name from here."""
    code = BLOCKS[title]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    for package in re.findall(r"^from (\w+)", code, re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # no compiler here
    torch._dynamo.reset()  # guards of calls in other tests
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(compile(START, "embedding.md", "exec"), names)
    exec(compile(code, title, "exec"), names)
    if title == "Evaluation, generation, files":
        assert all(p.equal(q) for p, q in zip(names["same"].parameters(), names["model"].parameters(), strict=True))
        assert names["loss"].item() > 0
        assert names["text"].shape == (2, 13)
        return
    learned = [p for p in names["model"].parameters() if p.grad is not None and p.grad.any()]
    assert learned or (names["A"].grad is not None and names["B"].grad.any())


def test_the_page_has_its_blocks():
    assert len(BLOCKS) + 1 == PAGE.count("```python") == 13
