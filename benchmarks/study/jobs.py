"""Runs of the study as processes of their own: each leaves one result file, so that a later call goes on where this
one ended."""

import contextlib
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from var_kernels.integrations.files import atomic_write


@dataclass(frozen=True)
class Job:
    """``function(context, **arguments) -> dict``. key: its result's file name. cost: expected seconds, which the bar
    counts by. settings: what the result depends on besides; a result made under others is made anew."""

    key: str
    function: Callable[..., dict]
    arguments: dict
    settings: dict
    cost: float = 1.0


@dataclass
class Outcome:
    results: dict[str, dict] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # key: the error's last line
    skipped: int = 0  # finished before this call


class Runner:
    """Runs jobs, ``workers`` at a time, and keeps their results in ``folder``."""

    def __init__(self, folder: Path, context, workers: int, console: Console, cuda: bool = False):
        self.folder, self.context, self.workers, self.console = folder, context, workers, console
        # A forked child has torch and transformers imported; CUDA survives no fork.
        forks = "fork" in multiprocessing.get_all_start_methods() and not cuda and sys.platform == "linux"
        self.processes = multiprocessing.get_context("fork" if forks else "spawn")
        self.outcome = Outcome()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
            speed_estimate_period=900,
        )

    def run(self, title: str, jobs: Sequence[Job]) -> dict[str, dict]:
        """Results of the jobs that have one, by key; a failed job is reported and the others still run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        done = {job.key: found for job in jobs if (found := self._stored(job)) is not None}
        self.outcome.skipped += len(done)
        waiting = [job for job in jobs if job.key not in done]
        if done:
            self.console.print(f"{title}: {len(done)} of {len(jobs)} runs are there already", highlight=False)
        if waiting:
            done |= self._run(title, waiting)
        self.outcome.results |= done
        return done

    def _run(self, title: str, waiting: list[Job]) -> dict[str, dict]:
        done, running, began, total = {}, {}, time.monotonic(), len(waiting)
        # the longest first, so that none is left alone at the end
        queue = sorted(waiting, key=lambda job: -job.cost)
        shown = self.bar if self.console.is_terminal else contextlib.nullcontext()
        with shown:
            task = self.bar.add_task(title, total=total, rate="")
            try:
                while queue or running:
                    while queue and len(running) < self.workers:
                        job = queue.pop(0)
                        running[job.key] = (job, self._start(job))
                    for key in [key for key, (_, process) in running.items() if not process.is_alive()]:
                        job, process = running.pop(key)
                        process.join()
                        self._collect(job, process.exitcode, done)
                        finished = total - len(queue) - len(running)
                        rate = finished / (time.monotonic() - began) * 60
                        self.bar.update(task, completed=finished, rate=f"{rate:.1f} runs/min")
                        if not self.console.is_terminal and (finished % 10 == 0 or finished == total):
                            left = (total - finished) / rate
                            self.console.print(
                                f"{title}: {finished}/{total}, {rate:.1f} runs/min, {left:.1f} min left",
                                highlight=False,
                            )
                    time.sleep(0.02)
            finally:
                for _, process in running.values():
                    process.terminate()
                for _, process in running.values():
                    process.join()
            self.bar.remove_task(task)
        return done

    def _start(self, job: Job):
        process = self.processes.Process(
            target=_work, args=(job, self.context, self._path(job), self._log(job)), daemon=True
        )
        process.start()
        return process

    def _collect(self, job: Job, exit_code: int, done: dict) -> None:
        found = self._stored(job)
        if found is not None and exit_code == 0:
            done[job.key] = found
            self._log(job).unlink(missing_ok=True)
            return
        lines = self._log(job).read_text(errors="replace").strip().split("\n") if self._log(job).exists() else []
        reason = lines[-1] if lines and exit_code == 1 else f"ended with exit code {exit_code}"
        self.outcome.failed[job.key] = reason
        self.console.print(
            f"[red]failed[/red] {job.key}: {reason} (see {self._log(job)})", highlight=False, soft_wrap=True
        )

    def _path(self, job: Job) -> Path:
        return self.folder / f"{job.key}.json"

    def _log(self, job: Job) -> Path:
        return self.folder / f"{job.key}.log"

    def _stored(self, job: Job) -> dict | None:
        try:
            stored = json.loads(self._path(job).read_text(encoding="utf-8"))
            same = stored["settings"] == _as_json(job.settings | job.arguments)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return stored["result"] if same else None


def _work(job: Job, context, path: Path, log: Path) -> None:
    """In the child: its output goes to the log, its result to the file, whole or not at all."""
    gc.freeze()  # what the parent has imported: no collection need look at it
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    try:
        result = job.function(context, **job.arguments)
        text = json.dumps({"settings": _as_json(job.settings | job.arguments), "result": result}, allow_nan=True)
        with atomic_write(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    except Exception:
        sys.stderr.flush()
        with log.open("a") as end:
            traceback.print_exc(file=end)
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no clean-up of what the parent owns


def _as_json(value: dict) -> dict:
    return json.loads(json.dumps(value))
