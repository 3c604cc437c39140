"""``var-kernels bench``: the gain on this machine for a model's head, against the losses that are installed."""

import argparse
import itertools
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from var_kernels.cli.options import DTYPES, positive

COMPARE = "compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="*", metavar="compare A B", help="compare the results of two runs instead: files or folders"
    )
    parser.add_argument(
        "--model",
        help="whose head: a known name, a config.json, a folder with one, or a name on the hub (default: SmolLM2-135M, "
        "on a GPU Llama-3.1-8B)",
    )
    parser.add_argument(
        "--tokens", type=positive, help="rows of the batch (default 1024, on a GPU 8192, fewer on a slow machine)"
    )
    parser.add_argument("--masked", type=float, default=0.0, help="share of the rows without a label (default 0)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the operands (default: the model's, or bfloat16)")
    parser.add_argument("--seconds", type=float, default=150.0, help="at most how long to measure (default 150)")
    parser.add_argument("--output", default="runs/bench", help="folder of the results (default runs/bench)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of compare: a rise that counts (default 0.05)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console()
    if args.what:
        return _compare(console, args)
    started = time.perf_counter()
    if not 0 <= args.masked < 1:
        raise ValueError(f"--masked must be at least 0 and below 1, got {args.masked:g}")
    import matplotlib  # noqa: F401  (before minutes of work)

    from var_kernels.cli.bench.report import draw, page, print_results
    from var_kernels.integrations.files import atomic_write

    results = _measure(console, args, started + args.seconds)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(results)
    for name, content in (
        ("bench.json", json.dumps(results, indent=1).encode()),
        ("bench.png", picture),
        ("bench.html", page(results, picture).encode()),
    ):
        with atomic_write(folder / name) as part:
            part.write_bytes(content)
    print_results(console, results)
    console.print(f"\n{folder / 'bench.html'}, bench.png, bench.json", highlight=False)
    return 0


def _compare(console, args: argparse.Namespace) -> int:
    from var_kernels.cli.bench.report import compare, read

    if args.what[0] != COMPARE or len(args.what) != 3:
        raise ValueError(f"expected no word, or `compare A B`, got {' '.join(args.what)!r}")
    before, after = map(read, args.what[1:])
    slower = compare(console, before, after, args.tolerance)
    for line in slower:
        console.print(f"slower: {line}", highlight=False)
    return 1 if slower else 0


def _measure(console, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    import torch
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    from var_kernels import __version__
    from var_kernels.cli.bench.measure import MODES, Operands, measure
    from var_kernels.cli.bench.sides import find_sides
    from var_kernels.cli.doctor import backend_lines
    from var_kernels.cli.heads import find_head_size

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    head = find_head_size(args.model or ("Llama-3.1-8B" if on_gpu else "SmolLM2-135M"))
    tokens = args.tokens or (8192 if on_gpu else 1024)
    dtype = getattr(torch, args.dtype) if args.dtype else head.dtype or torch.bfloat16
    sides, missing = find_sides(device)
    about = {
        "model": head.name,
        "hidden": head.hidden,
        "vocab": head.vocab,
        "tokens": tokens,
        "masked": args.masked,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": _machine(torch, device),
        "backend": backend_lines(torch, device)[0],
        "versions": f"var_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    sizes = f"{tokens:,} tokens x {head.hidden:,} hidden x {head.vocab:,} vocabulary"
    console.print(f"{head.name}: {sizes}, {about['dtype']}; {about['machine']}", highlight=False)
    columns = (SpinnerColumn(), "{task.description}", TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("operands", total=None)
        operands = Operands(tokens, head.hidden, head.vocab, dtype, device, args.masked)
        if not args.tokens:
            operands.shorten(len(sides), deadline)
        if len(operands.labels) < tokens:
            about["tokens"] = len(operands.labels)
            console.print(f"{about['tokens']:,} tokens are timed: more would not end in time on this machine")
        steps, first_runs = (len(sides) + 1) * len(MODES), itertools.count(1)

        def advance(what: str) -> None:
            text = f"{next(first_runs)} of {steps}: {what}, first run and memory" if what else "timing in turns"
            progress.update(task, description=f"{text}; at most {args.seconds:.0f} s in all")

        rows = measure(operands, sides, deadline, _free_bytes(torch, device), advance)
    return {"about": about, "rows": [asdict(row) for row in rows], "missing": missing}


def _machine(torch, device) -> str:
    from var_kernels.cli.doctor import count
    from var_kernels.machine import processor

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {count(torch.get_num_threads(), 'thread')}"


def _free_bytes(torch, device) -> int | None:
    from var_kernels.machine import free_memory, memory_limit

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(filter(None, (free_memory(), memory_limit())), default=None)
