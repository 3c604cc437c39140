"""A pytest plugin: writes each test's outcome to a CSV as it ends, and leaves out those that passed in an earlier call.

GPU_TESTS_CSV names the file that is appended to, GPU_TESTS_DONE one of an earlier call.
"""

import csv
import os
from pathlib import Path


def passed(path: Path) -> set[str]:
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {row[0] for row in csv.reader(file) if len(row) == 3 and row[1] == "passed"}


def pytest_collection_modifyitems(config, items):
    done = passed(Path(os.environ.get("GPU_TESTS_DONE", "/nonexistent")))
    left = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = left


def pytest_runtest_logreport(report):
    # Workers of xdist report to the process that started them, which writes.
    if "PYTEST_XDIST_WORKER" in os.environ or "GPU_TESTS_CSV" not in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        with Path(os.environ["GPU_TESTS_CSV"]).open("a", newline="") as file:
            csv.writer(file).writerow([report.nodeid, report.outcome, f"{report.duration:.2f}"])
