"""From a memory budget to tile shapes. The number of chunks follows from ``workspace_mb``, never from V / D."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from var_kernels.kernels.compile_time import compile_time

MIB = 1 << 20
# Narrower slices or shorter chunks than these starve a GEMM.
_MIN_COLUMNS = 1024
_MIN_ROWS = 64
# On an accelerator. A chunk of R rows reads and writes the fp32 dW: 8 bytes an element for 2 R FLOP, bound by memory
# below R = 4 rate / bandwidth (640 on an A100, 780 on an H200, 870 on an H100); one GEMM saved is then worth as much.
_MIN_ACCELERATOR_ROWS = 1024
DWEIGHT_ROWS = 780
MAX_FORWARD_ROWS = 4096
# The C++ GEMM packs a block of dlogits^T faster where it is wide than where it is deep.
MAX_CPU_BACKWARD_ROWS = 1024
# Of a tile beside stored exponentials, on an accelerator: enough for a GEMM of its own.
_TILE_BYTES = 256 * MIB
# Of a tile on a CPU: it stays in the last-level cache there, and fresh pages cost more than a narrower GEMM.
_CACHED_BYTES = 4 * MIB


def default_workspace_mb(device: torch.device, weight_bytes: int) -> int:
    """On a CPU half of the head's weight, at least 64 MiB: with less, dW is added up from chunks so short that memory
    and not arithmetic sets the time. On an accelerator 1/32 of its memory, at least 128 MiB.
    """
    if device.type != "cuda":
        return max(64, weight_bytes // 2 // MIB)
    return max(128, _cuda_memory(device.index or 0) // 32 // MIB)


def budget_bytes(workspace_mb: float | None, lm_head_weight: Tensor) -> int:
    if workspace_mb is None:
        workspace_mb = default_workspace_mb(lm_head_weight.device, lm_head_weight.numel() * lm_head_weight.itemsize)
    return int(workspace_mb * MIB)


@compile_time
def _cuda_memory(index: int) -> int:
    if not torch.cuda.is_available():  # a fake tensor's device
        return 0
    return torch.cuda.get_device_properties(index).total_memory


def spans(start: int, stop: int, step: int):
    """(start, stop) of consecutive pieces of a range."""
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)


@dataclass(frozen=True)
class TilePlan:
    """How many rows and vocabulary columns a tile holds."""

    rows: int
    columns: int


@dataclass(frozen=True)
class ExpPlan(TilePlan):
    """Rows and columns of a tile, and how many columns' exponentials are stored before they are multiplied."""

    stored: int


@dataclass(frozen=True)
class TileCost:
    """Bytes of a tile of r rows and c columns: r c element + c column + r row + fixed."""

    element: int
    column: int = 0
    row: int = 0
    fixed: int = 0

    def with_row(self, more: int) -> "TileCost":
        return replace(self, row=self.row + more)

    def columns_within(self, budget: int, rows: int) -> int:
        return (budget - self.fixed - rows * self.row) // (rows * self.element + self.column)

    def rows_within(self, budget: int, columns: int) -> int:
        return (budget - self.fixed - columns * self.column) // (columns * self.element + self.row)


def within_cache(n: int, v: int, budget: int, cost: TileCost) -> int:
    """A budget without more than a cached tile, or a tile of all rows and the fewest columns where that is larger."""
    rows, columns = max(1, n), min(v, _MIN_COLUMNS)
    fewest = cost.fixed + columns * cost.column + rows * (columns * cost.element + cost.row)
    return min(budget, max(fewest, _CACHED_BYTES))


def _rows_or_refuse(budget: int, cost: TileCost, columns: int, purpose: str, beside: int = 0) -> int:
    rows = cost.rows_within(budget, columns)
    if rows < 1:
        needed = beside + cost.fixed + columns * (cost.element + cost.column) + cost.row
        raise ValueError(
            f"workspace_mb={(budget + beside) / MIB:.3g} is too small for {purpose}: a row of {columns} columns needs "
            f"about {needed / MIB:.3g} MiB; give workspace_mb={-(-2 * needed // MIB)} or more"
        )
    return rows


def _slice_width(columns: int, v: int) -> int:
    """Slices begin at multiples of 64 columns, for aligned operands."""
    return v if columns >= v else max(columns - columns % 64, min(columns, 64))


def plan_forward(n: int, v: int, budget: int, cost: TileCost) -> TilePlan:
    """Rows by vocabulary slices, merged by running statistics: as square as the budget allows."""
    rows = max(1, min(n, MAX_FORWARD_ROWS))
    columns = cost.columns_within(budget, rows)
    if columns < min(v, _MIN_COLUMNS):
        columns = min(v, _MIN_COLUMNS)
        rows = min(n, _rows_or_refuse(budget, cost, columns, "the forward pass"))
    elif columns >= v:
        columns = v
        rows = min(n, cost.rows_within(budget, v))
    return TilePlan(max(1, rows), _slice_width(columns, v))


def plan_token_chunks(n: int, v: int, budget: int, cost: TileCost, accumulator: int) -> TilePlan:
    """Chunks of whole rows, for gradients made in the forward pass; ``accumulator`` bytes are already taken from the
    budget.
    """
    return TilePlan(min(max(n, 1), _rows_or_refuse(budget, cost, v, "one pass over token chunks", accumulator)), v)


def shortest_chunk(device: torch.device, gemms_saved: int = 1) -> int:
    """Rows of a chunk from which on one pass is faster than two that run so many more GEMMs."""
    return _MIN_ROWS if device.type == "cpu" else _MIN_ACCELERATOR_ROWS // gemms_saved


def tile_share(budget: int) -> int:
    """What a tile takes of a budget that stores exponentials, where tiles need not stay in a cache."""
    return min(budget // 4, _TILE_BYTES)


def plan_exp_chunks(n: int, v: int, budget: int, cost: TileCost, exp: int, tile: int, accumulator: int) -> ExpPlan:
    """Chunks of whole rows, ``exp`` bytes a stored element, beside a tile of ``tile`` bytes, or of the fewest columns
    where that is too narrow or leaves no row; ``accumulator`` bytes are already taken from the budget.
    """
    stored = cost.with_row(v * exp)
    narrow = min(v, _MIN_COLUMNS)
    rows = min(max(n, 1), stored.rows_within(budget - tile, 0))
    columns = replace(cost, row=0, fixed=0).columns_within(tile, rows) if rows > 0 else 0
    if columns < narrow:
        columns = narrow
        rows = min(max(n, 1), _rows_or_refuse(budget, stored, narrow, "one pass over token chunks", accumulator))
    return ExpPlan(rows, _slice_width(columns, v), v)


def holds_token_chunks(n: int, v: int, budget: int, cost: TileCost, shortest: int) -> bool:
    """Whether the budget holds chunks that are long enough to keep one pass efficient."""
    return cost.rows_within(budget, v) >= min(n, shortest)


def plan_vocabulary_slices(n: int, v: int, budget: int, cost: TileCost) -> TilePlan:
    """Slices that see all rows, so each slice of dW is written once; rows are split only where a slice would get too
    narrow.
    """
    columns = cost.columns_within(budget, max(n, 1))
    if columns >= min(v, _MIN_COLUMNS):
        return TilePlan(max(n, 1), _slice_width(columns, v))
    columns = min(v, _MIN_COLUMNS)
    return TilePlan(min(n, _rows_or_refuse(budget, cost, columns, "the backward pass")), columns)
