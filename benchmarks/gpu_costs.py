"""Bytes and launches of every engine on an H200, counted without one; times computed from them.

    python -m benchmarks.gpu_costs [--csv benchmarks/results/computed/h200.csv] [--code now]

The public ops run forward and backward on tensors without values that say they are on a GPU: every operation of torch
and every launch of a Triton kernel is recorded, with the bytes that it reads and writes. Nothing is timed: a time is
FLOP at RATE plus the bytes of everything but the GEMMs at BANDWIDTH. What the GEMMs move beyond bare bf16 ones (fp32
logits and sums) counts in ``computed_ratio_exposed`` alone, as if none of it hid under the arithmetic. The ratios are
those to the bare GEMMs that a method cannot do without.
"""

import argparse
import csv
import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from var_kernels import kernels, linear_logprob, linear_token_kl, linear_weighted_nll
from var_kernels.kernels import gemm_torch
from var_kernels.ops import head

RATE, BANDWIDTH = 780e12, 4.0e12  # FLOP/s of a large bf16 GEMM, B/s of a copy: an H200's, as measured by others
MEMORY_MIB, MAJOR = 143771, 9
MIB = 1 << 20
BF16 = torch.bfloat16
RESULTS = Path(__file__).parent / "results" / "computed" / "h200.csv"
SHAPES = ((8192, 4096, 128256), (8192, 896, 151936), (8192, 2304, 256000), (8192, 768, 50257))
RANK = 64
ROW_KERNELS = ("row_stats", "row_exp", "row_grad", "pair_stats", "pair_mixture", "pair_grad")


class Pretended(torch.Tensor):
    """A tensor without values whose device, asked in Python, is a GPU; torch's own shape functions see the truth."""

    shown = torch.device("cuda", 0)

    @property
    def device(self):
        return Pretended.shown


def _pretend(value):
    return value.as_subclass(Pretended) if type(value) is Tensor and value.is_meta else value


def _on_meta(factory):
    """The factory, with a pretended tensor where the GPU is asked for."""

    @functools.wraps(factory)
    def create(*args, device=None, **kwargs):
        if device is not None and torch.device(device).type == "cuda":
            return factory(*args, device="meta", **kwargs).as_subclass(Pretended)
        return factory(*args, device=device, **kwargs)

    return create


@dataclass
class Counts:
    gemms: list[tuple[float, int]] = field(default_factory=list)  # FLOP, bytes
    kernels: list[tuple[str, int]] = field(default_factory=list)  # Triton kernel, bytes
    others: list[tuple[str, int]] = field(default_factory=list)  # operation of torch, bytes
    host_reads: int = 0


# Neither bytes nor a launch.
_FREE = {
    *("view", "t", "transpose", "slice", "unsqueeze", "squeeze", "expand", "detach", "alias", "as_strided", "select"),
    *("permute", "_unsafe_view", "unbind", "split", "empty", "new_empty", "empty_like", "empty_strided", "device"),
    *("new_empty_strided", "_reshape_alias", "diagonal", "_assert_async", "promote_types"),
}
_FILLS = {"zero_", "fill_", "zeros", "full", "zeros_like", "full_like", "ones", "new_zeros", "new_full", "ones_like"}
_GATHERS = {"index", "index_select", "gather", "embedding"}


class _Count(TorchDispatchMode):
    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            return self._gemm(func, name, args, kwargs)
        if name in ("_local_scalar_dense", "nonzero"):
            self.counts.host_reads += 1
        if name == "_local_scalar_dense":
            return 1.0
        if name == "nonzero":  # every row counts
            self.counts.others.append((name, args[0].nbytes))
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device="meta").as_subclass(Pretended)
        with mock.patch.object(Pretended, "shown", torch.device("meta")):
            outputs = tree_map(_pretend, func(*args, **kwargs))
        if name not in _FREE and (name != "_to_copy" or outputs is not args[0]):
            self.counts.others.append((name, _moved(name, args, kwargs, outputs)))
        return outputs

    def _gemm(self, func, name: str, args, kwargs):
        total, (left, right) = (None, args[:2]) if name == "mm" else (args[0], args[1:3])
        (n, d), v = left.shape, right.shape[1]
        out = kwargs.get("out", total if name == "addmm_" else None)
        if out is None:
            out = torch.empty(n, v, dtype=left.dtype, device="meta").as_subclass(Pretended)
        moved = left.nbytes + right.nbytes + out.nbytes + (0 if total is None else total.nbytes)
        self.counts.gemms.append((2.0 * n * d * v, moved))
        return out


def _moved(name: str, args, kwargs, outputs) -> int:
    """Bytes that an elementwise operation, a reduction or a gather reads and writes."""
    written = sum(t.nbytes for t in tree_leaves(outputs) if isinstance(t, Tensor))
    read = [t for t in tree_leaves((args, {k: v for k, v in kwargs.items() if k != "out"})) if isinstance(t, Tensor)]
    if name in _FILLS:
        return written
    if name == "copy_":
        return args[0].nbytes + args[1].nbytes
    if name in _GATHERS:
        return 2 * written + sum(t.nbytes for t in read[1:])
    return written + sum(t.nbytes for t in read)


def _size(a: dict, *names: str) -> int:
    """Bytes of an element of each, none of what the launch leaves out."""
    return sum(a[name].itemsize for name in names if a[name] is not None)


# Bytes of a launch, by the kernel's name: of its arguments and its grid. Vectors of a number a row are left out.
KERNEL_BYTES: dict[str, Callable[[dict, tuple], int]] = {
    "_row_stats_kernel": lambda a, grid: grid[0] * a["C"] * _size(a, "logits_ptr"),
    "_row_exp_kernel": lambda a, grid: grid[0] * a["C"] * _size(a, "logits_ptr", "out_ptr"),
    "_row_grad_kernel": lambda a, grid: grid[0] * a["C"] * (_size(a, "logits_ptr") + a["OUT"].primitive_bitwidth // 8),
    "_pair_stats_kernel": lambda a, grid: grid[0] * a["C"] * _size(a, "z_ptr", "w_ptr"),
    "_pair_mixture_kernel": lambda a, grid: grid[0] * a["C"] * _size(a, "z_ptr", "w_ptr"),
    "_pair_grad_kernel": lambda a, grid: (
        grid[0] * a["C"] * (_size(a, "z_ptr", "w_ptr") + a["OUT"].primitive_bitwidth // 8)
    ),
    "_start_rows_kernel": lambda a, grid: grid[0] * a["D"] * _size(a, "hidden_ptr", "weight_ptr"),
    "_finish_rows_kernel": lambda a, grid: 0,
    "_row_scales_kernel": lambda a, grid: 0,
    "_combine_rows_kernel": lambda a, grid: (
        grid[0] * a["D"] * _size(a, "sums_ptr", "out_ptr", *(["matrix_ptr"] if a["label_ptr"] is not None else []))
    ),
    # Every label distinct.
    "_label_rows_kernel": lambda a, grid: grid[0] * a["D"] * _size(a, "vectors_ptr", "total_ptr", "total_ptr"),
    # The scale is 1.
    "_scale_kernel": lambda a, grid: 0,
}


class _Recorder:
    def __init__(self, name: str, kernel, counts: Counts):
        self.name, self.kernel, self.counts = name, kernel, counts

    def __getitem__(self, grid):
        def launch(*args, **named):
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | named
            self.counts.kernels.append((self.name.removesuffix("_kernel")[1:], KERNEL_BYTES[self.name](given, grid)))

        return launch


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts what runs inside on ``pretended`` tensors."""
    counts = Counts()
    with ExitStack() as stack:
        for info in pkgutil.iter_modules(kernels.__path__):
            if not info.name.endswith("_triton"):
                continue
            module = importlib.import_module(f"{kernels.__name__}.{info.name}")
            for name, value in list(vars(module).items()):
                if name in KERNEL_BYTES:
                    stack.enter_context(mock.patch.object(module, name, _Recorder(name, value, counts)))
        for module, name, value in (
            (head, "_cuda_memory", MEMORY_MIB * MIB),
            (gemm_torch, "_cuda_major", MAJOR),
            (torch.cuda, "is_current_stream_capturing", False),
        ):
            stack.enter_context(mock.patch.object(module, name, return_value=value))
        for name in ("empty", "zeros", "ones", "full", "arange", "tensor"):
            stack.enter_context(mock.patch.object(torch, name, _on_meta(getattr(torch, name))))
        stack.enter_context(_Count(counts))
        yield counts


def pretended(*shape: int, dtype: torch.dtype = BF16, learns: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta").as_subclass(Pretended).requires_grad_(learns)


@dataclass
class Case:
    name: str
    gemms: int  # that its method cannot do without: the bare ones that ``ratio`` divides by
    learns: tuple[str, ...] = ("hidden", "weight")
    engine: str | None = None  # of linear_weighted_nll; None: linear_logprob
    divergence: str | None = None  # of linear_token_kl, a sum, the reference as wide as the policy
    workspace_mb: Callable[[int, int, int], float | None] = lambda n, d, v: None


def _accumulator_and(mib: float) -> Callable[[int, int, int], float]:
    return lambda n, d, v: 4 * v * d / MIB + mib


def _half_cached(n: int, d: int, v: int) -> float:
    """Half of the exponentials of all rows, and a quarter of a budget for a tile."""
    return 2 * n * v / 2 / MIB * 4 / 3


CASES = (
    Case("forward", 1, ()),
    Case("one pass, default budget", 3, engine="one_pass"),
    Case("one pass, 1.1 GB + 4VD", 3, engine="one_pass", workspace_mb=_accumulator_and(1049)),
    Case("two passes, default budget", 3),
    Case("two passes, half cached", 4, workspace_mb=_half_cached),
    Case("two passes, 256 MiB", 4, workspace_mb=lambda n, d, v: 256),
    Case("frozen head", 2, ("hidden",)),
    Case("frozen head, one pass", 2, ("hidden",), engine="one_pass"),
    Case("low rank, weight frozen", 2, ("hidden", "left", "right"), engine="one_pass"),
    Case("bias learns", 3, ("hidden", "weight", "bias"), engine="one_pass"),
    Case("KL of two models", 4, divergence="reverse"),
    Case("JSD of two models", 4, divergence="jsd"),
    Case("KL of two models, frozen head", 3, ("hidden",), divergence="reverse"),
)


def run(case: Case, n: int, d: int, v: int) -> Counts:
    """Forward and, where something learns, backward."""
    hidden, weight = pretended(n, d, learns="hidden" in case.learns), pretended(v, d, learns="weight" in case.learns)
    labels = pretended(n, dtype=torch.int64)
    bias = pretended(v, learns=True) if "bias" in case.learns else None
    factors = [pretended(size, RANK, learns=True) for size in (n, v)]
    options = {"workspace_mb": case.workspace_mb(n, d, v), "low_rank": factors if "left" in case.learns else None}
    with counted() as counts:
        if case.divergence is not None:
            ref = {"ref_hidden": pretended(n, d), "ref_lm_head_weight": pretended(v, d)}
            loss, upstream = linear_token_kl(hidden, weight, **ref, direction=case.divergence, reduction="sum"), None
        elif case.engine is None:
            loss = linear_logprob(hidden, weight, labels, bias, **options)
            upstream = torch.empty_like(loss)
        else:
            loss = linear_weighted_nll(hidden, weight, labels, None, bias, engine=case.engine, **options)
            upstream = None
        if loss.requires_grad:
            torch.autograd.backward([loss], [upstream])
    return counts


def _bare_bytes(gemms: int, n: int, d: int, v: int) -> int:
    """What bare bf16 GEMMs of these shapes move: each of them reads or writes the three matrices once."""
    return gemms * 2 * (n * d + v * d + n * v)


def computed(case: Case, shape: tuple[int, int, int]) -> dict:
    """A row of the table. Small products (of rank RANK) are bound by memory: the longer of both times counts."""
    counts, logits = run(case, *shape), shape[0] * shape[2]
    n, d, v = shape
    gemm_s = sum(max(flop / RATE, moved / BANDWIDTH) for flop, moved in counts.gemms)
    row_bytes = sum(b for name, b in counts.kernels if name in ROW_KERNELS)
    other_bytes = sum(b for _, b in counts.kernels + counts.others) - row_bytes
    bare_s = case.gemms * 2.0 * n * d * v / RATE
    extra = max(0, sum(moved for _, moved in counts.gemms) - _bare_bytes(case.gemms, *shape))
    total_s = gemm_s + (row_bytes + other_bytes) / BANDWIDTH
    return {
        "shape": "x".join(map(str, shape)),
        "engine": case.name,
        "gemms": f"{sum(flop for flop, _ in counts.gemms) / (2.0 * n * d * v):.3g}",
        "gemm_launches": len(counts.gemms),
        "kernel_launches": len(counts.kernels),
        "torch_launches": len(counts.others),
        "host_reads": counts.host_reads,
        "row_bytes_a_logit": f"{row_bytes / logits:.3g}",
        "other_gb": f"{other_bytes / 1e9:.3g}",
        "gemm_ms": f"{gemm_s * 1e3:.4g}",
        "computed_ms": f"{total_s * 1e3:.4g}",
        "computed_ratio": f"{total_s / bare_s:.3f}",
        "computed_ratio_exposed": f"{(total_s + extra / BANDWIDTH) / bare_s:.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help=f"write the rows into this file ({RESULTS.name})")
    parser.add_argument("--code", default="now", help="the column that says which code was counted")
    args = parser.parse_args()
    rows = []
    for shape in SHAPES:
        for case in CASES:
            try:
                rows.append({"code": args.code, **computed(case, shape)})
            except ValueError as refused:  # a budget that holds no tile
                print(f"{case.name} at {shape}: {refused}", file=sys.stderr)
                continue
            print("  ".join(f"{value:>{max(8, len(key))}}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        others = []
        if args.csv.exists():
            with args.csv.open(newline="") as file:
                others = [row for row in csv.DictReader(file) if row["code"] != args.code]
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows([*others, *rows])


if __name__ == "__main__":
    main()
