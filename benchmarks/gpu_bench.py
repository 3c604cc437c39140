"""Roofs, primitive timings and the comparison with other libraries on one GPU; one CSV a section.

    python benchmarks/gpu_bench.py --out DIR [--dry-run] [--sections roofs primitives compare] [--minutes 6]

Times are medians (p20, p80) of interleaved runs by CUDA events, with the L2 cache flushed before each and fresh
gradients; memory is the allocator's peak above the inputs. ``--dry-run`` runs tiny shapes on a CPU.
"""

import argparse
import csv
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks import gpu_providers
from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats
from var_kernels.ops.backend import choose_backend, row_kernels
from var_kernels.ops.gemm import add_product, logits_into, product_into

TFLOP, GIGA, MIB = 1e12, 1e9, 2**20


class Bench:
    """Where to run, how long, and how to time."""

    def __init__(self, dry_run: bool, minutes: float):
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dry_run = dry_run
        self.deadline = time.monotonic() + 60 * minutes
        self._flush = None if dry_run else torch.empty(256 * MIB, dtype=torch.uint8, device=self.device)

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def once(self, step) -> float:
        """Milliseconds of one run."""
        if self.dry_run:
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)
        self._flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    def times(self, steps: dict, runs: int) -> dict[str, dict[str, float]]:
        """Interleaved: every step once a round. median, p20, p80 in ms."""
        runs = 2 if self.dry_run else runs
        found = {name: [] for name in steps}
        for step in steps.values():
            step()
            step()
        for _ in range(runs):
            for name, step in steps.items():
                found[name].append(self.once(step))
        return {name: _quantiles(ms) for name, ms in found.items()}

    def randn(self, *shape, dtype=torch.bfloat16, scale=1.0):
        return (torch.randn(*shape, device=self.device) * scale).to(dtype)


def _quantiles(ms: list[float]) -> dict[str, float]:
    values = torch.tensor(ms, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return dict(zip(("ms", "p20", "p80"), values.tolist(), strict=True))


def _copy_row(bench: Bench) -> dict:
    source = torch.empty(1 << (16 if bench.dry_run else 31), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    timing = bench.times({"copy": lambda: target.copy_(source)}, 10)["copy"]
    return {"what": "copy", **timing, "rate": 2 * source.numel() / timing["ms"] * 1e3 / GIGA, "unit": "GB/s"}


def roofs(bench: Bench) -> list[dict]:
    """Copy bandwidth, and the bf16 GEMM at a square and at the op's own shapes."""
    rows = [_copy_row(bench)]
    shapes = [(8192, 8192, 8192), (8192, 4096, 128256), (2048, 4096, 128256), (8192, 896, 151936)]
    for n, d, v in [(64, 32, 128)] if bench.dry_run else shapes:
        hidden, weight = bench.randn(n, d), bench.randn(v, d, scale=0.02)
        timing = bench.times({"mm": lambda h=hidden, w=weight: h @ w.T}, 10)["mm"]
        flop = 2 * n * d * v
        rate = flop / timing["ms"] * 1e3 / TFLOP
        rows.append({"what": f"mm {n}x{d}x{v}", **timing, "rate": rate, "unit": "TFLOP/s"})
    return rows


def primitives(bench: Bench) -> list[dict]:
    """What decides the defaults: output precision, accumulation, slice widths, chunk lengths, row kernels."""
    n, d, v = (64, 32, 512) if bench.dry_run else (8192, 4096, 128256)
    widths = (128, 256) if bench.dry_run else (8192, 16384, 32768)
    chunks = (16, 32) if bench.dry_run else (1024, 2048, 4096)
    hidden, weight = bench.randn(n, d), bench.randn(v, d, scale=0.02)
    rows, backend = [], choose_backend(bench.device, torch.float32)[0]

    def record(what, timing, flop=None, bytes_moved=None):
        rate = flop / timing["ms"] * 1e3 / TFLOP if flop else bytes_moved / timing["ms"] * 1e3 / GIGA
        rows.append({"what": what, **timing, "rate": rate, "unit": "TFLOP/s" if flop else "GB/s"})

    chunk = hidden[: chunks[1]]
    operand = chunk.float() if bench.dry_run else chunk  # only CUDA takes 16-bit operands to fp32
    wide = torch.empty(chunks[1], v, dtype=torch.float32, device=bench.device)
    narrow = torch.empty(chunks[1], v, dtype=torch.bfloat16, device=bench.device)
    timings = bench.times(
        {
            "logits, fp32 out": lambda: logits_into(wide, operand, weight, backend),
            "logits, bf16 out": lambda: torch.mm(chunk, weight.T, out=narrow),
        },
        10,
    )
    for name, timing in timings.items():
        record(name, timing, flop=2 * chunks[1] * d * v)
    for name, timing in bench.times(_overlap_steps(bench, wide, operand, weight), 10).items():
        record(name, timing, flop=chunks[1] * d * v)
    dhidden = torch.zeros(n, d, dtype=torch.float32, device=bench.device)
    for width in widths:
        dlogits, dweight = bench.randn(n, width), torch.empty(width, d, dtype=torch.bfloat16, device=bench.device)
        steps = {
            f"dH += dlogits W, slice {width}": lambda g=dlogits, w=width: add_product(dhidden, g, weight[:w], backend),
            f"dW = dlogits^T H, slice {width}": lambda g=dlogits, o=dweight: product_into(o, g.t(), hidden, backend),
        }
        for name, timing in bench.times(steps, 10).items():
            record(name, timing, flop=2 * n * d * width)
    total = torch.zeros(v, d, dtype=torch.float32, device=bench.device)
    for length in chunks:
        dlogits = bench.randn(length, v)
        timing = bench.times({"": lambda g=dlogits, c=length: add_product(total, g.t(), hidden[:c], backend)}, 5)[""]
        record(f"fp32 dW += dlogits^T H, chunk {length}", timing, flop=2 * length * d * v)
    for tile in (wide, narrow):
        for name, timing in _row_kernels(bench, tile).items():
            # The gradient is written in bf16, into the tile's own storage where the backend can.
            written = 2 * tile.numel() if "grad" in name else 0
            record(f"{name}, {tile.dtype}", timing, bytes_moved=tile.numel() * tile.element_size() + written)
    return rows


def _overlap_steps(bench: Bench, tile: torch.Tensor, operand: torch.Tensor, weight: torch.Tensor) -> dict:
    """The GEMM of half a tile and the statistics of the other half: one after the other, and on two streams."""
    half = tile.shape[0] // 2
    backend = choose_backend(bench.device, tile.dtype)[0]
    kernels = row_kernels(backend)
    labels = torch.zeros(half, 1, dtype=torch.int64, device=bench.device)
    stats = RowStats.empty(half, 1, tile, entropy=False, mean=False, argmax=False)
    tile.zero_()

    def gemm():
        logits_into(tile[:half], operand[:half], weight, backend)

    def statistics():
        kernels.row_stats(tile[half : 2 * half], labels, stats, 0, None, LogitTransform())

    def serial():
        gemm()
        statistics()

    if bench.dry_run:
        return {"logits and row_stats, one stream": serial, "logits and row_stats, two streams": serial}
    other = torch.cuda.Stream()

    def overlapped():
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            statistics()
        gemm()
        torch.cuda.current_stream().wait_stream(other)

    return {"logits and row_stats, one stream": serial, "logits and row_stats, two streams": overlapped}


def _row_kernels(bench: Bench, tile: torch.Tensor) -> dict:
    n, v = tile.shape
    tile.normal_()
    kernels = row_kernels(choose_backend(bench.device, tile.dtype)[0])
    labels = torch.randint(0, v, (n, 1), device=bench.device)
    lse = torch.full((n,), 12.0, device=bench.device)
    coefficients = RowCoefficients(-torch.ones_like(lse), torch.ones(n, 1, device=bench.device))
    bare = RowStats.empty(n, 1, tile, entropy=False, mean=False, argmax=False)
    full = RowStats.empty(n, 1, tile, entropy=True, mean=True, argmax=True)
    head = (None, LogitTransform())
    steps = {
        "row_stats": lambda: kernels.row_stats(tile, labels, bare, 0, *head),
        "row_stats, every output": lambda: kernels.row_stats(tile, labels, full, 0, *head),
        "row_grad": lambda: kernels.row_grad(tile, labels, lse, coefficients, 0, *head, torch.bfloat16),
    }
    return bench.times(steps, 10)


def compare(bench: Bench) -> list[dict]:
    """Ours and others on the same inputs: time of forward and backward, peak memory, error of a sample."""
    shapes = [
        (8192, 4096, 128256),
        (8192, 896, 151936),
        (4096, 2048, 32000),
        (8192, 4096, 151936),
        (8192, 2304, 256000),
        (32768, 4096, 128256),
    ]
    rows = []
    for n, d, v in [(48, 16, 200)] if bench.dry_run else shapes:
        if bench.out_of_time():
            rows.append({"shape": f"{n}x{d}x{v}", "provider": "", "note": "skipped: out of time"})
            continue
        rows += gpu_providers.compare_shape(bench, n, d, v)
    return rows


SECTIONS = {"roofs": roofs, "primitives": primitives, "compare": compare}


def header(bench: Bench) -> str:
    versions = []
    for package in ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels"):
        try:
            versions.append(f"{package}={importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if bench.dry_run:
        return f"# dry run on a CPU: no figure here means anything; {' '.join(versions)}"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    machine = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    commit = commit or os.environ.get("COMMIT", "unknown")
    return f"# {machine}; python={platform.python_version()} {' '.join(versions)} commit={commit}"


def write(path: Path, head: str, rows: list[dict]) -> None:
    """Whole or not at all: a partial file would count as done on the next call."""
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        file.write(head + "\n")
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()})
    part.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=5.0, help="no new shape is begun after this")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run exercises the sections on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.dry_run, args.minutes)
    torch.manual_seed(0)
    failed = []
    for name in args.sections:
        path = args.out / f"{name}.csv"
        if path.exists():
            print(f"{name}: done before, {path}")
            continue
        start = time.monotonic()
        try:
            rows = SECTIONS[name](bench)
        except Exception:
            failed.append(name)
            (args.out / f"{name}.error.txt").write_text(traceback.format_exc())
            print(f"{name}: FAILED\n{traceback.format_exc()}", file=sys.stderr)
            continue
        write(path, header(bench), rows)
        print(f"{name}: {time.monotonic() - start:.0f} s -> {path}\n{path.read_text()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
