"""Roofs, and the timings that decide the defaults: GEMMs, row kernels, the fused forward, where the engines cross.

Rates are those of kernels in a full queue: a launch of a row kernel takes a good part of the kernel's own time.
"""

import bisect
import functools
import itertools
from contextlib import contextmanager

import torch

from benchmarks.gpu_timing import GIGA, MIB, TFLOP, Item, products_run
from var_kernels import linear_logprob, linear_weighted_nll
from var_kernels.kernels.pairs import KINDS, PairOptions, empty_state
from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats
from var_kernels.ops.backend import choose_backend, kernels_of, pair_kernels
from var_kernels.ops.head import Head, HeadOptions, Needs, budget_bytes
from var_kernels.ops.plan import one_pass_rows

MAIN = (8192, 4096, 128256)
TINY = (64, 32, 512)


def _gemm_row(what: str, timing: dict, flop: float) -> dict:
    return {"what": what, **timing, "rate": flop / timing["queued_ms"] * 1e3 / TFLOP, "unit": "TFLOP/s"}


def _bytes_row(what: str, timing: dict, moved: float) -> dict:
    return {"what": what, **timing, "rate": moved / timing["queued_ms"] * 1e3 / GIGA, "unit": "GB/s"}


def _copy(bench) -> list[dict]:
    source = torch.empty(1 << (16 if bench.dry_run else 31), dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    timing = bench.total({"copy": lambda: _ignore(target.copy_(source))})["copy"]
    return [_bytes_row("copy", timing, 2 * source.numel())]


def _ignore(_) -> None:
    """Steps return nothing."""


def _matrix_product(bench, shape) -> list[dict]:
    n, d, v = shape
    hidden, weight = bench.randn(n, d), bench.randn(v, d, scale=0.02)
    timing = bench.total({"mm": lambda: _ignore(torch.mm(hidden, weight.t()))})["mm"]
    return [_gemm_row(f"mm {n}x{d}x{v}", timing, 2 * n * d * v)]


def roofs(dry_run: bool) -> list[Item]:
    """Copy bandwidth, and the bf16 GEMM at a square and at the op's own shapes."""
    shapes = [(8192, 8192, 8192), MAIN, (2048, 4096, 128256), (8192, 896, 151936), (8192, 2304, 256000)]
    items = [Item("roofs", "copy", _copy, 0.0 if dry_run else 1.5, rank=0)]
    for shape in [(64, 32, 128)] if dry_run else shapes:
        run = functools.partial(_matrix_product, shape=shape)
        items.append(Item("roofs", "x".join(map(str, shape)), run, 0.0 if dry_run else 1.2, rank=0))
    return items


def _kernels(bench, tile: torch.dtype = torch.float32):
    """Row kernels, label kernels and products of the device."""
    return kernels_of(choose_backend(bench.device, tile)[0])


def _sizes(bench, real, tiny=TINY):
    return tiny if bench.dry_run else real


def _logit_gemms(bench) -> list[dict]:
    """fp32 against bf16 results of the logits' GEMM."""
    _, d, v = _sizes(bench, MAIN)
    rows, gemm = _sizes(bench, 2048, 32), _kernels(bench)[2]
    hidden, weight = bench.randn(rows, d), bench.randn(v, d, scale=0.02)
    wide = torch.empty(rows, v, dtype=torch.float32, device=bench.device)
    narrow = torch.empty(rows, v, dtype=torch.bfloat16, device=bench.device)
    # Only CUDA takes 16-bit operands to fp32.
    operand = hidden.float() if bench.dry_run else hidden
    steps = {
        "logits, fp32 out": lambda: gemm.logits_into(wide, operand, weight),
        "logits, bf16 out": lambda: gemm.logits_into(narrow, hidden, weight),
    }
    return [_gemm_row(name, timing, 2 * rows * d * v) for name, timing in bench.total(steps).items()]


def _slice_gemms(bench, width: int) -> list[dict]:
    """The backward's two products of one slice of the vocabulary, and the recomputed logits of its width."""
    n, d, _ = _sizes(bench, MAIN)
    gemm = _kernels(bench)[2]
    hidden, weight = bench.randn(n, d), bench.randn(width, d, scale=0.02)
    dlogits = bench.randn(n, width)
    # As the in-place gradient lies: bf16 in rows of fp32's stride.
    strided = torch.empty(n, 2 * width, dtype=torch.bfloat16, device=bench.device)[:, :width].copy_(dlogits)
    dhidden = torch.zeros(n, d, dtype=torch.float32, device=bench.device)
    dweight = torch.empty(width, d, dtype=torch.bfloat16, device=bench.device)
    logits = torch.empty(n, width, dtype=torch.float32, device=bench.device)
    operand = hidden.float() if bench.dry_run else hidden
    steps = {
        f"logits, slice {width}": lambda: gemm.logits_into(logits, operand, weight),
        f"dH += dlogits W, slice {width}": lambda: gemm.add_product(dhidden, dlogits, weight),
        f"dH += dlogits W, slice {width}, strided": lambda: gemm.add_product(dhidden, strided, weight),
        f"dW = dlogits^T H, slice {width}": lambda: gemm.product_into(dweight, dlogits.t(), hidden),
        f"dW = dlogits^T H, slice {width}, strided": lambda: gemm.product_into(dweight, strided.t(), hidden),
    }
    return [_gemm_row(name, timing, 2 * n * d * width) for name, timing in bench.total(steps).items()]


def _chunk_gemms(bench, length: int) -> list[dict]:
    """fp32 dW of one chunk of rows: written, and added to."""
    _, d, v = _sizes(bench, MAIN)
    gemm = _kernels(bench)[2]
    hidden, dlogits = bench.randn(length, d), bench.randn(length, v)
    total = torch.zeros(v, d, dtype=torch.float32, device=bench.device)
    steps = {
        f"fp32 dW = dlogits^T H, chunk {length}": lambda: gemm.product_into(total, dlogits.t(), hidden),
        f"fp32 dW += dlogits^T H, chunk {length}": lambda: gemm.add_product(total, dlogits.t(), hidden),
    }
    return [_gemm_row(name, timing, 2 * length * d * v) for name, timing in bench.total(steps).items()]


def _overlap(bench) -> list[dict]:
    """The GEMM of half a tile and the statistics of the other half: one after the other, and on two streams."""
    _, d, v = _sizes(bench, MAIN)
    half = _sizes(bench, 1024, 16)
    kernels, _, gemm = _kernels(bench)
    hidden, weight = bench.randn(half, d), bench.randn(v, d, scale=0.02)
    operand = hidden.float() if bench.dry_run else hidden
    tile = torch.zeros(2 * half, v, dtype=torch.float32, device=bench.device)
    labels = torch.zeros(half, 1, dtype=torch.int64, device=bench.device)
    stats = RowStats.empty(half, 1, tile, entropy=False, mean=False, argmax=False)

    def statistics():
        kernels.row_stats(tile[half:], labels, stats, 0, None, LogitTransform())

    def serial():
        gemm.logits_into(tile[:half], operand, weight)
        statistics()

    steps = {"logits and row_stats, one stream": serial, "logits and row_stats, two streams": serial}
    if not bench.dry_run:
        other = torch.cuda.Stream()

        def overlapped():
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                statistics()
            gemm.logits_into(tile[:half], operand, weight)
            torch.cuda.current_stream().wait_stream(other)

        steps["logits and row_stats, two streams"] = overlapped
    return [_gemm_row(name, timing, 2 * half * d * v) for name, timing in bench.total(steps).items()]


def primitives(dry_run: bool) -> list[Item]:
    """Output precision, slice widths, chunk lengths, overlap; the row kernels at their defaults."""
    runs = {"logits": _logit_gemms, "overlap": _overlap, "labels": _label_kernels}
    runs |= {
        f"slice {width}": functools.partial(_slice_gemms, width=width)
        for width in ((128, 256) if dry_run else (1024, 2048, 4096, 8192, 16384, 32768))
    }
    runs |= {
        f"chunk {length}": functools.partial(_chunk_gemms, length=length)
        for length in ((16, 32) if dry_run else (128, 256, 512, 1024, 2048, 4096))
    }
    runs |= {
        f"row kernels {str(dtype).removeprefix('torch.')}": functools.partial(_row_kernels, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    runs |= {"pair kernels": _pair_kernels}
    return [Item("primitives", key, run, 0.0 if dry_run else 2.0, rank=1) for key, run in runs.items()]


def _row_kernels(bench, dtype: torch.dtype, label: str = "", v: int = MAIN[2]) -> list[dict]:
    """Bytes: each logit read once; the gradient written in bf16 too, into the tile's own storage where that is done.
    Rows begin where those of a tile do.
    """
    n, v = _sizes(bench, (2048, v), (32, 512 if v == MAIN[2] else 507))
    kernels = _kernels(bench, dtype)[0]
    tile = bench.randn(n, -(-v // 32) * 32, dtype=dtype, scale=2.0)[:, :v]
    labels = torch.randint(0, v, (n, 1), device=bench.device)
    norms = torch.full((2, n), 7.0, device=bench.device)
    coefficients = RowCoefficients(-torch.ones_like(norms[0]), torch.ones(n, 1, device=bench.device))
    bare = RowStats.empty(n, 1, tile, entropy=False, mean=False, argmax=False)
    full = RowStats.empty(n, 1, tile, entropy=True, mean=True, argmax=True)
    head = (None, LogitTransform())

    def gradient():
        kernels.row_grad(tile, labels, norms, coefficients, 0, *head, torch.bfloat16)

    exp = RowStats.uninitialised(n, tile, mean=False, argmax=False)
    exp.set_pivots(torch.zeros(n, device=bench.device))
    stored = torch.empty(tile.shape[0], tile.stride(0), dtype=torch.bfloat16, device=bench.device)[:, :v]
    steps = {
        "row_stats": lambda: kernels.row_stats(tile, labels, bare, 0, *head),
        "row_stats, every output": lambda: kernels.row_stats(tile, labels, full, 0, *head),
        "row_exp": lambda: kernels.row_exp(tile, labels, exp, 0, *head, stored, None),
        "row_grad": gradient,
    }
    rows = []
    for name, timing in bench.total(steps).items():
        moved = tile.numel() * (dtype.itemsize + (2 if name in ("row_exp", "row_grad") else 0))
        what = f"{name}, {str(dtype).removeprefix('torch.')}, V {v}"
        rows.append({**_bytes_row(what, timing, moved), "setting": label})
    return rows


def _pair_kernels(bench) -> list[dict]:
    """Of ``linear_token_kl``, on fp32 tiles of two models. Bytes: both read, the gradient written in bf16 over the
    first: 18 a logit for a KL and its gradient, 26 for "jsd".
    """
    n, v = _sizes(bench, (2048, MAIN[2]), (32, 512))
    kernels = pair_kernels(choose_backend(bench.device, torch.float32)[0])
    z, w = (bench.randn(n, v, dtype=torch.float32, scale=2.0) for _ in range(2))
    upstream, steps = torch.ones(n, device=bench.device), {}
    for kind in KINDS:
        state, pair = empty_state(n, torch.float32, z.device), PairOptions(kind)
        run = functools.partial(kernels.pair_rows, z, w, state, pair)
        run(stats=True)
        steps[f"pair_stats {kind}"] = functools.partial(run, stats=True)
        steps[f"pair_grad {kind}"] = functools.partial(run, upstream_n=upstream, out_dtype=torch.bfloat16)
    steps["pair_mixture"] = functools.partial(run, mixture=True)
    moved = {name: z.numel() * (10 if "grad" in name else 8) for name in steps}
    timings = bench.total({name: lambda step=step: _ignore(step()) for name, step in steps.items()})
    return [_bytes_row(f"{name}, V {v}", timing, moved[name]) for name, timing in timings.items()]


def _label_kernels(bench) -> list[dict]:
    """What surrounds ``row_exp``, on tokens as frequent as Zipf's law has them; bytes: every label distinct."""
    n, d, v = _sizes(bench, MAIN)
    hidden, weight = bench.randn(n, d), bench.randn(v, d, scale=0.02)
    label_ids = (v ** torch.rand(n, 1, device=bench.device)).long().clamp(max=v - 1)
    kernels, labels_n = _kernels(bench)[1], label_ids[:, 0]
    gathered = kernels.gathered_bytes(budget_bytes(None, weight), d, torch.float32, hidden.device)
    stats = RowStats.uninitialised(n, hidden, mean=False, argmax=False)
    start = (hidden, weight, None, None, labels_n, stats, LogitTransform(), gathered)
    scale, entry, sums = torch.rand(n, device=bench.device), torch.rand(n, device=bench.device), hidden.float()
    segments, label = labels_n.sort(stable=True), (weight, labels_n, entry)
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
    one = torch.ones((), device=bench.device)
    steps = {
        "labels: start": (lambda: kernels.start_rows(*start), 4),
        "labels: sort": (lambda: _ignore(labels_n.sort(stable=True)), 0),
        "labels: scaled hidden": (lambda: kernels.combine_rows(dhidden, hidden, scale, gathered=gathered), 4),
        "labels: sums to dhidden": (lambda: kernels.combine_rows(dhidden, sums, scale, label, None, gathered), 8),
        "labels: rows of dW": (lambda: kernels.add_label_rows(dweight, segments, entry, hidden, gathered), 6),
        "scale of 1": (lambda: kernels.scale_(dweight, one), 0),
    }
    timings = bench.total({name: step for name, (step, _) in steps.items()})
    return [_bytes_row(name, timing, steps[name][1] * n * d) for name, timing in timings.items()]


@contextmanager
def _row_kernel_setting(block: int, warps: int):
    from var_kernels.kernels import rows_triton

    names = ("BLOCK_COLUMNS", "EXP_BLOCK_COLUMNS", "NUM_WARPS")
    before = [getattr(rows_triton, name) for name in names]
    try:
        for name, value in zip(names, (block, block, warps), strict=True):
            setattr(rows_triton, name, value)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(rows_triton, name, value)


def _row_kernels_with(bench, block: int, warps: int) -> list[dict]:
    with _row_kernel_setting(block, warps):
        label = f"{block} columns, {warps} warps"
        # An odd vocabulary is loaded and stored up to the padded end of a row.
        cases = itertools.product((MAIN[2], 50257), (torch.float32, torch.bfloat16))
        return [row for v, dtype in cases for row in _row_kernels(bench, dtype, label, v)]


def rowkernels(dry_run: bool) -> list[Item]:
    """The row kernels in GB/s for several block sizes and numbers of warps."""
    every = [(4096, 8), *itertools.product((1024, 2048, 4096, 8192), (4, 8, 16))]
    settings = [(2048, 8)] if dry_run else [(b, w) for b, w in dict.fromkeys(every) if 4 <= b // (32 * w) <= 32]
    return [
        Item(
            "rowkernels",
            f"{block} columns, {warps} warps",
            functools.partial(_row_kernels_with, block=block, warps=warps),
            0.0 if dry_run else 6.0,
            rank=1,
        )
        for block, warps in settings
    ]


def _forwards(bench, shape) -> list[dict]:
    """Log-probs by chunked cuBLAS at several budgets, and by the fused forward with each of its tiles."""
    n, d, v = shape
    hidden, weight = bench.randn(n, d), bench.randn(v, d, scale=2 / d**0.5)
    labels = torch.randint(0, v, (n,), device=bench.device)

    def scoring(workspace_mb):
        def step():
            with torch.no_grad():
                linear_logprob(hidden, weight, labels, workspace_mb=workspace_mb)

        return step

    budgets = (1, 2) if bench.dry_run else (128, 512, 2048, None)
    steps = {f"chunked, {b or 'default'} MiB": scoring(b) for b in budgets}
    if not bench.dry_run:
        steps |= _fused_steps(hidden, weight, labels)
    named = "x".join(map(str, shape))
    rows = [{**_gemm_row(name, timing, 2 * n * d * v), "shape": named} for name, timing in bench.total(steps).items()]
    if not bench.dry_run:
        from var_kernels.kernels.forward_triton import TILES, choose_tile

        chosen = choose_tile(hidden, weight)
        name = next(name for name, tile in TILES.items() if tile == chosen)
        rows[0]["note"] = f"the fused forward chooses: {name}"
    return rows


def _fused_steps(hidden, weight, labels) -> dict:
    from var_kernels.kernels.forward_triton import TILES, Tile, fused_forward

    tiles = {name: tile for name, tile in TILES.items() if name not in ("rocm", "small")}
    tiles["descriptors, 3 stages"] = Tile(128, 256, 64, 32, 8, 3, descriptors=True)
    labels_NK = labels[:, None]

    def fused(tile):
        def step():
            stats = RowStats.empty(hidden.shape[0], 1, hidden, entropy=False, mean=False, argmax=False)
            fused_forward(hidden, weight, None, labels_NK, stats, LogitTransform(), tile=tile)

        return step

    return {f"fused, {name}": fused(tile) for name, tile in tiles.items()}


def forward(dry_run: bool) -> list[Item]:
    shapes = [MAIN, (8192, 896, 151936), (512, 4096, 128256), (17, 4096, 128256)]
    return [
        Item("forward", "x".join(map(str, s)), functools.partial(_forwards, shape=s), 0.0 if dry_run else 7.0, rank=1)
        for s in ([TINY] if dry_run else shapes)
    ]


def _workspace_of_chunks(hidden, weight, labels, rows: int) -> float:
    """MiB of the least workspace whose budget holds one pass in chunks of so many rows."""
    backend, _ = choose_backend(hidden.device, torch.float32)
    needs = Needs(hidden=True, lm_head_weight=True)

    def held(kib: int) -> int:
        options = HeadOptions(LogitTransform(), 0.0, torch.float32, budget_bytes(kib / 1024, weight), backend)
        return one_pass_rows(Head(hidden, weight, None, labels.unsqueeze(1), options, needs))

    return bisect.bisect_left(range(1 << 30), rows, key=held) / 1024


def _crossing(bench, shape, engine: str, workspace_mb: float | None, about: dict) -> list[dict]:
    n, d, v = shape
    hidden = bench.randn(n, d).requires_grad_()
    weight = bench.randn(v, d, scale=2 / d**0.5).requires_grad_()
    labels = torch.randint(0, v, (n,), device=bench.device)
    token_weight = torch.rand(n, device=bench.device)
    if about["rows"]:
        workspace_mb = _workspace_of_chunks(hidden, weight, labels, about["rows"])

    def step():
        hidden.grad = weight.grad = None
        linear_weighted_nll(hidden, weight, labels, token_weight, engine=engine, workspace_mb=workspace_mb).backward()

    step()
    hidden.grad = weight.grad = None
    peak = bench.peak_mib(step)
    ran = products_run(step, n, d, v)
    timing = bench.total({"": step})[""]
    return [
        {
            "shape": "x".join(map(str, shape)),
            "engine": engine,
            **about,
            "workspace_mib": budget_bytes(workspace_mb, weight) / MIB,
            **timing,
            "gemms_run": ran,
            "peak_less_gradients_mib": peak - (hidden.nbytes + weight.nbytes) / MIB,
        }
    ]


def crossover(dry_run: bool) -> list[Item]:
    """One pass with chunks of so many rows, two passes with so many MiB: where they cross."""
    items = []
    for shape in [TINY] if dry_run else [MAIN, (8192, 896, 151936)]:
        n, d, v = shape
        chunks = [16] if dry_run else [128, 256, 512, 1024, 2048]
        cases = [("one_pass", {"rows": rows}, None) for rows in chunks]
        cases += [("two_pass", {}, workspace) for workspace in ([2] if dry_run else [128, 256, 512, 1024, 2048])]
        cases += [(engine, {"default": True}, None) for engine in ("one_pass", "two_pass")]
        for engine, about, workspace in cases:
            about = {"rows": "", "default": False, **about}
            run = functools.partial(_crossing, shape=shape, engine=engine, workspace_mb=workspace, about=about)
            key = f"{'x'.join(map(str, shape))} {engine} {about['rows'] or workspace or 'default'}"
            items.append(Item("crossover", key, run, 0.0 if dry_run else 1.5 + 14 * 8 * n * d * v / 550e12, rank=1))
    return items


SECTIONS = {
    "roofs": roofs,
    "primitives": primitives,
    "crossover": crossover,
    "rowkernels": rowkernels,
    "forward": forward,
}
