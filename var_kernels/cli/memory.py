"""``var-kernels memory``: peak memory of the loss of a batch, plain and fused, predicted from sizes alone."""

import argparse
from typing import NamedTuple

import torch

from var_kernels.cli.explain import explain_engines, fused_bytes
from var_kernels.cli.heads import HeadSize, find_head_size
from var_kernels.cli.options import DTYPES, positive

MIB = 1 << 20
# Peak bytes per logit of model(..., labels=...).loss.backward() in transformers 5, whose caller lets go of the output:
# log-softmax and two gradients in fp32. A caller who keeps the output also keeps its logits.
PLAIN_BYTES = 12


class Prediction(NamedTuple):
    """Bytes above hidden states and weights, with the gradients of both."""

    plain: int
    weighted: int  # SFT, VAR
    general: int  # any loss of log-probs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a known name, a config.json, a folder with one, or a name on the hub")
    parser.add_argument("--hidden", type=positive, help="width of the head; with --vocab, instead of --model")
    parser.add_argument("--vocab", type=positive, help="size of the vocabulary")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model (default: its own, or bfloat16)")
    parser.add_argument("--batch-size", type=positive, default=8, help="sequences per micro-batch (default 8)")
    parser.add_argument("--length", type=positive, default=2048, help="tokens per sequence (default 2048)")
    parser.add_argument("--workspace-mb", type=float, help="memory for the fused loss's temporaries")


def run(args: argparse.Namespace) -> int:
    if (args.hidden is None) != (args.vocab is None):
        given, missing = ("hidden", "vocab") if args.vocab is None else ("vocab", "hidden")
        raise ValueError(f"--{given} needs --{missing} too; or give --model, which has both")
    if bool(args.model) == bool(args.hidden):
        got = "both" if args.model else "neither"
        raise ValueError(f"expected --model, or --hidden and --vocab, got {got}")
    if args.workspace_mb is not None and not 0 <= args.workspace_mb < 2**40:
        got = args.workspace_mb
        raise ValueError(f"workspace_mb must be 0 or positive (MiB), got {got}; leave it out for the default")
    head = find_head_size(args.model) if args.model else HeadSize("", args.hidden, args.vocab)
    if args.batch_size * args.length * max(head.hidden, head.vocab) >= 2**60:
        got = f"{args.batch_size} x {args.length} x {max(head.hidden, head.vocab)}"
        raise ValueError(f"batch-size x length x vocab must be less than 2^60, got {got}; give the sizes of one batch")
    for line in memory_lines(head, args):
        print(line)
    return 0


def memory_lines(head: HeadSize, args: argparse.Namespace) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype) if args.dtype else head.dtype or torch.bfloat16
    rows = args.batch_size * args.length
    call = (rows, head.hidden, head.vocab, dtype, device, args.workspace_mb)
    predicted = predict(*call)
    name = f"{head.name}: " if head.name else ""
    return [
        f"{name}{rows} rows (batch {args.batch_size} x {args.length} tokens), hidden {head.hidden}, vocabulary "
        f"{head.vocab}, {str(dtype).removeprefix('torch.')}",
        f"{'plain loss':<14} about {predicted.plain / MIB:,.0f} MiB: model(..., labels=...).loss and its backward pass",
        f"{'fused loss':<14} {predicted.weighted / MIB:,.0f} MiB (VAR, SFT), {predicted.general / MIB:,.0f} MiB (DPO)",
        f"{'':<14} above hidden states and weights, with the gradients of both; --workspace-mb sets the fused loss's",
        *(f"{kind:<14} {engine}" for kind, engine in explain_engines(*call).items()),
    ]


def predict(
    n: int, d: int, v: int, dtype: torch.dtype, device: torch.device, workspace_mb: float | None = None
) -> Prediction:
    """Peak of forward and backward for n rows; nothing of that size is allocated."""
    weighted, general = fused_bytes(n, d, v, dtype, device, workspace_mb)
    return Prediction(plain_bytes(n, d, v, dtype), weighted, general)


def plain_bytes(n: int, d: int, v: int, dtype: torch.dtype) -> int:
    """The logits' gradients, or one of them in the operands' dtype beside those of the operands, whichever is more."""
    return max(PLAIN_BYTES * n * v, dtype.itemsize * (n * v + (n + v) * d))
