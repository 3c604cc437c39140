"""``var-kernels demo``: build a small language model, align it by VAR, SFT and DPO, and show what came of it."""

import argparse

_MAX_THREADS = 4  # a model of this size has no work for more, and a container's quota may be far below its cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="runs/demo", metavar="DIR", help="where everything is saved (default: runs/demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a shrunken run of less than a minute, for a first look")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")


def run(args: argparse.Namespace) -> int:
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is on the hub; without it transformers may look
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU is plenty, and several in one process need a launcher
    import torch

    from var_kernels.cli.demo.experiment import FULL, QUICK
    from var_kernels.cli.demo.story import tell

    torch.set_num_threads(min(torch.get_num_threads(), _MAX_THREADS))
    if args.seed < 0:
        raise ValueError(f"--seed: expected an integer >= 0, got {args.seed}")
    tell(args.output, QUICK if args.quick else FULL, seed=args.seed, cpu=args.cpu)
    return 0
