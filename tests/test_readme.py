"""The README's code runs as it stands, its links lead somewhere, and its figures are those of the CSVs it names."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=["loss module", "any trainer"])
def test_snippet_runs(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("name", ["loss_module.py", "own_trainer.py"])
def test_example_runs(name):
    run = subprocess.run([sys.executable, ROOT / "examples" / name], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    losses = [float(x) for x in re.findall(r"loss'?:? '?(\d+\.\d+)", run.stdout)]
    assert len(losses) >= 4


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_memory_figures_are_measured():
    def less_gradients(name):
        lines = (ROOT / "benchmarks" / "results" / "cpu-2-cores" / name).read_text().splitlines()
        return {row["loss"]: float(row["peak_less_gradients_mib"]) for row in csv.DictReader(lines[1:])}

    fp32, bf16 = less_gradients("memory-fp32.csv"), less_gradients("memory-bf16.csv")
    assert f"{fp32['fused']:.0f} MiB instead of {fp32['plain']:.0f} MiB" in README
    assert f"{fp32['plain'] / fp32['fused']:.1f}x less; {bf16['plain'] / bf16['fused']:.1f}x in bf16" in README


def test_the_table_of_losses_is_the_registry():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from var_kernels.cli.methods import markdown_table, variants_table

    page = (ROOT / "docs" / "losses.md").read_text()
    assert markdown_table() in page
    assert variants_table() in page


def test_figures_of_models_are_those_of_the_sweep():
    summary = re.search(
        r"(\d+) pairs of model type and class, (\d+) right, (\d+) refused, (\d+) wrong, (\d+) cannot",
        (ROOT / "docs" / "models.md").read_text(),
    )
    pairs, right, refused, wrong, unbuilt = summary.groups()
    text = " ".join(README.split())
    assert wrong == "0"
    assert f"of the {pairs} language-model classes" in text
    assert f"{right} give their own" in text
    assert f"{refused} are refused with a reason, none is wrong, {unbuilt} could not be built" in text
