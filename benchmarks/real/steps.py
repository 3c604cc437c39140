"""A training step by everybody's head, each in a process of its own."""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from benchmarks.demo.memory import peak_reader
from benchmarks.real.models import load, tokens_of
from var_kernels.integrations.hf import fused_lm_head

LENGTH = 256
# seconds: of the processor, all threads together; missing: why a row has no figures
COLUMNS = (
    *("model", "dtype", "checkpointing", "tokens", "head", "tokens_per_s", "seconds", "peak_mib", "before_mib"),
    "missing",
)
BODY = "none"  # hidden states and their gradient without any head: the memory that no loss changes
HEADS = (BODY, "transformers", "torch.compile", "F.linear_cross_entropy", "TRL", "Liger", "var_kernels")


def measure(name: str, text: Path, dtype: str, checkpointing: bool, tokens: int, heads=HEADS) -> Iterator[dict]:
    """Yield a row of each head, the reason in place of the figures where it cannot run here.

    A step may take three quarters of the memory that is free when it starts: one that needs more ends alone.
    """
    for head in heads:
        row = dict(model=name, dtype=dtype, checkpointing=int(checkpointing), tokens=tokens, head=head)
        limit = psutil.virtual_memory().available * 3 // 4
        command = [sys.executable, "-m", __name__, name, str(text), dtype, str(int(checkpointing)), str(tokens), head]
        run = subprocess.run([*command, str(limit)], capture_output=True, text=True, check=False)
        found = [line for line in run.stdout.splitlines() if line.startswith("{")]
        yield row | (json.loads(found[-1]) if found else {"missing": _reason(run, limit)})


def _reason(run: subprocess.CompletedProcess, limit: int) -> str:
    refused = ("can't allocate memory", "MemoryError", "bad_alloc")
    if run.returncode == -signal.SIGKILL or any(words in run.stderr for words in refused):
        return f"needs more than {limit / 2**30:.1f} GiB"
    return (run.stderr.strip() or f"ended with status {run.returncode}").splitlines()[-1]


def main(name: str, text: str, dtype: str, checkpointing: str, tokens: str, head: str, limit: str) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    model, tokenizer = load(name, getattr(torch, dtype))
    model.train()
    if int(checkpointing):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens_of(Path(text), tokenizer, int(tokens), LENGTH)
    with prepared(head, model) as loss:
        loss(ids[:1]).backward()  # brings the gradients' memory, compiles
        read = peak_reader("cpu")
        before, began = read(), time.process_time()  # of the processor: other work may wait in between
        loss(ids).backward()
        seconds = time.process_time() - began
        figures = {"seconds": seconds, "tokens_per_s": int(tokens) / seconds, "peak_mib": read(), "before_mib": before}
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}), flush=True)


@contextlib.contextmanager
def prepared(head: str, model):
    """Yields loss(ids): the mean over all tokens but the first of a sequence."""
    own = lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731

    def on_hidden(call):
        def loss(ids):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            return call(hidden.flatten(0, 1), model.get_output_embeddings().weight, ids[:, 1:].flatten())

        return loss

    if head == BODY:
        model.get_output_embeddings().weight.detach().sum()  # else the file's pages of it are not in memory
        yield on_hidden(lambda h, w, labels: h.float().mean())
    elif head == "var_kernels":
        with fused_lm_head(model):
            yield own
    elif head == "transformers":
        yield own
    elif head == "torch.compile":
        plain = lambda h, w, labels: F.cross_entropy(F.linear(h, w).float(), labels)  # noqa: E731
        yield on_hidden(torch.compile(plain, dynamic=True))
    elif head == "F.linear_cross_entropy":
        yield on_hidden(F.linear_cross_entropy)
    elif head == "TRL":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
        yield (
            lambda ids: -(model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs[:, 1:].mean())
        )
    elif head == "Liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        call = LigerFusedLinearCrossEntropyLoss()
        yield on_hidden(lambda h, w, labels: call(w, h, labels))
    else:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
