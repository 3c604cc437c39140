"""Extra memory and time of ``model(...).loss`` and its backward, plain against fused, on a GPT-2 of few layers.

    python benchmarks/memory.py [--tokens 2048] [--vocab 50257] [--hidden 768] [--layers 0] [--dtype bfloat16]
    python benchmarks/memory.py --update       # both dtypes, into benchmarks/results/cpu-2-cores and README

Extra memory is the peak of forward and backward above the model and its inputs; the second figure leaves out the
gradients of the parameters, which both sides return. The model is fed with ``inputs_embeds`` and has no layers unless
asked for: activations of the body and the dense gradient of the embedding lookup would blur the loss. Times are medians
of interleaved runs in one process: of processor time, summed over threads, on a CPU.
"""

import argparse
import csv
import os
import platform
import re
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait take no processor time

import torch
import transformers

from var_kernels.integrations.hf import fused_lm_head
from var_kernels.measure import peak_extra_bytes

MIB = 2**20
ROOT = Path(__file__).resolve().parents[1]
RESULTS = {"float32": "memory-fp32.csv", "bfloat16": "memory-bf16.csv"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time


class Problem:
    """A model of these sizes, its batch, and one step through its own loss."""

    def __init__(self, tokens=2048, vocab=50257, hidden=768, layers=0, dtype="float32"):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=vocab,
            n_embd=hidden,
            n_layer=layers,
            n_head=12,
            n_positions=1024,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        self.model = transformers.GPT2LMHeadModel(config).to(DEVICE, getattr(torch, dtype)).eval()
        sequences = max(1, tokens // 512)
        self.ids = torch.randint(vocab, (sequences, tokens // sequences), device=DEVICE)
        self.embedded = self.model.transformer.wte(self.ids).detach().requires_grad_()
        self.gradients = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.name = f"N={self.ids.numel()} V={vocab} D={hidden} layers={layers} {dtype}"
        self.sides = {"plain": nullcontext, "fused": lambda: fused_lm_head(self.model)}

    def step(self, tokens: int | None = None):
        """Of the first so many tokens of each sequence, or of all."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(inputs_embeds=self.embedded[:, :tokens], labels=self.ids[:, :tokens]).loss
        loss.backward()
        return loss.detach()

    def peak(self, side: str) -> int:
        """Bytes above the model and its inputs."""
        with self.sides[side]():
            self.step(tokens=8)  # the fused head looks at the model once
            self.model.zero_grad(set_to_none=True)
            return peak_extra_bytes(self.step, DEVICE)


def measure(problem: Problem, runs: int) -> list[dict]:
    """A row for each side."""
    rows = {}
    for side in problem.sides:
        peak = problem.peak(side)
        less = (peak - problem.gradients) / MIB
        rows[side] = {"loss": side, "peak_mib": peak / MIB, "peak_less_gradients_mib": less}
    times, losses = {side: [] for side in rows}, {}
    for _ in range(runs):
        for side, context in problem.sides.items():
            with context():
                start = CLOCK()
                losses[side] = problem.step().item()
                times[side].append(CLOCK() - start)
    for side, row in rows.items():
        row.update(seconds=statistics.median(times[side]), value=losses[side])
    return list(rows.values())


def write(rows: list[dict], problem: Problem, path: Path) -> None:
    with path.open("w", newline="") as out:
        print(
            f"# {platform.machine()} threads={torch.get_num_threads()} device={DEVICE} torch={torch.__version__} "
            f"transformers={transformers.__version__} {problem.name}",
            file=out,
        )
        writer = csv.DictWriter(out, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def show(rows: list[dict], problem: Problem) -> None:
    plain, fused = rows
    print(f"{problem.name} on {DEVICE}: forward and backward of model(...).loss, above model and inputs")
    print(f"{'':8}{'peak, MiB':>12}{'less gradients':>18}{'seconds':>10}{'loss':>12}")
    for row in rows:
        print(
            f"{row['loss']:8}{row['peak_mib']:>12,.1f}{row['peak_less_gradients_mib']:>18,.1f}"
            f"{row['seconds']:>10.2f}{row['value']:>12.5f}"
        )
    ratio = plain["peak_less_gradients_mib"] / fused["peak_less_gradients_mib"]
    apart = abs(plain["value"] - fused["value"])
    print(f"{ratio:.1f}x less extra memory beside the gradients; the losses differ by {apart:.1e}")


def sentence(folder: Path) -> str:
    """README's figures, from the files."""
    parts = []
    for name, file in (("fp32", RESULTS["float32"]), ("bf16", RESULTS["bfloat16"])):
        lines = [line for line in (folder / file).read_text().splitlines() if not line.startswith("#")]
        plain, fused = (float(row["peak_less_gradients_mib"]) for row in csv.DictReader(lines))
        parts.append(f"{fused:,.0f} MiB instead of {plain:,.0f} MiB in {name} ({plain / fused:.1f}x less)")
    return ", ".join(parts)


def update_readme(path: Path, folder: Path) -> None:
    """Put the sentence where the old one was; its line breaks go."""
    part = r"[\d,]+\s+MiB\s+instead\s+of\s+[\d,]+\s+MiB\s+in\s+{}\s+\([\d.]+x\s+less\)"
    text, count = re.subn(rf"{part.format('fp32')},\s+{part.format('bf16')}", sentence(folder), path.read_text())
    if count != 1:
        raise SystemExit(f"{path} must hold the sentence of the memory figures once, found {count}")
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 12")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--dtype", choices=list(RESULTS), default="float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="also write the figures there")
    parser.add_argument("--update", action="store_true", help="write README's figures and their files anew")
    args = parser.parse_args()
    if args.update:
        folder = ROOT / "benchmarks" / "results" / "cpu-2-cores"
        for dtype, file in RESULTS.items():
            problem = Problem(dtype=dtype)
            rows = measure(problem, args.runs)
            show(rows, problem)
            write(rows, problem, folder / file)
        update_readme(ROOT / "README.md", folder)
        print(f"README: {sentence(folder)}")
        return
    problem = Problem(args.tokens, args.vocab, args.hidden, args.layers, args.dtype)
    rows = measure(problem, args.runs)
    show(rows, problem)
    if args.csv:
        write(rows, problem, args.csv)


if __name__ == "__main__":
    main()
