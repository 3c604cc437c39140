"""A training step of a small Llama on a CPU: the model's own loss, the fused one in plain torch and in C++.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.cpu_training [--out FILE]

4 layers of width 512, 32000 ids, 8 x 128 tokens, SGD. Milliseconds of processor time: medians of 5 interleaved steps;
peak MiB above the weights.
"""

import argparse
import csv
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cpu_machine import header, results_folder
from var_kernels.integrations.hf import fused_lm_head
from var_kernels.measure import peak_extra_bytes
from var_kernels.ops.backend import use_backend

ROUNDS = 5


def measure(dtype: torch.dtype) -> list[list[str]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, num_key_value_heads=8, **sizes)).to(dtype)
    ids = torch.randint(32000, (8, 128))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(backend: str | None) -> None:
        fused = nullcontext() if backend is None else fused_lm_head(model)
        with nullcontext() if backend is None else use_backend(backend), fused:
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    sides = {"the model's own loss": None, "fused, plain torch": "torch", "fused, C++": "native"}
    peaks = {name: peak_extra_bytes(lambda b=backend: step(b)) / 2**20 for name, backend in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, backend in sides.items():
            start = time.process_time()
            step(backend)
            seconds[name].append(time.process_time() - start)
    kind = str(dtype).removeprefix("torch.")
    return [[kind, name, f"{1e3 * statistics.median(seconds[name]):.0f}", f"{peaks[name]:.0f}"] for name in sides]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results_folder() / "training.csv", help="default: %(default)s")
    args = parser.parse_args()
    rows = [row for dtype in (torch.bfloat16, torch.float32) for row in measure(dtype)]
    with args.out.open("w", newline="") as file:
        print(header(), file=file)
        csv.writer(file).writerows([["dtype", "side", "ms", "peak_mib"], *rows])
    print(args.out.read_text())


if __name__ == "__main__":
    main()
