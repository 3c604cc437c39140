"""Options and heading of ``make bench``."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: beside other processes threads that spin cost most

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--shape", action="append", metavar="N,D,V", help="tokens, hidden size, vocabulary; may be given again"
    )


def pytest_report_header():
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return [
        f"loss of N tokens, hidden size D, vocabulary V, on {device}",
        "MiB: peak above the inputs, gradients included. Times: providers take turns; only their ratios carry over.",
    ]


def pytest_generate_tests(metafunc):
    if "shape" not in metafunc.fixturenames:
        return
    given = metafunc.config.getoption("shape")
    try:
        shapes = [tuple(map(int, text.split(","))) for text in given] if given else metafunc.module.SHAPES
        named = {"{} x {} x {}".format(*shape): shape for shape in shapes if min(shape) > 0 and len(shape) == 3}
    except (ValueError, IndexError):
        named = {}
    if not named or len(named) < len(shapes):
        raise pytest.UsageError(f"--shape must be N,D,V: three positive integers, got {' '.join(given)}")
    metafunc.parametrize("shape", named.values(), ids=named.keys())
