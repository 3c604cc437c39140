"""``var-kernels bench``: the benchmarks, which live in the source repository."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pytest_args", nargs="*", metavar="ARG", help="handed to pytest, e.g. -- --shape 1024,1024,32000"
    )


def run(args: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not any(folder.glob("*.py")):
        raise FileNotFoundError(
            f"no benchmarks in {folder}: an installed package does not hold them; clone the repository and run make "
            "bench there"
        )
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ModuleNotFoundError("No module named 'pytest_benchmark'", name="pytest_benchmark")
    return subprocess.call(
        [
            sys.executable,
            "-m",
            "pytest",
            str(folder),
            "--benchmark-only",
            "--benchmark-columns=median,iqr,rounds",
            *args.pytest_args,
        ],
        cwd=folder.parent,
    )
