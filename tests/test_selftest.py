"""The kernels of csrc/ without torch (selftest.cpp): threads under the thread sanitizer, NEON under an emulator."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "g++")


def build(folder: Path, compiler: str, *flags: str) -> Path:
    program = folder / "selftest"
    command = [compiler, "-std=c++17", "-O2", "-ffp-contract=fast", "-pthread", "-I", "csrc", *flags]
    subprocess.run([*command, "tests/selftest.cpp", "-o", str(program)], cwd=ROOT, check=True, capture_output=True)
    return program


def run(*command: object) -> subprocess.CompletedProcess:
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, env=env)


def thread_sanitizer(folder: Path, *flags: str) -> Path:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER})")
    try:
        program = build(folder, COMPILER, "-g", "-fsanitize=thread", *flags)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{COMPILER} has no thread sanitizer: {error.stderr.decode()[-200:]}")
    if "unexpected memory mapping" in run(program).stderr:
        pytest.skip("the thread sanitizer does not know this kernel's memory layout")
    return program


def test_threads_share_nothing_that_they_write(tmp_path):
    done = run(thread_sanitizer(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "80 passed, 0 failed" in done.stdout


def test_the_thread_sanitizer_notices_shared_rows(tmp_path):
    done = run(thread_sanitizer(tmp_path, "-DSTRIDE=1"))
    assert done.returncode != 0
    assert "data race" in done.stderr


def test_neon(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for program in (compiler, emulator):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here")
    done = run(emulator, build(tmp_path, compiler, "-static"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "80 passed, 0 failed" in done.stdout
