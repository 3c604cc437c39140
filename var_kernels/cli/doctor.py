"""``var-kernels doctor``: what this machine has, which backend will run and why not a better one, and what a batch
needs."""

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from var_kernels.cli.options import no_such_model

MIB, GIB = 2**20, 2**30
# Peak bytes per logit of model(..., labels=...).loss.backward() in transformers 5, whose caller lets go of the output:
# log-softmax and two gradients in fp32. A caller who keeps the output also keeps its logits.
PLAIN_BYTES = 12
DTYPES = ("float32", "bfloat16", "float16")
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "flash-attn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    head = "estimate the loss's memory for"
    parser.add_argument("--model", help=f"{head} this causal LM, by name or path")
    parser.add_argument("--hidden", type=int, help=f"{head} a head of this width; with --vocab, instead of --model")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model (default: its own, or float32)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per micro-batch (default 8)")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence (default 2048)")
    parser.add_argument("--workspace-mb", type=float, help="memory for the fused loss's temporaries")


def run(args: argparse.Namespace) -> int:
    for name in ("batch-size", "length", "hidden", "vocab"):
        value = getattr(args, name.replace("-", "_"))
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if (args.hidden is None) != (args.vocab is None):
        given, missing = ("hidden", "vocab") if args.vocab is None else ("vocab", "hidden")
        raise ValueError(f"--{given} needs --{missing} too; or give --model, which has both")
    if args.model and args.hidden:
        raise ValueError("--model and --hidden exclude each other; the model's configuration has its width")
    for label, line in machine_lines():
        print(f"{label:<14} {line}")
    if args.model or args.hidden:
        print()
        for line in memory_lines(args):
            print(line)
    return 0


def machine_lines():
    """(label, text) for versions, machine and backend."""
    import torch

    from var_kernels import __version__

    yield "var-kernels", f"{__version__} ({Path(__file__).parents[1]})"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for package in _PACKAGES:
        yield package, _version(package)
    threads = torch.get_num_threads()
    yield "processor", f"{processor()}, {count(cores(), 'core')}, torch uses {count(threads, 'thread')}"
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


def processor() -> str:
    """The processor's name, as far as the system says it."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_line() -> str:
    """Memory that is there and that is free, and a container's limit where it is lower."""
    kib = {words[0]: int(words[1]) for line in _lines("/proc/meminfo") if len(words := line.split()) > 1}
    if "MemTotal:" in kib:
        total = 1024 * kib["MemTotal:"]
    elif hasattr(os, "sysconf"):  # a Mac
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return "not known on this system"
    free = f", {kib['MemAvailable:'] * 1024 / GIB:.1f} GiB free" if "MemAvailable:" in kib else ""
    limit = memory_limit()
    limited = f", of which this process may have {limit / GIB:.1f} GiB" if limit and limit < total else ""
    return f"{total / GIB:.1f} GiB{free}{limited}"


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def group_folders(controller: str, mounts: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")):
    """Folders of the control groups that this process is in, and of those around them, which limit it as well."""
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers and controller not in controllers.split(","):
            continue
        root = mounts / controller if controllers else mounts  # version 1 has a tree for each controller
        inner = root / path.strip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder == root or root in folder.parents)


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def cpu_quota(**where) -> float | None:
    """CPUs that this process may use at a time (a container's limit); None without a limit."""
    found = []
    for folder in group_folders("cpu", **where):
        words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and words[0] not in ("max", "-1"):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def memory_limit(**where) -> int | None:
    """Bytes that this process may use; None without a limit."""
    found = []
    for folder in group_folders("memory", **where):
        words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        if words and words[0] != "max":
            found.append(int(words[0]))
    return min(found, default=None)


def load_lines(threads: int) -> list[str]:
    """The machine's load, and what to do where this process's threads get fewer CPUs than they are."""
    lines = []
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        lines.append(f"{load:.1f} processes on {count(cores(), 'core')} over the last minute")
        if threads > 1 and load + threads > cores() + 0.5:
            lines.append("threads will wait for each other: OMP_WAIT_POLICY=passive keeps them from spinning meanwhile")
    quota = cpu_quota()
    if quota is not None:
        fewer = f", fewer than the threads: set OMP_NUM_THREADS={max(1, int(quota))}" if quota < threads else ""
        lines.append(f"a quota of {count(quota, 'CPU')}{fewer}")
    return lines


def backend_lines(torch, device) -> list[str]:
    """The backend of the row kernels, and of each faster one why it does not run."""
    from var_kernels.ops.backend import BUILD_COMMAND, choose_backend

    backend, reason = choose_backend(device, torch.float32)
    lines = [f"{backend} ({reason})"]
    if device.type == "cpu":
        built = "no CUDA device answers" if torch.version.cuda else "this build of torch has no CUDA"
        lines.append(f"no GPU: {built}")
        if backend == "torch" and reason != "forced":
            lines.append("build the C++ row kernels, in a checkout: " + BUILD_COMMAND)
    return lines


def memory_lines(args: argparse.Namespace) -> list[str]:
    """The loss's memory above hidden states and weights, plain against fused, from the model's configuration alone."""
    import torch

    from var_kernels.cli.explain import explain_engines, most_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, hidden, vocab, dtype = "", args.hidden, args.vocab, None
    if args.model:
        name, (hidden, vocab, dtype) = f"{args.model}: ", _head_of(args.model)
    dtype = getattr(torch, args.dtype) if args.dtype else dtype or torch.float32
    rows = args.batch_size * args.length
    plain = PLAIN_BYTES * rows * vocab / MIB
    call = (rows, hidden, vocab, dtype, device, args.workspace_mb)
    engines, tiles = explain_engines(*call), most_bytes(*call) / MIB
    two_passes = tiles + (4 * rows * hidden / MIB if dtype.itemsize < 4 else 0)
    weighted = tiles if engines["VAR, SFT"].startswith("one pass") else two_passes
    return [
        f"{name}{rows} rows (batch {args.batch_size} x {args.length} tokens), hidden {hidden}, vocabulary {vocab}, "
        f"{str(dtype).removeprefix('torch.')}",
        f"{'plain loss':<14} about {plain:,.0f} MiB: model(..., labels=...).loss and its backward pass",
        f"{'fused loss':<14} at most {weighted:,.0f} MiB (VAR, SFT), {two_passes:,.0f} MiB (DPO)",
        f"{'':<14} above hidden states, weights and their gradients; --workspace-mb sets the fused loss's",
        *(f"{kind:<14} {engine}" for kind, engine in engines.items()),
    ]


def _head_of(model: str):
    """(hidden, vocabulary, dtype or None) from the configuration."""
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise no_such_model("model", model, error) from error
    dtype = getattr(config, "dtype", None)
    return config.hidden_size, config.vocab_size, dtype if isinstance(dtype, torch.dtype) else None
