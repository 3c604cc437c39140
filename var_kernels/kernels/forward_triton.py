"""The fused forward in Triton: GEMM and log-sum-exp in one kernel. Logits exist in registers only, in fp32.

A program owns a block of rows and one split of the vocabulary; for each tile of columns it runs the whole GEMM, then
merges the tile into its rows' running statistics. A second kernel merges the splits. No atomics: same bits every time.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .rows import LogitTransform, RowStats, packed
from .rows_triton import LAUNCH_OPTIONS, ROW_COUNTS, _scalars, _transformed, on_device_of

# Below every finite logit that a network makes, and finite, so that differences are never NaN.
LOWEST = tl.constexpr(-1e38)
# Neighbouring programs share this many blocks of rows, then take the next split: both operands stay in the L2 cache.
GROUP_BLOCKS = 16
MAX_SPLITS = 256
# Statistics that a program of the merging kernel holds at a time.
MERGE_ELEMENTS = 2048


@dataclass(frozen=True)
class Tile:
    """Shape of one GEMM tile. part: columns that the epilogue handles at a time, fewer of them need fewer registers.

    descriptors: operands are read through host-side TMA descriptors, else through pointers of any strides.
    """

    rows: int
    columns: int
    depth: int
    part: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# Chosen by registers, spills and shared memory of offline compiles (benchmarks/compile_kernels.py); none is timed yet.
TILES = {
    "descriptors": Tile(128, 256, 64, 32, 8, 4, descriptors=True),  # Hopper and Blackwell data centre
    "descriptors, small": Tile(128, 128, 64, 16, 4, 3, descriptors=True),  # the same, two programs a processor
    "pointers": Tile(128, 128, 64, 16, 8, 4),  # other NVIDIA GPUs
    "rocm": Tile(128, 128, 64, 32, 8, 2),  # 64 KiB of shared memory
    "small": Tile(64, 128, 16, 32, 8, 3),  # fp32 (multiply-adds, no tensor cores), rows that are not aligned, the rest
}


@triton.jit
def _load_tile(
    source,
    first,
    clamped,
    k,
    D,
    stride,
    stride_d,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """(rows, DEPTH) of a matrix, from row ``first`` and column k on; columns beyond D are 0."""
    if DESCRIPTORS:
        tile = source.load([first, k])
    else:
        depth = k + tl.arange(0, DEPTH)
        pointers = source + clamped[:, None] * stride + depth[None, :].to(tl.int64) * stride_d
        tile = tl.load(pointers) if EVEN_D else tl.load(pointers, mask=depth[None, :] < D, other=0.0)
    return tile


@triton.jit
def _absorb(
    x,  # (ROWS, COLUMNS) raw logits
    first,
    rows,
    running,  # max, sumexp, shifted sum, logit sum, argmax: (ROWS,) each
    pointers,  # bias, labels, label_logit; None or not: shifted sum, logit sum, argmax
    N,
    V,
    K,
    scale,
    cap,
    inner,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """Merge the tile's columns from ``first`` on into the running statistics, PART of them at a time."""
    if COLUMNS > PART:
        # (ROWS, COLUMNS) -> its left and right half; no data moves between threads.
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, COLUMNS // 2)), (0, 2, 1)))
        running = _absorb(
            left, first, rows, running, pointers, N, V, K, scale, cap, inner,
            COLUMNS // 2, PART,
        )  # fmt: skip
        running = _absorb(
            right, first + COLUMNS // 2, rows, running, pointers, N, V, K, scale, cap, inner,
            COLUMNS // 2, PART,
        )  # fmt: skip
    else:
        max_n, sum_n, shifted_n, total_n, argmax_n = running
        bias_ptr, labels_ptr, label_logit_ptr, shifted_ptr, logit_sum_ptr, argmax_ptr = pointers
        columns = first + tl.arange(0, COLUMNS)
        inside = (columns < V)[None, :]
        z = _transformed(x, bias_ptr, columns[None, :], inside, scale, cap, inner)
        # The labels' logits come from the same accumulators as the sum: logp is never above 0. The branch also keeps
        # the compiler from working on several parts at once, which would spill.
        for k in tl.range(0, K, num_stages=1):
            label_n = tl.load(labels_ptr + rows * K + k, mask=rows < N, other=-1)
            here_n = (label_n >= first) & (label_n < tl.minimum(first + COLUMNS, V))
            if tl.max(here_n.to(tl.int32), 0) > 0:
                picked = tl.where(columns[None, :] == label_n[:, None], z, 0.0)
                tl.store(label_logit_ptr + rows * K + k, tl.sum(picked, 1), mask=here_n)
        if logit_sum_ptr is not None:
            total_n += tl.sum(tl.where(inside, z, 0.0), 1)
        z = tl.where(inside, z, float("-inf"))
        part_max = tl.max(z, 1)
        new_max = tl.maximum(max_n, part_max)
        if argmax_ptr is not None:
            first_max = tl.min(tl.where(z == part_max[:, None], columns[None, :], V), 1)
            argmax_n = tl.where(part_max > max_n, first_max, argmax_n)
        drop_n = max_n - new_max
        decay_n = tl.exp(drop_n)
        below = z - new_max[:, None]
        exp_below = tl.exp(below)
        if shifted_ptr is not None:
            # 0 times -inf is NaN: the exponential of -1e30 is 0 as well.
            part_shifted = tl.sum(exp_below * tl.maximum(below, -1e30), 1)
            shifted_n = decay_n * (shifted_n + tl.maximum(drop_n, -1e30) * sum_n) + part_shifted
        sum_n = decay_n * sum_n + tl.sum(exp_below, 1)
        running = (new_max, sum_n, shifted_n, total_n, argmax_n)
    return running


@triton.jit(do_not_specialize=ROW_COUNTS)
def _fused_forward_kernel(
    hidden,  # (N, D): pointer or descriptor
    weight,  # (V, D): pointer or descriptor
    bias_ptr,  # (V,)
    labels_ptr,  # (N, K) int64
    label_logit_ptr,  # (N, K)
    max_ptr,  # (S, N) and so on: the statistics of each split
    sumexp_ptr,
    shifted_ptr,
    logit_sum_ptr,
    argmax_ptr,  # (S, N) int32
    N,
    V,
    D,
    K,
    S,
    hidden_stride_n,
    hidden_stride_d,
    weight_stride_v,
    weight_stride_d,
    split_columns,
    scale,
    cap,
    inner,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    group = tl.program_id(0) // (GROUP * S)
    within = tl.program_id(0) % (GROUP * S)
    group_blocks = tl.minimum(tl.cdiv(N, ROWS) - group * GROUP, GROUP)
    first_row = (group * GROUP + within % group_blocks) * ROWS
    split = within // group_blocks

    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    # Rows and columns beyond the end read the last one again instead of a mask; nothing of them is kept.
    held_rows = tl.minimum(rows, N - 1)
    max_n = tl.full((ROWS,), LOWEST, tl.float32)
    sum_n = tl.zeros((ROWS,), tl.float32)
    shifted_n = tl.zeros((ROWS,), tl.float32)
    total_n = tl.zeros((ROWS,), tl.float32)
    argmax_n = tl.zeros((ROWS,), tl.int32)
    pointers = (bias_ptr, labels_ptr, label_logit_ptr, shifted_ptr, logit_sum_ptr, argmax_ptr)
    start = split * split_columns
    for first in tl.range(start, tl.minimum(start + split_columns, V), COLUMNS):
        held_columns = tl.minimum((first + tl.arange(0, COLUMNS)).to(tl.int64), V - 1)
        acc_nv = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in tl.range(0, D, DEPTH):
            hidden_nd = _load_tile(
                hidden, first_row, held_rows, k, D, hidden_stride_n, hidden_stride_d, DEPTH, DESCRIPTORS, EVEN_D
            )
            weight_vd = _load_tile(
                weight, first, held_columns, k, D, weight_stride_v, weight_stride_d, DEPTH, DESCRIPTORS, EVEN_D
            )
            acc_nv = tl.dot(hidden_nd, weight_vd.T, acc_nv, input_precision="ieee")
        max_n, sum_n, shifted_n, total_n, argmax_n = _absorb(
            acc_nv, first, rows, (max_n, sum_n, shifted_n, total_n, argmax_n), pointers, N, V, K, scale, cap, inner,
            COLUMNS, PART,
        )  # fmt: skip

    kept = rows < N
    out = split.to(tl.int64) * N + rows
    tl.store(max_ptr + out, max_n, mask=kept)
    tl.store(sumexp_ptr + out, sum_n, mask=kept)
    if shifted_ptr is not None:
        tl.store(shifted_ptr + out, shifted_n, mask=kept)
    if logit_sum_ptr is not None:
        tl.store(logit_sum_ptr + out, total_n, mask=kept)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + out, argmax_n, mask=kept)


@triton.jit(do_not_specialize=ROW_COUNTS)
def _merge_splits_kernel(
    split_max_ptr,  # (S, N)
    split_sumexp_ptr,
    split_shifted_ptr,
    split_logit_sum_ptr,
    split_argmax_ptr,  # (S, N) int32
    max_ptr,  # (N,)
    sumexp_ptr,
    shifted_ptr,
    logit_sum_ptr,
    argmax_ptr,  # (N,) int64
    N,
    S,
    V,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    splits = tl.arange(0, SPLITS).to(tl.int64)
    kept = rows < N
    tile = splits[:, None] * N + rows[None, :]
    mask = (splits < S)[:, None] & kept[None, :]
    max_sn = tl.load(split_max_ptr + tile, mask=mask, other=LOWEST)
    sum_sn = tl.load(split_sumexp_ptr + tile, mask=mask, other=0.0)
    max_n = tl.max(max_sn, 0)
    drop_sn = max_sn - max_n[None, :]
    decay_sn = tl.exp(drop_sn)
    # Nothing but -inf: no maximum either.
    tl.store(max_ptr + rows, tl.where(max_n == LOWEST, float("-inf"), max_n), mask=kept)
    tl.store(sumexp_ptr + rows, tl.sum(decay_sn * sum_sn, 0), mask=kept)
    if shifted_ptr is not None:
        shifted_sn = tl.load(split_shifted_ptr + tile, mask=mask, other=0.0)
        shifted_sn = decay_sn * (shifted_sn + tl.maximum(drop_sn, -1e30) * sum_sn)
        tl.store(shifted_ptr + rows, tl.sum(shifted_sn, 0), mask=kept)
    if logit_sum_ptr is not None:
        total_sn = tl.load(split_logit_sum_ptr + tile, mask=mask, other=0.0)
        tl.store(logit_sum_ptr + rows, tl.sum(total_sn, 0), mask=kept)
    if argmax_ptr is not None:
        argmax_sn = tl.load(split_argmax_ptr + tile, mask=mask, other=0)
        first_max = tl.min(tl.where(mask & (max_sn == max_n[None, :]), argmax_sn, V), 0)
        tl.store(argmax_ptr + rows, first_max.to(tl.int64), mask=kept)


def choose_tile(hidden_ND: Tensor, lm_head_weight_VD: Tensor) -> Tile:
    """By dtype, device and layout. Short rows or few of them take the small tile: two programs hide each other's
    epilogue.
    """
    n, d = hidden_ND.shape
    operands = (hidden_ND, lm_head_weight_VD)
    if hidden_ND.dtype == torch.float32 or hidden_ND.device.type != "cuda" or not all(map(_aligned, operands)):
        return TILES["small"]
    if torch.version.hip:
        return TILES["rocm"]
    major, _ = torch.cuda.get_device_capability(hidden_ND.device)
    if major in (9, 10):
        return TILES["descriptors, small" if n <= 128 or d < 2048 else "descriptors"]
    # Before Ampere registers hold what is loaded ahead, and the large tile spills.
    return TILES["pointers" if major >= 8 else "small"]


def _aligned(matrix: Tensor) -> bool:
    """Contiguous rows of a length that Triton knows to load 16 bytes at a time, one behind the other: TMA asks for no
    more, and refuses rows that lie on each other (an expanded one).
    """
    rows_aligned = matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0 and matrix.stride(0) >= matrix.shape[1]
    return matrix.stride(1) == 1 and rows_aligned and matrix.shape[1] % 16 == 0


@functools.cache  # of few rows it takes longer than the kernel
def choose_splits(row_blocks: int, column_tiles: int, processors: int) -> int:
    """Into how many splits the vocabulary goes: the least work for the busiest processor. At least 8 where there are
    as many tiles, which is what lets a group of programs share both operands.
    """
    least = min(column_tiles, 8)
    most = min(column_tiles, max(least, -(-2 * processors // row_blocks)), MAX_SPLITS)

    def tiles_of_the_busiest(splits: int) -> int:
        return triton.cdiv(row_blocks * splits, processors) * triton.cdiv(column_tiles, splits)

    return min(range(least, most + 1), key=tiles_of_the_busiest)


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1


def fused_forward(
    hidden_ND: Tensor,
    lm_head_weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_NK: Tensor,
    stats: RowStats,
    transform: LogitTransform,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> None:
    """Statistics of every row over the whole vocabulary, written into ``stats``, which must be empty. fp32 and 16-bit
    operands of any strides. Beside ``stats`` it allocates at most 20 bytes a row and split.
    """
    (n, d), (v, k) = hidden_ND.shape, (lm_head_weight_VD.shape[0], labels_NK.shape[1])
    if n == 0:
        return
    tile = tile or choose_tile(hidden_ND, lm_head_weight_VD)
    row_blocks, column_tiles = triton.cdiv(n, tile.rows), triton.cdiv(v, tile.columns)
    splits = min(splits or choose_splits(row_blocks, column_tiles, _processors(hidden_ND.device)), column_tiles)
    split_columns = triton.cdiv(column_tiles, splits) * tile.columns
    splits = triton.cdiv(v, split_columns)

    max_SN, sumexp_SN = hidden_ND.new_empty(2, splits, n, dtype=torch.float32)
    shifted_SN = None if stats.shifted_sum_N is None else torch.empty_like(max_SN)
    logit_sum_SN = None if stats.logit_sum_N is None else torch.empty_like(max_SN)
    argmax_SN = None if stats.argmax_N is None else torch.empty_like(max_SN, dtype=torch.int32)
    hidden, weight = hidden_ND, lm_head_weight_VD
    if tile.descriptors:
        hidden = TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth])
        weight = TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth])
    partial = (max_SN, sumexp_SN, shifted_SN, logit_sum_SN, argmax_SN)
    whole = (stats.max_N, stats.sumexp_N, stats.shifted_sum_N, stats.logit_sum_N, stats.argmax_N)
    merged_splits = triton.next_power_of_2(splits)
    merged_rows = MERGE_ELEMENTS // merged_splits
    with on_device_of(hidden_ND):
        _fused_forward_kernel[(row_blocks * splits,)](
            *(hidden, weight, packed(bias_V), labels_NK.contiguous(), stats.label_logit_NK, *partial),
            *(n, v, d, k, splits, *hidden_ND.stride(), *lm_head_weight_VD.stride(), split_columns),
            **_scalars(transform),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            PART=tile.part,
            GROUP=GROUP_BLOCKS,
            DESCRIPTORS=tile.descriptors,
            EVEN_D=d % tile.depth == 0,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **LAUNCH_OPTIONS,
        )
        options = {"ROWS": merged_rows, "SPLITS": merged_splits, "num_warps": 4, **LAUNCH_OPTIONS}
        _merge_splits_kernel[(triton.cdiv(n, merged_rows),)](*partial, *whole, n, splits, v, **options)
