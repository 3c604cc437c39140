"""A training step by everybody's head, each in a process of its own."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.real.models import load, tokens_of
from var_kernels.cli.demo.memory import peak_reader
from var_kernels.integrations.hf import fused_lm_head

LENGTH = 256
# seconds: of the processor, all threads together
COLUMNS = ("model", "dtype", "checkpointing", "tokens", "head", "tokens_per_s", "seconds", "peak_mib", "before_mib")
HEADS = ("transformers", "torch.compile", "F.linear_cross_entropy", "TRL", "Liger", "var_kernels")


def measure(name: str, text: Path, dtype: str, checkpointing: bool, tokens: int, heads=HEADS) -> list[dict]:
    """A row of each head; one that cannot run here has no figures, and the reason is printed."""
    rows = []
    for head in heads:
        row = dict(model=name, dtype=dtype, checkpointing=int(checkpointing), tokens=tokens, head=head)
        command = [sys.executable, "-m", __name__, name, str(text), dtype, str(int(checkpointing)), str(tokens), head]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [line for line in run.stdout.splitlines() if line.startswith("{")]
        if found:
            row |= json.loads(found[-1])
        else:
            print(
                f"{head}: {(run.stderr.strip() or f'ended by signal {-run.returncode}').splitlines()[-1]}", flush=True
            )
        rows.append(row)
    return rows


def main(name: str, text: str, dtype: str, checkpointing: str, tokens: str, head: str) -> None:
    model, tokenizer = load(name, getattr(torch, dtype))
    model.train()
    if int(checkpointing):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens_of(Path(text), tokenizer, int(tokens), LENGTH)
    with prepared(head, model) as loss:
        loss(ids[:1]).backward()  # brings the gradients' memory, compiles
        if head == "torch.compile":  # the shape that is measured
            loss(ids).backward()
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

    if head == "var_kernels":
        with fused_lm_head(model):
            yield own
    elif head == "transformers":
        yield own
    elif head == "torch.compile":
        yield on_hidden(torch.compile(lambda h, w, labels: F.cross_entropy(F.linear(h, w).float(), labels)))
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
