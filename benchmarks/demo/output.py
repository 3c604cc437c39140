"""The demo's output directory: filled under a staging folder, moved into place once all of it is there."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # accelerate needs it, too

METRICS = "metrics.json"
REPORT = "report.html"
# The mark first; the report, which speaks of all, last.
_OWN = (METRICS, "data", "models", "samples.jsonl", "history.jsonl", REPORT)
_MARK = "var-kernels demo"


def check_output(target: Path) -> None:
    """Refuse a folder that the demo may not write into.

    Raises:
        ValueError: ``target`` is a file, or holds something that no demo wrote under a name that the demo uses.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"--output: expected a directory, {target} is a file; choose another")
    taken = [name for name in _OWN if (target / name).exists()]
    if taken and not _is_ours(target):
        raise ValueError(f"--output: {target} holds {taken[0]}, which no demo wrote; choose another directory")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder to write into. On success its entries replace an earlier run's in ``target``, else nothing changes."""
    created = [folder for folder in (target, *target.parents) if not folder.exists()]
    target.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(target)
    staging = target / f".partial-{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
        (target / REPORT).unlink(missing_ok=True)
        for name in _OWN:
            if (target / name).is_dir():
                shutil.rmtree(target / name)
            os.replace(staging / name, target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in created:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _clear_abandoned(target: Path) -> None:
    """Remove the staging folders of runs that were killed."""
    for folder in target.glob(".partial-*"):
        pid = folder.name.removeprefix(".partial-")
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_ours(target: Path) -> bool:
    try:
        return json.loads((target / METRICS).read_text(encoding="utf-8"))["made_by"] == _MARK
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_jsonl(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_metrics(folder: Path, metrics: dict) -> None:
    (folder / METRICS).write_text(json.dumps({"made_by": _MARK, **metrics}, indent=2) + "\n", encoding="utf-8")
