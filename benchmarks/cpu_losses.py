"""The fused loss against its alternatives on a CPU: processor time and peak memory, one process for each shape.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.cpu_losses [--shape N,D,V] [--dtype bfloat16]
    python -m benchmarks.cpu_losses --threads 1,2,all [--busy] [--only forward,"one pass"]

Writes OUT/loss-NxDxV-DTYPE.csv for every shape, leaving out those that are there (--again: none), and draws
OUT/loss-DTYPE.png and OUT/time-memory.png with matplotlib; OUT is benchmarks/results/cpu- and the instructions of this
machine's GEMM. --threads: numbers of threads that take turns, into OUT/threads-NxDxV-DTYPE.csv; --busy: beside a
process that never rests, into OUT/busy-NxDxV-DTYPE.csv.
Medians (p20, p80) of interleaved runs: processor time, and time on the clock; peak: exact, above the operands, with the
gradients that are returned.
Operands: random, logits of standard deviation 3.

- bare GEMMs: torch.mm alone, in the operands' dtype: 1 (forward), 3 (gradients in one pass), 4 (in two), 2 + 1 less dW
  (frozen head). Their results have rounded logits and no loss.
- default: the engine and the workspace of a call without options.
- kept: a workspace that holds all logits, as the alternatives do.
- gradients of the alternatives come from one backward; they stand in the lines of both one pass and two.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.cpu_machine import header, results_folder
from benchmarks.cpu_plots import draw_plots
from var_kernels import linear_weighted_nll
from var_kernels.measure import peak_extra_bytes
from var_kernels.ops.backend import use_backend

SHAPES = [(1024, 1024, 32000), (4096, 512, 50257), (512, 2048, 128256), (2048, 896, 151936)]
DTYPES = ("bfloat16", "float32")
MODES = ("forward", "one pass", "two passes", "frozen head")
MIB = 1 << 20
COLUMNS = (
    "n",
    "d",
    "v",
    "dtype",
    "threads",
    "provider",
    "mode",
    "ms",
    "p20",
    "p80",
    "wall_ms",
    "of_the_gemms",
    "peak_mib",
)


def one_pass_mb(n: int, d: int, v: int, tile: int, accumulator: int) -> float:
    """Workspace of one pass: all rows, or chunks of 1024 beside the sums of dW, whichever is less."""
    return min(n * v * tile, v * (d * accumulator + min(n, 1024) * tile)) / MIB + 16


def kept_mb(n: int, d: int, v: int, tile: int) -> float:
    """Workspace of two passes that keep all logits for the backward: as many GEMMs as one pass, for any loss."""
    return (n * v * tile + 8 * (n + v) * d) / MIB + 16


def linear_then_loss(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels)


def alternatives() -> dict:
    """Name -> loss(hidden, weight, labels); those that are not installed are left out."""
    found = {"F.linear + F.cross_entropy": linear_then_loss, "torch.compile of it": torch.compile(linear_then_loss)}
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss

        found["transformers' loss"] = lambda h, w, y: ForCausalLMLoss(F.linear(h, w), y, w.shape[0], shift_labels=y)
    except ImportError:
        pass
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = F.linear_cross_entropy
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["CCE, torch_compile"] = lambda h, w, y: linear_cross_entropy(h, w, y, impl="torch_compile")
    except ImportError:
        pass
    return found


def bare_gemms(hidden, weight) -> dict:
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype)

    def run(gemms):
        for gemm in gemms:
            gemm()

    forward = lambda: torch.mm(hidden, weight.t(), out=logits)  # noqa: E731
    dhidden = lambda: torch.mm(logits, weight)  # noqa: E731
    dweight = lambda: torch.mm(logits.t(), hidden)  # noqa: E731
    sets = ([forward], [forward, dhidden, dweight], [forward, forward, dhidden, dweight], [forward, dhidden])
    return {mode: lambda gemms=gemms: run(gemms) for mode, gemms in zip(MODES, sets, strict=True)}


def cases(shape, dtype: torch.dtype) -> dict:
    """(provider, mode) -> call."""
    n, d, v = shape
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    weight = (torch.randn(v, d) * (3 * d**-0.5)).to(dtype).requires_grad_()
    frozen, labels = weight.detach(), torch.randint(v, (n,))
    calls = {("bare GEMMs", mode): call for mode, call in bare_gemms(hidden.detach(), frozen).items()}

    def forward(loss):
        with torch.no_grad():
            return loss(hidden, weight, labels)

    def gradients(loss):
        return torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))

    def with_frozen_head(loss):
        return torch.autograd.grad(loss(hidden, frozen, labels), hidden)

    def add(provider, mode, how, loss):
        calls[provider, mode] = lambda: how(loss)

    def ours(**options):
        return lambda h, w, y: linear_weighted_nll(h, w, y, None, reduction="mean", **options)

    for precision in ("fp32", "fast") if dtype == torch.bfloat16 else ("fp32",):
        name = f"var_kernels, {precision} logits"
        tile = 2 if precision == "fast" else 4
        budget = one_pass_mb(n, d, v, tile, 4 if dtype == torch.bfloat16 else 0)
        add(name, "forward", forward, ours(precision=precision))
        add(name, "one pass", gradients, ours(precision=precision, engine="one_pass", workspace_mb=budget))
        add(name, "two passes", gradients, ours(precision=precision, engine="two_pass", workspace_mb=64))
        add(f"{name}, default", "one pass", gradients, ours(precision=precision))
        kept = ours(precision=precision, engine="two_pass", workspace_mb=kept_mb(n, d, v, tile))
        add(f"{name}, kept", "two passes", gradients, kept)
        add(name, "frozen head", with_frozen_head, ours(precision=precision))

    def plain(h, w, y):
        with use_backend("torch"):
            return linear_weighted_nll(h, w, y, None, reduction="mean")

    for name, loss in {"var_kernels in plain torch": plain, **alternatives()}.items():
        add(name, "forward", forward, loss)
        add(name, "two passes", gradients, loss)
        add(name, "frozen head", with_frozen_head, loss)
    return calls


@contextmanager
def competitor(wanted: bool):
    """Beside a process that never rests."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def timed(call, threads: int) -> tuple[float, float]:
    """Milliseconds of processor time and on the clock."""
    torch.set_num_threads(threads)
    wall, start = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.process_time() - start), 1e3 * (time.perf_counter() - wall)


def measure(shape, dtype: str, args: argparse.Namespace, path: Path) -> None:
    torch.manual_seed(0)
    calls = {key: call for key, call in cases(shape, getattr(torch, dtype)).items() if wanted(key, args.only)}
    peaks, times = {}, {}
    for key, call in list(calls.items()):
        try:
            peaks[key] = peak_extra_bytes(call) / MIB
            times |= {(*key, threads): [] for threads in args.threads}
            # A compiled loss is compiled for a number of threads.
            for threads in args.threads[1:]:
                timed(call, threads)
        except Exception as error:
            print(f"{key}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            del calls[key]
    with competitor(args.busy):
        for _ in range(args.runs):
            for key, call in calls.items():
                for threads in args.threads:
                    times[(*key, threads)].append(timed(call, threads))
    with path.open("w", newline="") as out:
        print(header(), file=out)
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        for (provider, mode, threads), pairs in times.items():
            if (provider, mode) not in calls:
                continue
            values, walls = (sorted(column) for column in zip(*pairs, strict=True))
            middle, bare = statistics.median(values), times.get(("bare GEMMs", mode, threads))
            low, high = values[len(values) // 5], values[-1 - len(values) // 5]
            of_the_gemms = f"{middle / statistics.median(ms for ms, _ in bare):.3f}" if bare else ""
            row = [f"{middle:.1f}", f"{low:.1f}", f"{high:.1f}", f"{statistics.median(walls):.1f}", of_the_gemms]
            writer.writerow([*shape, dtype, threads, provider, mode, *row, f"{peaks[provider, mode]:.1f}"])
    show(path)


def wanted(key: tuple[str, str], only: list[str]) -> bool:
    """Whether a provider or a mode of ``key`` is asked for; all where nothing is."""
    return not only or any(word in name for word in only for name in key)


def show(path: Path) -> None:
    """The file as a table: a line a provider and number of threads, the fastest of a mode first."""
    rows = list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
    if not rows:
        return
    first = rows[0]
    print(f"\n{first['n']} tokens x {first['d']} hidden x {first['v']} vocabulary, {first['dtype']}: {path}")
    for mode in MODES:
        print(f"  {mode:<34}{'threads':>8}{'ms':>10}{'on the clock':>14}{'of the GEMMs':>14}{'peak MiB':>10}")
        for row in sorted((row for row in rows if row["mode"] == mode), key=lambda row: float(row["ms"])):
            wall = f"{float(row['wall_ms']):,.1f}" if row.get("wall_ms") else ""
            print(
                f"    {row['provider']:<32}{row.get('threads', '1'):>8}{float(row['ms']):>10,.1f}{wall:>14}"
                f"{float(row['of_the_gemms'] or 'nan'):>14.2f}{float(row['peak_mib']):>10,.0f}"
            )
    print(flush=True)


def thread_counts(text: str) -> list[int]:
    """Numbers, or ``all``, separated by commas."""
    counts = [os.cpu_count() if part == "all" else int(part) for part in text.split(",")]
    return list(dict.fromkeys(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results_folder(), help="default: %(default)s")
    parser.add_argument("--shape", help="N,D,V; all of the list if not given")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", default=None, help="1,2,all: numbers of threads; 1 if not given")
    parser.add_argument("--busy", action="store_true", help="beside a process that never rests")
    parser.add_argument("--only", default="", help="providers and modes by parts of their names, separated by commas")
    parser.add_argument("--again", action="store_true", help="also what has its file already")
    parser.add_argument("--plot", action="store_true", help="draw what has been measured, measure nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.plot:
        draw_plots(args.out)
        return
    shapes = [tuple(map(int, args.shape.split(",")))] if args.shape else SHAPES
    dtypes = [args.dtype] if args.dtype else DTYPES
    todo = [(shape, dtype) for dtype in dtypes for shape in shapes]
    kind = "busy" if args.busy else "threads" if args.threads else "loss"
    paths = {(s, t): args.out / f"{kind}-{'x'.join(map(str, s))}-{t}.csv" for s, t in todo}
    todo = [key for key in todo if args.again or not paths[key].exists()]
    if args.shape and args.dtype:
        args.threads, args.only = thread_counts(args.threads or "1"), [word for word in args.only.split(",") if word]
        for shape, dtype in todo:
            measure(shape, dtype, args, paths[shape, dtype])
        return
    for shape, dtype in todo:
        command = [sys.executable, "-m", "benchmarks.cpu_losses", "--shape", ",".join(map(str, shape)), "--again"]
        command += ["--dtype", dtype, "--out", str(args.out), "--runs", str(args.runs), "--only", args.only]
        command += ["--busy"] * args.busy + (["--threads", args.threads] if args.threads else [])
        done = subprocess.run(command, check=False, env=os.environ)
        if done.returncode:
            print(f"{shape} {dtype}: failed with {done.returncode}", file=sys.stderr)
    draw_plots(args.out)


if __name__ == "__main__":
    main()
