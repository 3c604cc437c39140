"""``var-kernels doctor``: what this machine has, which backend will run and why not a better one, and what a batch
needs."""

import argparse
import importlib.metadata
import platform
import sys

from var_kernels.cli.options import no_such_model

MIB = 2**20
# Peak bytes per logit of model(..., labels=...).loss.backward() in transformers 5, whose caller lets go of the output:
# log-softmax and two gradients in fp32. A caller who keeps the output also keeps its logits.
PLAIN_BYTES = 12
# From a checkout; needs a C++ compiler.
BUILD_COMMAND = "VAR_KERNELS_BUILD_EXT=1 pip install --no-build-isolation --no-deps -e ."
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "flash-attn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="name or path of a causal LM: estimate the loss's memory for it")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per micro-batch (default 8)")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence (default 2048)")
    parser.add_argument("--workspace-mb", type=float, help="memory for the fused loss's temporaries")


def run(args: argparse.Namespace) -> int:
    for name, value in (("batch-size", args.batch_size), ("length", args.length)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    print(f"python         {platform.python_version()} ({sys.executable})")
    import torch

    for package in _PACKAGES:
        print(f"{package:<14} {_version(package)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'device':<14} {_device_line(torch, device)}")
    for label, line in zip(("backend", "", "", ""), backend_lines(torch, device), strict=False):
        print(f"{label:<14} {line}")
    if args.model:
        print()
        for line in memory_lines(args, device):
            print(line)
    return 0


def _version(package: str) -> str:
    if package == "torch":
        from torch import __version__

        return __version__  # with the build's suffix, which the metadata of some builds leave out
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device_line(torch, device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        more = f" ({torch.cuda.device_count()} of them)" if torch.cuda.device_count() > 1 else ""
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        return f"{properties.name}{more}, {memory}, sm_{properties.major}{properties.minor}"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def backend_lines(torch, device) -> list[str]:
    """The backend of the row kernels, and of each faster one why it does not run."""
    from var_kernels.ops.backend import choose_backend

    backend, reason = choose_backend(device, torch.float32)
    lines = [f"{backend} ({reason})"]
    if device.type == "cpu":
        built = "no CUDA device answers" if torch.version.cuda else "this build of torch has no CUDA"
        lines.append(f"no GPU: {built}")
        if backend == "torch" and reason != "forced":
            lines.append("build the C++ row kernels: " + BUILD_COMMAND)
    return lines


def memory_lines(args: argparse.Namespace, device) -> list[str]:
    """The loss's memory above hidden states and weights, plain against fused, from the model's configuration alone."""
    import torch
    from transformers import AutoConfig

    from var_kernels.ops.explain import explain_engines
    from var_kernels.ops.workspace import default_workspace_mb

    try:
        config = AutoConfig.from_pretrained(args.model).get_text_config()
    except (OSError, ValueError) as error:
        raise no_such_model("model", args.model, error) from error
    rows, hidden, vocab = args.batch_size * args.length, config.hidden_size, config.vocab_size
    plain = PLAIN_BYTES * rows * vocab / MIB
    dtype = getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    workspace = args.workspace_mb or default_workspace_mb(device, vocab * hidden * dtype.itemsize)
    one_pass, two_pass = workspace, workspace + 4 * rows * hidden / MIB
    engines = explain_engines(rows, hidden, vocab, dtype, device, args.workspace_mb)
    return [
        f"{args.model}: {rows} rows (batch {args.batch_size} x {args.length} tokens), hidden {hidden}, vocabulary "
        f"{vocab}",
        f"{'plain loss':<14} about {plain:,.0f} MiB: model(..., labels=...).loss and its backward pass",
        f"{'fused loss':<14} at most {one_pass:,.0f} MiB in one pass (VAR, SFT), {two_pass:,.0f} MiB in two (DPO)",
        f"{'':<14} estimates above hidden states, weights and their gradients; --workspace-mb moves the second line",
        *(f"{kind:<14} {engine} ({dtype})" for kind, engine in engines.items()),
    ]
