"""The pages of docs/ and the README: blocks of Python run, commands and options exist, the site builds strictly."""

import argparse
import functools
import importlib
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.ranks import HANG
from tests.tiny_training import ROWS, tiny_model, tokenizer
from var_kernels.cli import COMMANDS, option_names
from var_kernels.integrations.trainer import config, methods
from var_kernels.losses import LOSSES
from var_kernels.ops import head

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
FENCED = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ALONE = "as it stands after this"  # a page's promise: each block alone, after the page's first; else all in order


def runs():
    """(page, its blocks that run in one namespace)."""
    for page, text in PAGES.items():
        start, *blocks = FENCED.findall(text) or [""]
        if ALONE in " ".join(text.split()):
            yield from (pytest.param(page, [start, block], id=f"{page}-{n}") for n, block in enumerate(blocks, 2))
        elif start:
            yield pytest.param(page, [start, *blocks], id=page)


@pytest.fixture
def registries(monkeypatch):
    """What a page registers, or puts in place of the library's own, ends with its test."""
    tables = (LOSSES, methods.METHODS, config.METHOD_CONFIGS)
    before = [dict(table) for table in tables]
    monkeypatch.setattr(head, "kernels_of", head.kernels_of)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def given_by(page: str, folder: Path) -> dict:
    """The few names that a page leaves to its reader."""
    if page == "docs/distillation.md":
        for name, seed in (("teacher", 1), ("student", 2)):
            tiny_model(seed, torch.float32).save_pretrained(folder / name)
            tokenizer().save_pretrained(folder / name)
        hidden = torch.randn(6, 24, requires_grad=True)
        names = {"hidden": hidden, "lm_head_weight": torch.randn(270, 24), "top_ids": torch.randint(270, (6, 3))}
        texts = [row["prompt"] + row["completions"][0] for row in ROWS[:2]]
        places = {"TEACHER": str(folder / "teacher"), "STUDENT": str(folder / "student"), "texts": texts}
        return names | places | {"top_logps": torch.randn(6, 7).log_softmax(1)[:, :3]}
    if page == "docs/scaling.md":  # one rank that has all tokens: test_context_parallel.py has two
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        ids = torch.randint(len(tokenizer()), (2, 6))
        batch = {"input_ids": ids, "position_ids": torch.arange(6).expand(2, 6), "shift_labels": ids.roll(-1, 1)}
        mesh = SimpleNamespace(get_group=lambda: dist.group.WORLD)
        names = {"batch": batch, "mesh": mesh, "context_parallel": lambda *_, **__: nullcontext()}
        return names | {"model": tiny_model(dtype=torch.float32), "ref": torch.tensor([-30.0, -31.0])}
    return {}


def module_of(model):
    """A LightningModule that holds the model: ``module`` of the page on trainers."""
    import lightning

    steps = {
        "training_step": lambda module, batch, _index: module.model(**batch).loss,
        "configure_optimizers": lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
    }
    module = type("Module", (lightning.LightningModule,), steps)()
    module.model = model
    return module


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("page", "blocks"), list(runs()))
def test_blocks_run_as_pasted(page, blocks, registries, tmp_path, monkeypatch):
    for package in re.findall(r"^(?:from|import) (\w+)", "\n".join(blocks), re.MULTILINE):
        pytest.importorskip(package, reason=f"{package} is not installed")
    for name in re.findall(r"^from torch\.nn\.functional import (\w+)", "\n".join(blocks), re.MULTILINE):
        if not hasattr(torch.nn.functional, name):
            pytest.skip(f"torch {torch.__version__} has no {name}")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # no compiler here
    torch._dynamo.reset()  # guards of calls in other tests
    monkeypatch.setenv("VAR_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = given_by(page, tmp_path)
    for number, block in enumerate(blocks):
        if "lightning.Trainer" in block:
            names["module"] = module_of(names["model"])
        before = [p.detach().clone() for p in learners(names)]
        exec(compile(block, f"{page}, block {number + 1}", "exec"), names)
        if re.search(r"\.backward\(|\.train\(\)$|\.fit\(", block, re.MULTILINE):
            after = learners(names)
            made_here = len(after) > len(before)
            changed = made_here or any(not p.equal(q) for p, q in zip(before, after, strict=True))
            assert changed or any(p.grad is not None and p.grad.any() for p in after), "nothing was trained"
        if "loss" in names:
            assert torch.isfinite(names["loss"]).all()
        if "training_step" in names:
            assert_same_loss(names["training_step"])


def learners(names: dict) -> list[torch.Tensor]:
    found = []
    for value in list(names.values()):
        if isinstance(value, torch.nn.Module):
            found += value.parameters()
        elif isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf:
            found.append(value)
    return found


def assert_same_loss(training_step):
    model = tiny_model(dtype=torch.float32)
    ids = torch.randint(len(tokenizer()), (2, 5))
    wanted = model(input_ids=ids, labels=ids).loss.item()
    assert training_step(model, {"input_ids": ids, "labels": ids}).item() == pytest.approx(wanted, rel=2**-17)


def test_every_block_is_found():
    """A block that is indented, or of no language, would not run."""
    for page, text in PAGES.items():
        assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(FENCED.findall(text)), page
        assert not re.search(r"^    (from \w+ import|import \w)", text, re.MULTILINE), page


def test_blocks_of_a_trainer_or_a_model_are_short():
    for page in ("docs/trainers.md", "docs/embedding.md"):
        for block in FENCED.findall(PAGES[page])[1:]:
            assert len([line for line in block.splitlines() if line.strip()]) <= 10, block


def test_the_page_of_trainers_has_every_trainer():
    for name in (
        "Trainer",
        "SFTTrainer",
        "DPOTrainer",
        "KTOTrainer",
        "GRPOTrainer",
        "Accelerator",
        "lightning.Trainer",
    ):
        assert re.search(rf"\b{re.escape(name)}\b", "".join(FENCED.findall(PAGES["docs/trainers.md"]))), name


# -- commands --------------------------------------------------------------------------------------------------------


def commands():
    for page, text in PAGES.items():
        for line in re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), re.MULTILINE):
            words = line.split("#")[0].replace("[", " ").replace("]", " ").split()
            while words and ("=" in words[0] or words[0] in ("OMP_NUM_THREADS=1", "taskset", "-c", "1")):
                words.pop(0)
            if words and (words[0] in ("var-kernels", "python", "make") or words[0].startswith("benchmarks/")):
                yield page, line, words


def known_options(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"var_kernels.cli.{command}").add_arguments(parser)
    names = set(option_names(parser))
    if command == "train":
        for name in methods.METHODS:
            names |= {"--" + field.name.replace("_", "-") for field in fields(config.method_config(name))}
    return names


def test_commands_and_their_options_exist():
    makefile = (ROOT / "Makefile").read_text()
    seen = 0
    for page, line, words in commands():
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        if words[0] == "var-kernels":
            if words[1].endswith(":"):  # its answer
                continue
            assert words[1] in COMMANDS, (page, line)
            assert flags <= known_options(words[1]), (page, line, flags - known_options(words[1]))
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), (page, line)
        else:
            module = words[0] == "python" and words[1] == "-m"
            path = words[2].replace(".", "/") if module else words[1] if words[0] == "python" else words[0]
            file = next((p for p in (ROOT / path, ROOT / f"{path}.py") if p.exists()), None)
            assert file, (page, line)
            text = "".join(p.read_text() for p in (file.rglob("*.py") if file.is_dir() else [file]))
            assert all(flag in text for flag in flags), (page, line, flags)
        seen += 1
    assert seen > 40


# -- the site --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built strictly: a link or an anchor that leads nowhere, or a page that is in no menu, fails."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def test_the_site_searches_and_has_every_public_name(site):
    """The names of every ``__all__``, with their docstrings, stand on a page of the API."""
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "linear_logprob" in index
    anchors = set()
    for path in (site / "api").glob("*.html"):
        page = path.read_text(encoding="utf-8")
        anchors |= set(re.findall(r'id="(var_kernels\.[\w.]+)"', page))
        assert not re.findall(r"(?:<p>|\n)\s*(?:Args|Returns|Raises|Warns):\s*\n.*", page), (
            f"{path.name}: text for a section"
        )
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            if module != "var_kernels":  # its names are shown where they are made
                places = (f"{module}.{name}", f"{module}.{name}.{name}")  # a function called as its file is
                assert anchors & {*places}, f"{module}.{name} is on no page of docs/api"


def test_every_message_is_on_the_page_of_troubleshooting(site):
    page = (site / "troubleshooting.html").read_text(encoding="utf-8")
    for name in ("NonFiniteLossError", "CollapsedWeightsWarning", "IgnoredRewardsWarning", "DataError"):
        assert f"<code>{name}</code>" in page
    assert "Z counts" in page
    assert page.count("<tr>") > 200


PUBLIC = (
    "var_kernels",
    "var_kernels.ops",
    "var_kernels.losses",
    "var_kernels.integrations.hf",
    "var_kernels.integrations.trainer",
    "var_kernels.integrations.trainer.online",
    "var_kernels.integrations.data",
)
CALLS = (
    "var_kernels.integrations.liger",
    "var_kernels.integrations.liger_chunked",
    "var_kernels.integrations.cce",
    "var_kernels.integrations.torch_call",
    "var_kernels.integrations.hf_trainer",
    "var_kernels.integrations.trl",
)


def public_objects():
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            yield module, name
    for module in CALLS:
        for name, value in vars(importlib.import_module(module)).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == module:
                yield module, name


@pytest.mark.parametrize(("module", "name"), list(public_objects()))
def test_a_public_name_has_a_docstring(module, name):
    value = getattr(importlib.import_module(module), name)
    if isinstance(value, type) or callable(value):
        text = value.__doc__ or ""
        # a dataclass without one is given its signature
        assert len(text) > 20, f"{module}.{name} has no docstring"
        assert not text.startswith(f"{name}("), f"{module}.{name} has no docstring"
