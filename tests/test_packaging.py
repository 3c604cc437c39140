"""What a source distribution holds, and links between the pages of the project."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCE = (".*", "runs", "build", "dist", "site", "*.egg-info", "__pycache__", "*.so", "*.pyc")
PAGES = sorted(
    page
    for page in (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    if not {".venv", "runs", "build", "site"} & set(page.parts)
)


def kept(folder: Path):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_sdist_holds_the_checkout(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is older than 77")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    wanted = kept(source)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('../made'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "made" / done.stdout.split()[-1]) as archive:
        held = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert wanted - held == set()
    extra = {path for path in held - wanted if path.parts and "egg-info" not in path.parts[0] and path.suffix}
    assert extra == {Path("setup.cfg")}


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", (ROOT / page).read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page} links to {target}#{anchor}"


def test_the_citation_is_of_this_version():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert citation["authors"] == [{"name": "The var_kernels authors"}]
    losses = (ROOT / "docs" / "losses.md").read_text() + (ROOT / "docs" / "var.md").read_text()
    for reference in citation["references"]:
        assert f"arXiv {reference['url'].rpartition('/')[2]}" in losses


# -- the matrix of versions --------------------------------------------------------------------------------------------


@pytest.fixture
def matrix():
    pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    pytest.importorskip("packaging")
    from benchmarks import matrix

    return matrix


def test_the_rows_cover_the_bounds(matrix):
    """Of Python and of every package that a user's extras name; the newest of each comes without a pin."""
    from packaging.specifiers import SpecifierSet

    project = matrix.project()
    pythons = {row.python for row in matrix.ROWS}
    assert pythons == {"3.10", "3.11", "3.12", "3.13"}
    assert SpecifierSet(project["requires-python"]) == SpecifierSet(f">={min(pythons, key=lambda v: int(v[2:]))}")
    oldest = [row for row in matrix.ROWS if row.pins == matrix.OLDEST]
    assert [row.python for row in oldest] == ["3.10"]
    assert any(row.sdist for row in matrix.ROWS)
    assert any("trl" in row.extras and not row.pins for row in matrix.ROWS)
    pinned = {pin for row in matrix.ROWS for pin in row.pins}
    assert {"torch==2.13.0", "transformers==5.17.0", "triton==3.6.0"} <= pinned
    bounds = matrix.lower_bounds("hf", "triton")
    assert set(bounds) > {"torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "triton"}
    assert {f"{name}=={version}" for name, version in bounds.items()} == set(matrix.OLDEST)


def test_the_matrix_is_right_and_of_these_rows(matrix):
    """Another bound, another row, or a check that failed turns this red: make matrix."""
    from packaging.requirements import Requirement

    measured = matrix.read()
    assert len(measured) == len(matrix.ROWS)
    for row, found in zip(matrix.ROWS, measured, strict=True):
        assert found["python"] == row.python
        assert found["pins"] == " ".join(row.pins)
        assert found["installed from"] == ("sdist" if row.sdist else "wheel")
        for requirement in map(Requirement, row.pins):
            if requirement.name in found:
                assert requirement.specifier.contains(found[requirement.name]), (row, requirement)
        wanted = set(matrix.CHECKS)
        wanted -= set() if "trl" in row.extras else {"SFTTrainer"}
        wanted -= set() if row.extras else {"training", "VARTrainer"}
        assert {name for name in matrix.CHECKS if found[name] == "right"} >= wanted - {"interpreter"}
        assert {found[name] for name in matrix.CHECKS} <= {"right", ""}
        assert found["interpreter"] == ("right" if found["triton"] and found["numpy"] else "")
    assert matrix.MARKS[0] + matrix.table(measured) + matrix.MARKS[1] in matrix.PAGE.read_text()


def test_a_failed_check_is_shown(matrix):
    row = dict.fromkeys(("installed from", "python", *matrix.PACKAGES, *matrix.CHECKS), "right")
    text = matrix.table([row, {**row, "fp64": "torch: WRONG | a", "trl": ""}])
    assert text.splitlines()[3].endswith(" | fp64: torch: WRONG \\| a |")
