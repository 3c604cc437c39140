"""The sweep over transformers' language models, and docs/models.md, which it is written to.

    python -m benchmarks.models                      run what is missing, then write docs/models.md
    python -m benchmarks.models --only gemma t5      some model types or classes, printed, nothing written
    python -m benchmarks.models --merge runs/x.jsonl also a sweep of another version of transformers

Every pair runs in a process of its own with limits of time and memory. Results are kept line by line in
runs/models-VERSION.jsonl, and a sweep that was stopped goes on where it was. No network, no weights: tests/zoo shrinks
each configuration and draws random ones. Inkling needs scipy installed.
"""

import argparse
import json
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.models_page import page  # noqa: E402
from tests.zoo.build import pairs  # noqa: E402
from tests.zoo.check import UNBUILT, WRONG, examine  # noqa: E402

PAGE = ROOT / "docs" / "models.md"


def main() -> int:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types or classes; print, write nothing")
    parser.add_argument("--results", type=Path, help="results file, default runs/models-VERSION.jsonl")
    parser.add_argument("--merge", nargs="*", type=Path, default=[], help="results of other versions for the page")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of one class")
    parser.add_argument("--memory-gb", type=float, default=8, help="address space limit of one class")
    args = parser.parse_args()

    import transformers.models.auto.modeling_auto
    import transformers.models.clip.modeling_clip
    import transformers.models.mixtral.modeling_mixtral
    import transformers.models.t5.modeling_t5  # once for all children

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    wanted = pairs()
    if args.only:
        chosen = {key: value for key, value in wanted.items() if set(key) & set(args.only)}
        for record in sweep(chosen, args):
            print(json.dumps(record, indent=1))
        return 0
    results = args.results or ROOT / "runs" / f"models-{versions['transformers']}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        results.unlink(missing_ok=True)
    done = {(r["type"], r["class"]): r for r in read(results) if r["versions"] == versions}
    missing = {key: value for key, value in wanted.items() if key not in done}
    with results.open("a") as file:
        for record in sweep(missing, args):
            record["versions"] = versions
            done[record["type"], record["class"]] = record
            file.write(json.dumps(record) + "\n")
            file.flush()
    sweeps = [[done[key] for key in wanted], *(read(path) for path in args.merge)]
    PAGE.write_text(page(sweeps))
    print(
        f"{PAGE.relative_to(ROOT)}: "
        + ", ".join(f"{n} {v}" for v, n in Counter(r["verdict"] for r in sweeps[0]).items())
    )
    return int(any(record["verdict"] == WRONG for records in sweeps for record in records))


def read(path: Path) -> list[dict]:
    """The records of a results file, of every pair the last; a line that was cut off is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[record["type"], record["class"]] = record
    return list(found.values())


def sweep(wanted: dict[tuple[str, str], list[str]], args) -> Iterable[dict]:
    """One record a pair, as they end; ``args.jobs`` child processes at a time."""
    queue, running, verdicts = list(wanted.items()), {}, Counter()
    start = time.monotonic()
    while queue or running:
        while queue and len(running) < args.jobs:
            (model_type, name), mappings = queue.pop(0)
            started = _start(model_type, name, mappings, args)
            running[started.pop("pid")] = started
        pid, status = os.wait()
        if pid not in running:
            continue
        record = _finish(running.pop(pid), status, args)
        verdicts[record["verdict"]] += 1
        _progress(verdicts, len(wanted), time.monotonic() - start, record)
        yield record
    if wanted and sys.stderr.isatty():
        print(file=sys.stderr)


def _start(model_type: str, name: str, mappings: list[str], args) -> dict:
    """Fork: torch and transformers are imported already, a model that dies takes nothing with it."""
    path = Path(f"/tmp/var_kernels_models_{os.getpid()}_{model_type}_{name}.json".replace("/", "_", 0))
    pid = os.fork()
    if pid == 0:
        try:
            limit = int(args.memory_gb * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.alarm(args.seconds)
            path.write_text(json.dumps(examine(model_type, name, mappings)))
            os._exit(0)
        except BaseException as error:
            path.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}))
            os._exit(1)
    return {"pid": pid, "path": path, "type": model_type, "class": name, "mappings": mappings, "at": time.monotonic()}


def _finish(started: dict, status: int, args) -> dict:
    path = started["path"]
    record = json.loads(path.read_text()) if path.exists() and path.stat().st_size else {}
    path.unlink(missing_ok=True)
    if "verdict" in record:
        return record
    if os.WIFSIGNALED(status):
        cause = f"signal {os.WTERMSIG(status)}" + (f": over {args.seconds} s" if os.WTERMSIG(status) == 14 else "")
    else:
        cause = record.get("error", f"exit code {os.waitstatus_to_exitcode(status)}")
    return {
        **{name: started[name] for name in ("type", "class", "mappings")},
        "verdict": UNBUILT,
        "detail": f"its process ended by {cause}",
        "head": "",
        "seconds": round(time.monotonic() - started["at"], 2),
    }


def _progress(verdicts: Counter, total: int, seconds: float, record: dict) -> None:
    count = verdicts.total()
    left = seconds / count * (total - count)
    filled = "=" * (30 * count // total)
    line = (
        f"[{filled:30}] {count}/{total} {', '.join(f'{n} {v}' for v, n in verdicts.items())}; "
        f"{seconds / count:.1f} s a class, {int(left) // 60} min {int(left) % 60:02d} s left; {record['class']}"
    )
    if sys.stderr.isatty():
        print(f"\r{line[:160]:160}", end="", file=sys.stderr, flush=True)
    elif count % 20 == 0 or count == total:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
