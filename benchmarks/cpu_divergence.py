"""``linear_token_kl`` against its bare GEMMs and against full logits on a CPU: processor time and peak memory.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.cpu_divergence [--shape N,D,V] [--dtype bfloat16] [--runs 3]

Medians of interleaved runs in one process, forward and backward, the reference as wide as the policy. Bare GEMMs:
torch.mm alone, both models' logits, dH and dW: 4, or 6 where logits are computed twice. TRL: its GKD loss on the logits
of F.linear, where TRL is installed; Liger: its fused linear JSD.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.cpu_losses import DTYPES, MIB, SHAPES
from var_kernels import linear_token_kl
from var_kernels.measure import peak_extra_bytes


def full_logits(hidden, weight, ref_hidden, ref_weight):
    logp, logq = (F.linear(*pair).float().log_softmax(-1) for pair in ((hidden, weight), (ref_hidden, ref_weight)))
    return F.kl_div(logp, logq, log_target=True, reduction="sum")


def cases(shape, dtype) -> dict:
    n, d, v = shape
    heads = [(torch.randn(n, d).to(dtype), (torch.randn(v, d) * (3 * d**-0.5)).to(dtype)) for _ in range(2)]
    (hidden, weight), (ref_hidden, ref_weight) = heads
    logits, ref_logits = (torch.empty(n, v, dtype=dtype) for _ in range(2))

    def gemms(times: int):
        for _ in range(times):
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(ref_hidden, ref_weight.t(), out=ref_logits)
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)

    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]

    def gradients(loss):
        return lambda: torch.autograd.grad(loss(*leaves, ref_hidden, ref_weight).sum(), leaves)

    stored = n * v * dtype.itemsize / MIB + 64 * v * 8 / MIB + 64
    found = {"4 bare GEMMs": lambda: gemms(1), "6 bare GEMMs": lambda: gemms(2)}
    for direction in ("forward", "reverse", "jsd"):
        for name, options in {
            "a value each": {},
            "a value each, stored": {"workspace_mb": stored},
            "sum": {"reduction": "sum"},
        }.items():
            options = {"direction": direction, **options}
            found[f"var_kernels, {direction}, {name}"] = gradients(
                lambda *t, options=options: linear_token_kl(*t, **options)
            )
    found["full logits, forward"] = gradients(full_logits)
    try:
        from trl.experimental.gkd import GKDTrainer

        found["TRL, jsd"] = gradients(
            lambda h, w, rh, rw: GKDTrainer.generalized_jsd_loss(F.linear(h, w)[None], F.linear(rh, rw)[None])
        )
    except ImportError:
        pass
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        labels = torch.zeros(n, dtype=torch.int64)
        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
        found["Liger, jsd"] = gradients(lambda *t: liger(*t, labels))
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="N,D,V; all of benchmarks.cpu_losses if not given")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    for shape in [tuple(map(int, args.shape.split(",")))] if args.shape else SHAPES:
        for dtype in [args.dtype] if args.dtype else DTYPES:
            torch.manual_seed(0)
            calls = cases(shape, getattr(torch, dtype))
            peaks, seconds = {}, {name: [] for name in calls}
            for name, call in calls.items():
                peaks[name] = peak_extra_bytes(call) / MIB
            for _ in range(args.runs):
                for name, call in calls.items():
                    start = time.process_time()
                    call()
                    seconds[name].append(time.process_time() - start)
            bare = statistics.median(seconds["4 bare GEMMs"])
            print(f"\n{' x '.join(map(str, shape))}, {dtype}")
            for name, values in seconds.items():
                middle = statistics.median(values)
                print(
                    f"  {name:<40}{1e3 * middle:>9,.0f} ms{middle / bare:>8.2f} of 4{peaks[name]:>9,.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
