"""``make`` sets up the right build of torch: tried with stand-ins for the interpreter, its pip, and the drivers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ranks import HANG

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")
# Says what it is asked to do, and that torch is not there.
PYTHON = """#!/bin/sh
case "$*" in
  *"import torch"*) exit 1 ;;
  *"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *pip*) echo "pip: $*" >&2 ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Runs ``make setup`` in a copy; the words of ``tools`` answer as commands."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints/cpu.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "tools"
    tools.mkdir()

    def tool(name: str, script: str) -> None:
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)

    def run(*found: str, **variables: str) -> str:
        tool("python3", PYTHON)
        for name in found:
            tool(name, "#!/bin/sh\nexit 0\n")
        basics = "/usr/bin:/bin"
        settings = {
            "PYTHON": str(tools / "python3"),
            "ROCM": str(tmp_path / "no-rocm"),
            "CXX": "no-compiler",
            **variables,
        }
        words = [f"{name}={value}" for name, value in settings.items()]
        environment = {**os.environ, "PATH": f"{tools}:{basics}"}
        done = subprocess.run(
            ["make", "setup", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


def test_no_gpu_takes_the_cpu_build(setup):
    said = setup()
    assert "no NVIDIA GPU found, installing the CPU build" in said
    assert "-c constraints/cpu.txt" in said
    assert "ROCm" not in said


def test_an_nvidia_driver_takes_the_build_of_the_index(setup):
    said = setup("nvidia-smi")
    assert "constraints" not in said
    assert "CUDA build" in said


@pytest.mark.parametrize("how", ["rocm-smi", "folder"])
def test_rocm_is_told_what_to_do(setup, how, tmp_path):
    (tmp_path / "rocm").mkdir()
    said = setup("rocm-smi") if how == "rocm-smi" else setup(ROCM=str(tmp_path / "rocm"))
    assert "found ROCm" in said
    assert "install PyTorch's ROCm build" in said
    assert "make clean setup" in said
    assert "-c constraints/cpu.txt" in said


@pytest.mark.parametrize(
    ("system", "machine", "torch"),
    [
        ("linux", "x86_64", "==2.13.0+cpu"),
        ("linux", "aarch64", "==2.13.0+cpu"),
        ("win32", "AMD64", "==2.13.0+cpu"),
        ("darwin", "arm64", "==2.13.0"),  # no Mac wheel has a suffix
    ],
)
def test_each_system_has_one_pin_of_torch(system, machine, torch):
    requirements = pytest.importorskip("packaging.requirements")
    lines = [line for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines() if line[:1] not in ("#", "")]
    where = {"sys_platform": system, "platform_machine": machine}
    pins = [requirements.Requirement(line) for line in lines if line.startswith("torch")]
    assert [str(pin.specifier) for pin in pins if pin.marker is None or pin.marker.evaluate(where)] == [torch]


def test_arguments_reach_the_command():
    text = (ROOT / "Makefile").read_text()
    for goal in ("demo", "test", "bench", "study"):
        recipe = text.split(f"\n{goal}: $(STAMP)\n")[1].splitlines()[0]
        assert recipe.endswith("$(ARGS)"), goal
