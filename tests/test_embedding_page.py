"""Every block of docs/embedding.md runs, in at most ten lines."""

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
def test_block_runs(title):
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (2, 9))
    hidden, weight = torch.randn(7, 64, requires_grad=True), torch.randn(5000, 64)
    names = {
        "model": build(llama("LlamaForCausalLM")).float(),
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "rows": [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids],
        "hidden": hidden,
        "lm_head_weight": weight,
        "labels": torch.randint(5000, (7,)),
    }
    code = BLOCKS[title]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, title, "exec"), names)
    learned = [p for p in names["model"].parameters() if p.grad is not None and p.grad.any()]
    assert learned or (names["A"].grad is not None and names["B"].grad.any())


def test_the_page_has_its_blocks():
    assert len(BLOCKS) == PAGE.count("```python") == 4
