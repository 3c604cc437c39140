"""Compare the methods on a small world with a verifiable reward, and answer what they are said to do.

    python -m benchmarks.study [--rewards FILE.jsonl.gz] [--quick]

Writes docs/study.md with its plots, and the figures as CSV. A run that was finished before is not repeated: call it
again after an interruption, or after a failure was mended. --rewards adds a part on a file of rated completions (one
JSON object a line: prompt, completions, rewards).
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each core: its threads would only wait for each other
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

_ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rewards", type=Path, metavar="FILE", help="rated completions, .jsonl or .jsonl.gz")
    parser.add_argument("--quick", action="store_true", help="every section in seconds; the figures mean nothing")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--jobs", type=int, help="processes at a time (default: 2)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="models and results so far (default: runs/study)")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="where study.md goes (default: docs; quick: DIR/docs)")
    parser.add_argument("--csv", type=Path, metavar="DIR", help="default: benchmarks/results/study; quick: DIR/csv")
    args = parser.parse_args(arguments)
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")
    if args.rewards is not None and not args.rewards.is_file():
        parser.error(f"--rewards: expected a file, {args.rewards} is none")
    return _run(args)


def _run(args) -> int:
    import torch
    import transformers
    import transformers.generation
    import transformers.models.llama.modeling_llama  # imported once, before the runs are forked
    from rich.console import Console

    from benchmarks.study import plan as plans
    from benchmarks.study.jobs import Runner
    from benchmarks.study.real import read_file
    from benchmarks.study.report import write_all
    from benchmarks.study.stages import run_all
    from benchmarks.study.world_runs import Context

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available() and not args.cpu
    plan = plans.QUICK if args.quick else plans.LARGE if cuda else plans.FULL
    work = (args.work or _ROOT / "runs" / ("study-quick" if args.quick else "study")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    if args.rewards is not None:
        read_file(args.rewards, plan.real.max_length)  # refused now, and not after half an hour
    context = Context(plan, work, torch.device("cuda" if cuda else "cpu"), args.rewards)
    console, began = Console(soft_wrap=True), time.monotonic()
    runner = Runner(work / "results", context, args.jobs or 2, console, cuda)
    results = run_all(runner, context)
    outcome = runner.outcome
    docs = args.docs or (work / "docs" if args.quick else _ROOT / "docs")
    tables = args.csv or (work / "csv" if args.quick else _ROOT / "benchmarks" / "results" / "study")
    page = write_all(results, context, outcome.failed, docs, tables)
    made = len(outcome.results) - outcome.skipped
    console.print(
        f"{made} runs made, {outcome.skipped} taken over, {len(outcome.failed)} failed, "
        f"{(time.monotonic() - began) / 60:.1f} min. Report: {page}",
        highlight=False,
    )
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that ends the runs with it
    raise SystemExit(main())
