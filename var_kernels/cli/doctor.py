"""``var-kernels doctor``: this machine, the backend that will run and why not a better one, a check against fp64."""

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from var_kernels import machine

GIB = 2**30
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "flash-attn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    for label, line in machine_lines():
        print(f"{label:<14} {line}")
    verdict = check_against_fp64()
    print(f"{'self-check':<14} {verdict}")
    return 1 if verdict.startswith("WRONG") else 0


def machine_lines():
    """(label, text) for versions, machine and backend."""
    import torch

    from var_kernels import __version__

    yield "var-kernels", f"{__version__} ({Path(__file__).parents[1]})"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for package in _PACKAGES:
        yield package, _version(package)
    threads = torch.get_num_threads()
    yield "processor", f"{machine.processor()}, {count(machine.cores(), 'core')}, torch uses {count(threads, 'thread')}"
    yield "memory", memory_line()
    for label, line in zip(("load", "", ""), load_lines(threads), strict=False):
        yield label, line
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        yield "device", _gpu(torch)
    for label, line in zip(("backend", "", "", ""), backend_lines(torch, device), strict=False):
        yield label, line


def _version(package: str) -> str:
    if package == "torch":
        from torch import __version__

        return __version__  # with the build's suffix, which the metadata of some builds leave out
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu(torch) -> str:
    properties = torch.cuda.get_device_properties(0)
    more = f" ({torch.cuda.device_count()} of them)" if torch.cuda.device_count() > 1 else ""
    return f"{properties.name}{more}, {properties.total_memory / GIB:.0f} GiB, sm_{properties.major}{properties.minor}"


def count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"


def memory_line() -> str:
    """Memory that is there and that is free, and a container's limit where it is lower."""
    total, available, limit = machine.total_memory(), machine.free_memory(), machine.memory_limit()
    if total is None:
        return "not known on this system"
    free = f", {available / GIB:.1f} GiB free" if available is not None else ""
    limited = f", of which this process may have {limit / GIB:.1f} GiB" if limit and limit < total else ""
    return f"{total / GIB:.1f} GiB{free}{limited}"


def load_lines(threads: int) -> list[str]:
    """The machine's load, and what to do where this process's threads get fewer CPUs than they are."""
    lines = []
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        lines.append(f"{load:.1f} processes on {count(machine.cores(), 'core')} over the last minute")
        if threads > 1 and load + threads > machine.cores() + 0.5:
            lines.append("threads will wait for each other: OMP_WAIT_POLICY=passive keeps them from spinning meanwhile")
    quota = machine.cpu_quota()
    if quota is not None:
        fewer = f", fewer than the threads: set OMP_NUM_THREADS={max(1, int(quota))}" if quota < threads else ""
        lines.append(f"a quota of {count(quota, 'CPU')}{fewer}")
    return lines


def backend_lines(torch, device) -> list[str]:
    """The backend of the row kernels, and of each faster one why it does not run."""
    from var_kernels.kernels.rows_native import BUILD_COMMAND
    from var_kernels.ops.backend import choose_backend

    backend, reason = choose_backend(device, torch.float32)
    lines = [f"{backend} ({reason})"]
    if device.type == "cpu":
        built = "no CUDA device answers" if torch.version.cuda else "this build of torch has no CUDA"
        lines.append(f"no GPU: {built}")
        if backend == "torch" and reason != "forced":
            lines.append("build the C++ row kernels, in a checkout: " + BUILD_COMMAND)
    return lines


def check_against_fp64() -> str:
    """The verdict on log-probs and gradients of a small problem on this machine's backend."""
    import torch

    from var_kernels import linear_logprob

    def plain_logprob(hidden, weight, labels):
        return (hidden @ weight.t()).log_softmax(1).gather(1, labels[:, None]).squeeze(1)

    def run(op, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in operands]
        logp = op(*leaves, labels)
        return [logp.detach(), *torch.autograd.grad((logp * upstream.to(logp.dtype)).sum(), leaves)]

    device, draw = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.Generator().manual_seed(0)
    labels = torch.randint(507, (63,), generator=draw).to(device)
    upstream = torch.randn(63, generator=draw).to(device)
    figures = []
    for dtype, most in ((torch.float32, 2e-5), (torch.bfloat16, 2**-8)):
        operands = [torch.randn(shape, generator=draw).to(device, dtype) for shape in ((63, 72), (507, 72))]
        pairs = zip(run(linear_logprob, dtype), run(plain_logprob, torch.float64), strict=True)
        errors = [((found - truth).square().sum() / truth.square().sum()).sqrt().item() for found, truth in pairs]
        name, worst = str(dtype).removeprefix("torch."), max(errors)
        if not worst <= most:
            return f"WRONG: in {name} a relative error of {worst:.1e}, expected at most {most:.1e}; please report it"
        figures.append(f"{worst:.0e} in {name}")
    return f"right: largest relative error of log-probs and gradients against fp64 {', '.join(figures)}"
