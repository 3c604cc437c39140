"""The demo: let a pretrained language model answer, align it on its scored answers by VAR, and show what came of it.

make demo, or python -m benchmarks.demo [options]
"""

import argparse
import sys

from var_kernels.cli import run_command

DESCRIPTION = "align a pretrained model on its own scored answers, and show what came of it"
_MAX_THREADS = 4  # a model of this size has no work for more, and a container's quota may be far below its cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="name or path of a causal LM (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--reward", metavar="MODULE:FUNCTION", help="called with (prompts, completions) (default: VADER's sentiment)"
    )
    parser.add_argument(
        "--compare", metavar="NAMES", help="train beside VAR: sft, best-of-n, dpo, separated by commas (on a GPU: all)"
    )
    parser.add_argument(
        "--output", default="runs/demo", metavar="DIR", help="where everything is saved (default: runs/demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a shrunken run, for a first look")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU is plenty, and several in one process need a launcher
    import torch

    from benchmarks.demo import experiment
    from benchmarks.demo.story import tell

    torch.set_num_threads(min(torch.get_num_threads(), _MAX_THREADS))
    if args.seed < 0:
        raise ValueError(f"--seed must be an integer >= 0, got {args.seed}")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    plan = experiment.QUICK if args.quick else experiment.GPU if device.type == "cuda" else experiment.FULL
    if args.compare is not None:
        plan = dataclasses.replace(plan, methods=(*_methods(args.compare), "VAR"))
    tell(args.output, plan, seed=args.seed, device=device, model=args.model, reward=args.reward)
    return 0


def _methods(text: str) -> tuple[str, ...]:
    names = {"sft": "SFT", "best-of-n": "Best-of-n SFT", "dpo": "DPO"}
    asked = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in asked:
        if name not in names:
            raise ValueError(f"--compare must be some of {', '.join(names)}, got {name!r}; VAR is always trained")
    return tuple(full for name, full in names.items() if name in asked)


def main(words: list[str] | None = None) -> int:
    return run_command("demo", DESCRIPTION, sys.modules[__name__], sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
