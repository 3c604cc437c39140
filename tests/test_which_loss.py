"""docs/which-loss.md against the registry and the study: every loss once, its passes, reference and figure."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from var_kernels.integrations.trainer.methods import METHODS
from var_kernels.losses import VARIANTS

DOCS = Path(__file__).parent.parent / "docs"
PAGE, STUDY = (DOCS / "which-loss.md").read_text(), (DOCS / "study.md").read_text()
LINES = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
ROWS = {cells[1].strip("`"): cells for cells in LINES if cells[1].startswith("`")}
# as the study calls them
NAMES = {"var": "VAR", "sft": "SFT", "dro": "DRO", "alol": "A-LoL", "raft": "Best-of-n SFT", "dpo": "DPO", "ipo": "IPO",
         "slic": "SLiC", "sail_dp": "SAIL-DP", "ava_p": "AVA-p", "kto": "KTO", "grpo": "GRPO, offline",
         "sail_pp": "SAIL-PP", "sail_pr": "SAIL-PR"}  # fmt: skip


def objective(name: str) -> str:
    (line,) = [line for line in STUDY.splitlines() if line.startswith(f"| {name} | 0.000")]
    return line.split("|")[6].split()[0]


def test_every_loss_has_one_row():
    assert set(ROWS) == set(METHODS)
    assert sum(cells[1].startswith("`") for cells in LINES) == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_true(name):
    method, (_, _, reference, passes, _, study) = METHODS[name], ROWS[name]
    wanted = {"": "no", "sequence": "sequences", "token": "tokens"}[method.reference]
    wanted = "distributions" if method.teacher == "reference" else wanted
    assert reference == (wanted if name != "var" else "no; sequences with `mean` or `sum`")
    assert passes == ("none" if not method.loss.reads_policy else "1" if method.loss.pass_class in "AB" else "2")
    assert study.split()[0] == (objective(NAMES[name]) if name in NAMES else "-")


def test_what_the_text_names_is_there():
    for name in re.findall(r"`([a-z_]+)`", PAGE):
        assert name in {*METHODS, *VARIANTS, "workspace_mb", "mean", "sum"}, name
    for name in ("Online VAR", "Iterative DPO"):
        assert objective(name) in PAGE
