"""The kernels of csrc/ without torch (selftest.cpp): threads under the thread sanitizer, NEON under an emulator, AMX
over an emulation of its instructions (amx_emulation.h).
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ranks import HANG

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "g++")
# What csrc/gemm_x86.h could say instead; each must be noticed.
MISTAKES = {
    "operands swapped": ("_tile_dpbf16ps(2, 5, 6)", "_tile_dpbf16ps(2, 6, 5)"),
    "the other operand's panel": ("b + right_panel", "b + left_panel"),
    "a tile that keeps old sums": ("ColumnTiles > 1) _tile_zero(3)", "ColumnTiles > 1) _tile_zero(2)"),
    "tiles not configured": ("{ _tile_loadconfig(kTileConfig); }", "{}"),
    "tiles not released": ("{ _tile_release(); }", "{}"),
    "B packed as A": (
        "kAmx = {pack<uint16_t, false>, pack<uint16_t, true>",
        "kAmx = {pack<uint16_t, false>, pack<uint16_t, false>",
    ),
}


def build(folder: Path, compiler: str, *flags: str) -> Path:
    program = folder / "selftest"
    command = [compiler, "-std=c++17", "-O2", "-ffp-contract=fast", "-pthread", *flags, "-I", "csrc"]
    subprocess.run([*command, "tests/selftest.cpp", "-o", str(program)], cwd=ROOT, check=True, capture_output=True)
    return program


def run(*command: object) -> subprocess.CompletedProcess:
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=HANG, env=env)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The program under the thread sanitizer, and a run of it."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER})")
    try:
        program = build(tmp_path_factory.mktemp("sanitized"), COMPILER, "-g", "-fsanitize=thread")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{COMPILER} has no thread sanitizer: {error.stderr.decode()[-200:]}")
    done = run(program)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not know this kernel's memory layout")
    return program, done


def test_threads_share_nothing_that_they_write(sanitized):
    _, done = sanitized
    assert done.returncode == 0, done.stdout + done.stderr
    assert "168 passed, 0 failed" in done.stdout


def test_the_thread_sanitizer_notices_shared_rows(sanitized):
    program, _ = sanitized
    done = run(program, "shared")
    assert done.returncode != 0
    assert "data race" in done.stderr


def test_neon(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for program in (compiler, emulator):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here")
    done = run(emulator, build(tmp_path, compiler, "-static"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "168 passed, 0 failed" in done.stdout


def amx(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER})")
    probe = subprocess.run([COMPILER, "-dM", "-E", "-x", "c++", "csrc/cpu.h"], cwd=ROOT, capture_output=True, text=True)
    if "VK_BF16_TARGETS" not in probe.stdout:
        pytest.skip(f"{COMPILER} compiles no AMX for this processor")
    done = run(build(folder, COMPILER, *flags, "-include", "tests/amx_emulation.h"))
    if "skipped" in done.stdout:
        pytest.skip(done.stdout.strip())
    return done


def test_amx_over_its_emulation(tmp_path):
    done = amx(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "126 passed, 0 failed" in done.stdout


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_amx_kernels_is_noticed(mistake, tmp_path):
    right, wrong = MISTAKES[mistake]
    text = (ROOT / "csrc/gemm_x86.h").read_text()
    assert text.count(right) == 1
    (tmp_path / "gemm_x86.h").write_text(text.replace(right, wrong))
    done = amx(tmp_path, "-O1", "-I", str(tmp_path))
    assert done.returncode != 0
    assert "FAILED" in done.stdout or "AMX: " in done.stderr
