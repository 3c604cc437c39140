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
