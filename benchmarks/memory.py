"""Extra memory and time of ``model(...).loss`` and its backward, plain against fused, on a GPT-2 of few layers.

    python benchmarks/memory.py [--tokens 2048] [--vocab 50257] [--hidden 768] [--layers 0] [--csv FILE]

Extra memory is the peak of forward and backward above the model and its inputs; the second figure leaves out the
gradients of the parameters, which both sides return. The model is fed with ``inputs_embeds`` and has no layers unless
asked for: activations of the body and the dense gradient of the embedding lookup would blur the loss. Times
are medians of interleaved runs in one process.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers

from var_kernels.integrations.hf import fused_lm_head
from var_kernels.measure import peak_extra_bytes

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=args.vocab,
        n_embd=args.hidden,
        n_layer=args.layers,
        n_head=12,
        n_positions=1024,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config).to(device, getattr(torch, args.dtype)).eval()
    sequences = max(1, args.tokens // 512)
    ids = torch.randint(args.vocab, (sequences, args.tokens // sequences), device=device)
    embedded = model.transformer.wte(ids).detach().requires_grad_()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())

    def step():
        model.zero_grad(set_to_none=True)
        loss = model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        return loss.detach()

    contexts = {"plain": nullcontext, "fused": lambda: fused_lm_head(model)}
    rows = {}
    for name, context in contexts.items():
        with context():
            step()
            model.zero_grad(set_to_none=True)
            peak = peak_extra_bytes(step, device)
        rows[name] = {"loss": name, "peak_mib": peak / MIB, "peak_less_gradients_mib": (peak - gradients) / MIB}
    times = {name: [] for name in contexts}
    losses = {}
    for _ in range(args.runs):
        for name, context in contexts.items():
            with context():
                start = time.perf_counter()
                losses[name] = step().item()
                times[name].append(time.perf_counter() - start)
    for name, row in rows.items():
        row.update(seconds=statistics.median(times[name]), value=losses[name])

    header = (
        f"# {platform.machine()} {platform.processor() or ''} threads={torch.get_num_threads()} device={device} "
        f"torch={torch.__version__} transformers={transformers.__version__} N={ids.numel()} V={args.vocab} "
        f"D={args.hidden} layers={args.layers} {args.dtype}"
    )
    ratio = rows["plain"]["peak_less_gradients_mib"] / rows["fused"]["peak_less_gradients_mib"]
    out = args.csv.open("w", newline="") if args.csv else sys.stdout
    with out if args.csv else nullcontext():
        print(header, file=out)
        writer = csv.DictWriter(out, fieldnames=list(rows["plain"]))
        writer.writeheader()
        for row in rows.values():
            writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
    print(f"{ratio:.1f}x less extra memory; both losses agree to {abs(losses['plain'] - losses['fused']):.1e}")


if __name__ == "__main__":
    main()
