"""Measures every section on one GPU, one CSV a section, each row written as soon as it is there.

    python benchmarks/gpu_bench.py --out DIR [--seconds 360] [--rank 1] [--sections roofs ...] [--retry] [--plan]

Items run in a worker process. One that crashes, or takes longer than its limit, gets a row that says so, and a new
worker goes on after it; so it does after a kernel that left the device unusable for its process. What is in the CSVs is
not measured again: the next call continues. ``--rank 1`` leaves out what has a higher rank. ``--dry-run`` runs tiny
shapes on a CPU. Exit status 1 where something failed that is not another library.
"""

import argparse
import csv
import gc
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu_timing import Item

ROOT = Path(__file__).parents[1]
# A worker's start: imports, the device's context.
START_SECONDS = 15


def all_sections() -> dict[str, Callable]:
    """Name -> function of dry_run that lists the items."""
    from benchmarks import gpu_compare, gpu_primitives, gpu_training

    return {**gpu_primitives.SECTIONS, **gpu_compare.SECTIONS, **gpu_training.SECTIONS}


# Within a rank.
ORDER = (
    "roofs",
    "rowkernels",
    "forward",
    "primitives",
    "crossover",
    "compare",
    "masked",
    "step",
    "batch",
    "divergence",
    "hard",
    "curve",
)


class Table:
    """A section's CSV: a header line, then rows; all rows of an item are written at once, the file as a whole."""

    def __init__(self, path: Path):
        self.path = path
        self.header, self.rows = "", []
        if path.exists():
            self.header, *lines = path.read_text().splitlines()
            self.rows = list(csv.DictReader(lines))

    @property
    def done(self) -> set[str]:
        return {row["key"] for row in self.rows}

    def forget_failures(self) -> None:
        kept = [row for row in self.rows if not row["note"].startswith(("failed", "not here"))]
        if len(kept) < len(self.rows):
            self.rows = kept
            self._write()

    def add(self, header: str, key: str, rows: list[dict]) -> None:
        self.header = self.header or header
        # Beside clocks.log, which has the clocks of that second.
        ended = time.strftime("%Y/%m/%d %H:%M:%S")
        self.rows += [{"key": key, "ended": ended, "note": "", **row} for row in rows]
        self._write()

    def _write(self) -> None:
        fields = list(dict.fromkeys(field for row in self.rows for field in row if field != "note"))
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            file.write(self.header + "\n")
            writer = csv.DictWriter(file, fieldnames=[*fields, "note"], restval="")
            writer.writeheader()
            for row in self.rows:
                writer.writerow({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()})
        part.replace(self.path)


def todo(args, sections: dict[str, Callable]) -> "list[Item]":
    """Items that have no row yet, in order of value: a call that is cut has the first ones."""
    found = []
    for name in sorted(args.sections or sections, key=ORDER.index):
        done = Table(args.out / f"{name}.csv").done
        items = sections[name](args.dry_run)
        found += (item for item in items if item.key not in done and item.rank <= args.rank)
    return sorted(found, key=lambda item: item.rank)


def message(error: BaseException) -> str:
    return f"failed: {type(error).__name__}: {error}".replace("\n", " ")[:300]


def work(args) -> None:
    """The worker: measures item after item and reports on standard output, a JSON object a line."""
    import torch

    from benchmarks.gpu_timing import Bench, header

    def report(**fields):
        print(json.dumps(fields), file=reports, flush=True)

    # What libraries print must not come between the reports.
    reports = os.fdopen(os.dup(1), "w")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "worker.log").open("a") as log:
        os.dup2(log.fileno(), 2)
    os.dup2(2, 1)
    items = todo(args, all_sections())
    report(event="plan", lines=plan_lines(items))
    bench = Bench(args.dry_run)
    head, modules = header(args.dry_run), 0
    for item in items:
        left = args.deadline - time.time()
        if left < item.seconds:
            report(event="postponed", section=item.section, key=item.key, seconds=item.seconds)
            continue
        torch.manual_seed(0)
        about = {"section": item.section, "key": item.key}
        report(event="begin", **about, limit=item.limit, left=left, other=item.other, header=head)
        try:
            rows = item.run(bench)
            failed = False
        except Exception as error:  # one failure must not end the run
            if not item.other:
                traceback.print_exc()
            rows, failed = [{"note": message(error)}], True
        Table(args.out / f"{item.section}.csv").add(head, item.key, rows)
        report(event="end", **about, failed=failed, note=rows[-1].get("note", ""))
        if failed and not device_answers(bench):
            report(event="broken")
            return
        gc.collect()
        if len(sys.modules) > modules:  # what was imported stays: no later collection need look at it
            gc.freeze()
            modules = len(sys.modules)
        if not bench.dry_run:
            torch.cuda.empty_cache()
    report(event="finished")


def device_answers(bench) -> bool:
    """False after an illegal address or a device-side assertion: this process gets nothing more from the device."""
    import torch

    try:
        if not bench.dry_run:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Watch:
    """The parent: starts workers, prints progress, ends those that hang. It imports nothing that a worker waits for."""

    def __init__(self, args):
        self.args = args
        self.failed, self.postponed = [], []
        self.lost = False  # the last worker ended between items
        self.planned = False

    def run(self) -> None:
        while not self._one_worker():
            pass

    def _one_worker(self) -> bool:
        """True when there is nothing left for another worker."""
        args = self.args
        command = [sys.executable, "-u", sys.argv[0], *sys.argv[1:], "--worker", "--deadline", str(args.deadline)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        lines = queue.Queue()
        threading.Thread(target=lambda: [*map(lines.put, worker.stdout), lines.put(None)], daemon=True).start()
        current, limit = None, 120.0
        self.postponed = []
        try:
            while True:
                try:
                    line = lines.get(timeout=max(1.0, min(limit, args.deadline + 20 - time.time())))
                except queue.Empty:
                    late = time.time() > args.deadline + 20
                    if late and current and current["limit"] > 25:
                        # Out of time, not proven to hang: the next call measures it.
                        print(f"  {current['section']} {current['key']}: cut off, out of time")
                    else:
                        self._note(current, f"failed: no end after {limit:.0f} s")
                    return late or (current is None and not self._once_more())
                if line is None:
                    if worker.wait() == 2 and not self.planned:  # it refused its arguments, or the machine
                        sys.exit(2)
                    self._note(current, f"failed: the process ended with status {worker.wait()}")
                    return current is None and not self._once_more()
                try:
                    event = json.loads(line)
                except ValueError:  # cut off in the middle: the end follows
                    continue
                if event["event"] == "finished":
                    return True
                if event["event"] == "plan":
                    if not self.planned:
                        print(*event["lines"], sep="\n", flush=True)
                    self.planned = True
                    continue
                if event["event"] == "broken":
                    print("    the device is lost to this process: a new one goes on", flush=True)
                    return False
                if event["event"] == "begin":
                    current, limit = event, event["limit"]
                    print(f"  {event['left']:4.0f} s left: {event['section']} {event['key']}", flush=True)
                elif event["event"] == "end":
                    self._ended(event, current["other"])
                    current, limit, self.lost = None, 120.0, False
                else:
                    self.postponed.append(event)
        finally:
            worker.kill()
            worker.wait()

    def _once_more(self) -> bool:
        """After a worker that ended between items: another one, unless the one before ended so without a row."""
        again, self.lost = not self.lost, True
        if again:
            print("    a new worker goes on", flush=True)
        return again

    def _ended(self, event, other: bool) -> None:
        if event["failed"]:
            print(f"    {event['note']}")
            if not other:
                self.failed.append(f"{event['section']} {event['key']}")

    def _note(self, item, note: str) -> None:
        if item is None:
            self.failed.append("a worker, between items")
            print(f"  {note}; {self.args.out / 'worker.log'} says why")
            return
        Table(self.args.out / f"{item['section']}.csv").add(item["header"], item["key"], [{"note": note}])
        self._ended({**item, "failed": True, "note": note}, item["other"])


def plan_lines(items: "list[Item]") -> list[str]:
    """Estimated seconds of what is left to do."""
    lines, total = [f"{len(items)} items to measure"], 0.0
    for rank, name in dict.fromkeys((item.rank, item.section) for item in items):
        chosen = [item for item in items if (item.rank, item.section) == (rank, name)]
        seconds = sum(item.seconds for item in chosen)
        total += seconds
        lines.append(f"  {name:<12}rank {rank}: {len(chosen):4} to do, about {seconds:4.0f} s; {total:5.0f} s in all")
    return lines


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU; no figure means anything")
    parser.add_argument(
        "--sections", nargs="+", default=None, metavar="NAME", help=f"of {', '.join(ORDER)}; default: all"
    )
    parser.add_argument("--seconds", type=float, default=360.0, help="nothing is begun that would end after this")
    parser.add_argument("--rank", type=int, default=9, help="0: the bars; 1: defaults, few peers; 2, 3: the rest")
    parser.add_argument("--retry", action="store_true", help="measure again what failed or was not here")
    parser.add_argument("--plan", action="store_true", help="print what is left to do and how long it takes, and end")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = set(args.sections or ()) - set(ORDER)
    if unknown:
        parser.error(f"--sections: expected some of {', '.join(ORDER)}; got {', '.join(sorted(unknown))}")
    if args.worker and not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            parser.error("no CUDA device; --dry-run exercises the sections on a CPU")
    return args


def main() -> int:
    args = arguments()
    if args.worker:
        work(args)
        return 0
    start = time.time()
    args.deadline = start + args.seconds
    if args.retry:
        for name in args.sections or ORDER:
            Table(args.out / f"{name}.csv").forget_failures()
    if args.plan:
        print(*plan_lines(todo(args, all_sections())), sep="\n")
        return 0
    print(f"{args.seconds:g} s -> {args.out}", flush=True)
    watch = Watch(args)
    watch.run()
    print(f"{time.time() - start:.0f} s; {len(watch.postponed)} items left for the next call")
    if watch.failed:
        print("FAILED: " + "; ".join(watch.failed))
    return 1 if watch.failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
