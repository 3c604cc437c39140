"""Plans: the engine of a pass, the shape of its tiles, and all bytes but gradients and vectors of a number a row.

A plan follows from sizes and the budget (``workspace_mb``); the engines execute it, and ``doctor`` prints it.
"""

from dataclasses import dataclass, replace

import torch

from var_kernels.kernels.rows import aligned
from var_kernels.ops.head import HIDDEN_ALONE, MIB, Head, HeadPair, TileCost, budget_bytes

# Narrower slices or shorter chunks than these starve a GEMM.
_MIN_COLUMNS = 1024
_MIN_ROWS = 64
# On an accelerator. A chunk of R rows reads and writes the fp32 dW: 8 bytes an element for 2 R FLOP, bound by memory
# below R = 4 rate / bandwidth (640 on an A100, 780 on an H200, 870 on an H100); one GEMM saved is then worth as much.
_MIN_ACCELERATOR_ROWS = 1024
_DWEIGHT_ROWS = 780
MAX_FORWARD_ROWS = 4096
# The C++ GEMM packs a block of dlogits^T faster where it is wide than where it is deep.
MAX_CPU_BACKWARD_ROWS = 1024
# Of a tile in addition to stored exponentials, on an accelerator: enough for a GEMM of its own.
_TILE_BYTES = 256 * MIB
# Of a tile on a CPU: it stays in the last-level cache there, and fresh pages cost more than a narrower GEMM.
_CACHED_BYTES = 4 * MIB
# Columns are cached from a 1/8 of the vocabulary on: fewer save less than 1/32 of the time.
_FEWEST_CACHED = 8
# On a CPU fresh pages cost as much as the GEMM of a narrow head.
_MIN_CACHED_DEPTH = 256


@dataclass(frozen=True)
class Plan:
    """One pass over tiles of ``rows`` x ``columns`` logits.

    cost: bytes of a tile, and of stored columns and copies. stored: columns of a block of rows that are stored before
        they are multiplied. cached: leading columns of all rows that the budget holds until the backward. accumulator:
        bytes of the fp32 sums of dW. taken: bytes of what is held in addition to tiles.
    """

    rows: int
    columns: int
    cost: TileCost
    stored: int = 0
    cached: int = 0
    accumulator: int = 0
    taken: int = 0

    @property
    def predicted(self) -> int:
        """All bytes."""
        return self.taken + self.cost.of_tile(self.rows, self.columns)


def _gradient_cost(head: Head) -> TileCost:
    """Bytes of a tile of logits and of their gradient."""
    copies, copied = head.gradient_copies, head.kernels.COPIES_GRADIENT or head.bias_V is not None
    element = head.operand.itemsize if copied and head.operand != head.tile else 0
    return TileCost(head.cost.element + element, copies, copies, head.cost.fixed)


def _chunk_cost(head: Head, budget: int) -> TileCost:
    """Bytes of a tile of whole rows; copies of the weight are made in slices, out of a quarter of the budget."""
    cost = _gradient_cost(head)
    return replace(cost, column=0, fixed=cost.fixed + head.traits.rounding_bytes + (budget // 4 if cost.column else 0))


def _exp_cost(head: Head) -> TileCost:
    """Bytes of a tile of logits in addition to stored exponentials, with the sums and the scaled hidden states of its
    rows.
    """
    copies, operand, d, wide = head.gradient_copies, head.operand, head.d, head.wide
    row = copies + (d * wide.itemsize if wide != operand else 0) + (0 if head.needs.hidden else d * operand.itemsize)
    fixed = max(head.cost.fixed, head.gathered, head.traits.rounding_bytes)  # one after the other
    return TileCost(head.tile.itemsize, copies, row, fixed)


def _exp_tile_bytes(head: Head, budget: int) -> int:
    """Bytes of the tile of logits in addition to stored exponentials: on a CPU one that stays cached."""
    if head.device.type != "cpu":
        return min(budget // 4, _TILE_BYTES)
    rows = min(head.n, MAX_CPU_BACKWARD_ROWS)
    return min(budget // 4, _tile_budget(head, rows, head.cost, budget, cached=True))


def dweight_bytes(head: Head) -> int:
    """``accumulator_bytes`` of the chunks of one pass."""
    return accumulator_bytes(head, _rows_within(head, head.options.budget))


def accumulator_bytes(head: Head, rows: int) -> int:
    """Bytes of the sums of dW over chunks of ``rows``, where they are not themselves the gradient that is returned;
    none where all rows are one chunk: dW is one product.
    """
    accumulation = head.wide
    if not head.needs.lm_head_weight or accumulation == head.operand or rows >= head.n > 0:
        return 0
    return head.v * head.d * accumulation.itemsize


def _rows_within(head: Head, budget: int) -> int:
    """Rows of one pass's chunks."""
    if not head.stores_exp:
        return _chunk_cost(head, budget).rows_within(budget, head.v)
    cost = _exp_cost(head).with_row(head.v * head.operand.itemsize)
    return cost.rows_within(budget - _exp_tile_bytes(head, budget), 0)


# ---- plans of a head -------------------------------------------------------------------------------------------------


def forward_plan(head: Head, cached: int = 0) -> Plan:
    """Plan of ``forward_pass``, with so many cached columns."""
    # All logits need no tile.
    taken = 0 if cached == head.v and not head.stores_exp else head.n * cached * head.cached.itemsize
    budget = head.options.budget - taken
    tile = _tile_budget(head, min(head.n, MAX_FORWARD_ROWS), head.cost, budget)
    return replace(plan_forward(head.n, head.v, tile, head.cost), cached=cached, taken=taken)


def backward_plan(head: Head, cached: int = 0) -> Plan:
    """Plan of ``vocabulary_pass``, with so many cached columns."""
    cost, rows = _gradient_cost(head), head.n
    if head.kernels.CACHED_TILES and head.operand == torch.bfloat16 and rows > MAX_CPU_BACKWARD_ROWS:
        # With the fp32 sums of a slice of dW.
        cost, rows = replace(cost, column=cost.column + 4 * head.d), MAX_CPU_BACKWARD_ROWS
    taken = head.n * cached * head.cached.itemsize
    budget = head.options.budget - taken
    plan = plan_vocabulary_slices(rows, head.v, _tile_budget(head, rows, cost, budget), cost)
    return replace(plan, cached=cached, taken=taken)


def one_pass_plan(head: Head) -> Plan:
    """Plan of ``one_pass``: blocks of rows whose exponentials, or logits, are stored, ``columns`` at a time."""
    accumulator = dweight_bytes(head)
    budget = head.options.budget - accumulator
    if head.stores_exp:
        plan = _exp_plan(head, budget, accumulator)
    else:
        copies = head.gradient_copies
        plan = plan_token_chunks(head.n, head.v, budget, _chunk_cost(head, budget), copies, accumulator)
    return replace(plan, accumulator=accumulator, taken=accumulator)


def _exp_plan(head: Head, budget: int, accumulator: int) -> Plan:
    n, v, cost, exp = head.n, head.v, _exp_cost(head), head.operand.itemsize
    tile, stored = _exp_tile_bytes(head, budget), cost.with_row(v * exp)
    if not head.needs.whole_rows:
        rows = min(n, MAX_CPU_BACKWARD_ROWS if head.kernels.CACHED_TILES else MAX_FORWARD_ROWS)
        if head.kernels.CACHED_TILES or not stored.rows_within(budget - tile, 0) >= rows > 0:
            # Sums in hidden alone need no whole rows: what is stored is as wide as the tile, and stays as cached. Where
            # there is no tile, it has that memory too: fewer products, between which threads wait for each other.
            wider = replace(cost, element=cost.element + exp)
            within = _tile_budget(head, rows, wider, head.options.budget)
            plan = plan_forward(rows, v, within, replace(cost, element=exp) if head.ends_in_exp else wider)
            return _with_stored(head, plan.rows, plan.columns, plan.columns, cost)
    narrow = min(v, _MIN_COLUMNS)
    rows = min(max(n, 1), stored.rows_within(budget - tile, 0))
    columns = replace(cost, row=0, fixed=0).columns_within(tile, rows) if rows > 0 else 0
    if columns < narrow:
        # The tile would be too narrow, or leaves no row.
        columns = narrow
        rows = min(max(n, 1), _rows_or_refuse(budget, stored, narrow, "one pass over token chunks", accumulator))
    return _with_stored(head, rows, _slice_width(columns, v), v, cost)


def _with_stored(head: Head, rows: int, columns: int, stored: int, cost: TileCost) -> Plan:
    """A plan of stored exponentials, and of a tile of logits where the GEMM does not end in them."""
    cost = cost.with_row(stored * head.operand.itemsize)
    return Plan(rows, columns, replace(cost, element=0, column=0) if head.ends_in_exp else cost, stored)


def cached_columns(head: Head, *, in_place: bool = True) -> int:
    """Leading vocabulary columns that the budget holds from the forward to the backward, in addition to a tile: that
    part of the GEMM is not repeated. 0 where it would save too little. Exponentials, or logits, which the backward may
    overwrite (``in_place``), so that all of them need no tile.
    """
    if _statically(head.n == 0):
        return 0
    budget = head.options.budget
    if head.stores_exp:
        cost = replace(_exp_cost(head), element=head.operand.itemsize)
        tile = _exp_tile_bytes(head, budget)
    else:
        cost = _gradient_cost(head)
        if in_place and _statically(cost.columns_within(budget, head.n) >= head.v):
            return head.v
        rows = min(head.n, MAX_CPU_BACKWARD_ROWS)
        tile = _tile_budget(head, rows, cost, budget) if head.kernels.CACHED_TILES else budget // 4
    columns = cost.columns_within(budget - tile, head.n)
    if _statically(columns >= head.v):
        return head.v
    if head.device.type == "cpu" and head.d < _MIN_CACHED_DEPTH:
        return 0
    columns = columns // 64 * 64
    return columns if _statically(columns * _FEWEST_CACHED >= head.v) else 0


def _statically(condition: bool) -> bool:
    """A comparison of sizes; False where torch.compile cannot know (the number of rows that a mask selected)."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def takes_one_pass(head: Head, engine: str) -> bool:
    """Return whether a scalar loss takes one pass; by itself ("auto") where it fits and does not underflow."""
    return engine == "one_pass" or (engine == "auto" and not underflows(head.operand) and one_pass_fits(head))


def underflows(operand: torch.dtype) -> bool:
    """fp16 loses gradients that are made before a GradScaler's factor is known: p_v / num_items is below 6e-8."""
    return operand == torch.float16


def one_pass_fits(head: Head) -> bool:
    """Return whether the budget holds the fp32 dW (in addition to the gradient that is returned) and chunks of a useful
    length; hidden's gradient alone needs neither.
    """
    if not head.needs.whole_rows and head.stores_exp:
        return True
    rows = one_pass_rows(head)
    if rows < min(head.n, shortest_chunk(head.device)):
        return False
    if head.device.type == "cpu" or rows >= head.n:
        return True
    # In GEMMs: the fp32 dW that each chunk reads and writes, under its own GEMM or after it, against what two passes
    # recompute.
    moved = -(-head.n // rows) * _DWEIGHT_ROWS / 2 / head.n
    return 3 + moved <= 4 - cached_columns(head) / head.v


def one_pass_rows(head: Head) -> int:
    """Rows of one pass's chunks that the budget holds in addition to the accumulator of dW; 0 or less: none."""
    return _rows_within(head, head.options.budget - dweight_bytes(head))


# ---- plans of two heads ----------------------------------------------------------------------------------------------


def with_default_budget(pair: HeadPair, known: bool) -> HeadPair:
    """The pair with what 4 GEMMs hold in addition to tiles: for a sum with ``known`` weights the fp32 sums of dW, or
    the gradient in all logits where an fp32 dW is not less. Without, logits are computed twice. A row of two heads
    takes twice the bytes of one: on a CPU, where short chunks of sums cost time, so do its tiles.
    """
    if pair.device.type == "cpu":
        pair = _with_budget(pair, budget_bytes(None, pair.head.lm_head_weight_VD, sums=False))
    head, sums, stored = pair.head, _pair_accumulator(pair), _stored_bytes(pair)
    most = head.v * head.d * head.wide.itemsize if head.needs.lm_head_weight else 0
    less = _stores_logit_gradients(head) and stored <= (sums if known else most)
    if underflows(head.operand) or not (less or (known and sums)):
        return pair
    chunk = _pair_chunk_cost(pair, 0).of_tile(shortest_chunk(pair.device, gemms_saved=2), pair.v)
    if _pair_cost(pair, gradient=True).column:  # copies take a quarter
        chunk = 4 * chunk // 3 + 4
    tiles = pair.budget if less or pair.device.type != "cpu" else 2 * pair.budget
    return _with_budget(pair, max(tiles, chunk) + (stored if less else sums))


def _with_budget(pair: HeadPair, budget: int) -> HeadPair:
    return replace(pair, head=replace(pair.head, options=replace(pair.head.options, budget=budget)))


def way_of_gradients(pair: HeadPair, engine: str, known: bool) -> str:
    """Choose what the forward makes: "known", every gradient of a sum with known weights; "frozen", that in hidden
    alone; "stored", that in all logits; "recomputed", statistics alone.
    """
    head = pair.head
    if not any(head.needs):
        return "recomputed"
    one_pass = engine == "one_pass" or (engine == "auto" and not underflows(head.operand) and chunks_fit(pair))
    if one_pass and known:
        return "known"
    if one_pass and head.needs == HIDDEN_ALONE:
        return "frozen"
    return "stored" if stored_fits(pair) else "recomputed"


def chunks_fit(pair: HeadPair) -> bool:
    """Return whether the budget holds chunks of a useful length, and the fp32 dW where that is not returned itself.
    Otherwise two passes compute the logits of both heads again.
    """
    return _holds_pair_chunks(pair, pair.budget - _pair_accumulator(pair))


def stored_fits(pair: HeadPair) -> bool:
    """Return whether the budget holds the gradient in all logits and chunks of a useful length: then nothing is
    computed twice, whatever the upstream gradient is.
    """
    budget = pair.budget - _stored_bytes(pair)
    return _stores_logit_gradients(pair.head) and budget > 0 and _holds_pair_chunks(pair, budget)


def _stores_logit_gradients(head: Head) -> bool:
    """Return whether the operands' dtype holds gradients in logits: fp16 has too narrow a range; a bias of more digits
    needs those of the sums before they are rounded.
    """
    return head.operand != torch.float16 and not (head.needs.bias and head.bias_V.dtype != head.operand)


def divergence_plan(pair: HeadPair, whole_rows: bool) -> Plan:
    """Plan of ``divergence_pass``, over chunks of whole rows or over rows x slices."""
    if whole_rows:
        return _pair_chunks(pair, 0, gradient=False)
    return plan_tiles(pair.head, _pair_cost(pair, gradient=False))


def gradient_chunk_plan(pair: HeadPair) -> Plan:
    """Plan of ``gradient_chunk_pass``."""
    accumulator = _pair_accumulator(pair)
    return replace(_pair_chunks(pair, accumulator, gradient=True), accumulator=accumulator)


def stored_gradient_plan(pair: HeadPair) -> Plan:
    """Plan of ``stored_gradient_pass``."""
    return _pair_chunks(pair, _stored_bytes(pair), gradient=False)


def recomputed_plan(pair: HeadPair) -> Plan:
    """Plan of ``recomputed_gradients``."""
    cost, head = _pair_cost(pair, gradient=True), pair.head
    packs = head.kernels.CACHED_TILES and head.operand == torch.bfloat16
    rows = min(head.n, MAX_CPU_BACKWARD_ROWS) if packs else head.n
    return plan_slices(head, cost, rows)


def _pair_chunks(pair: HeadPair, taken: int, *, gradient: bool) -> Plan:
    """Chunks of whole rows of both heads, beside bytes that are taken."""
    budget, copies = pair.budget - taken, _pair_cost(pair, gradient=True).column
    return plan_token_chunks(pair.n, pair.v, budget, _pair_chunk_cost(pair, budget, gradient=gradient), copies, taken)


def _pair_cost(pair: HeadPair, *, gradient: bool) -> TileCost:
    """Bytes of a tile of both heads' logits; operands' copies are made for one head at a time."""
    head, copies = pair.head, (pair.head.gradient_copies if gradient else pair.head.copies, pair.ref.copies)
    copied = pair.kernels.COPIES_GRADIENT or head.needs.bias
    cast = head.operand.itemsize if gradient and copied and head.operand != head.tile else 0
    fixed = pair.kernels.temporary_bytes(pair.n, pair.v, pair.math)
    return TileCost(head.tile.itemsize + pair.ref.tile.itemsize + cast, max(copies), sum(copies), fixed)


def _pair_chunk_cost(pair: HeadPair, budget: int, *, gradient: bool = True) -> TileCost:
    """Bytes of whole rows: copies of the weights are made in slices, out of a quarter of the budget."""
    cost = _pair_cost(pair, gradient=gradient)
    if not cost.column:
        return replace(cost, fixed=cost.fixed + (pair.head.traits.rounding_bytes if gradient else 0))
    dhidden = pair.head.d * pair.math.itemsize  # summed up over those slices
    return TileCost(cost.element, 0, cost.row + dhidden, cost.fixed + budget // 4)


def _holds_pair_chunks(pair: HeadPair, budget: int) -> bool:
    rows = _pair_chunk_cost(pair, budget).rows_within(budget, pair.v)
    return rows >= min(pair.n, shortest_chunk(pair.device, gemms_saved=2))


def _stored_bytes(pair: HeadPair) -> int:
    """Bytes of the gradient in all logits, in the operands' dtype."""
    return pair.n * aligned(pair.v) * pair.head.operand.itemsize


def _pair_accumulator(pair: HeadPair) -> int:
    """``accumulator_bytes`` of the chunks of both heads."""
    rows = _pair_chunk_cost(pair, pair.budget).rows_within(pair.budget, pair.v)
    return accumulator_bytes(pair.head, rows)


# ---- tiles from bytes ------------------------------------------------------------------------------------------------


def _tile_budget(head: Head, rows: int, cost: TileCost, budget: int, cached: bool | None = None) -> int:
    """The budget of tiles that need not hold whole rows: where they should stay ``cached`` (None: as the kernels have
    it) no more than such a tile, or one of all rows and the fewest columns where that is larger.
    """
    if not (head.kernels.CACHED_TILES if cached is None else cached):
        return budget
    return min(budget, max(cost.of_tile(max(1, rows), min(head.v, _MIN_COLUMNS)), _CACHED_BYTES))


def shortest_chunk(device: torch.device, gemms_saved: int = 1) -> int:
    """Rows of a chunk from which on one pass is faster than two that run so many more GEMMs."""
    return _MIN_ROWS if device.type == "cpu" else _MIN_ACCELERATOR_ROWS // gemms_saved


def plan_forward(n: int, v: int, budget: int, cost: TileCost) -> Plan:
    """Rows by vocabulary slices, merged by running statistics: as square as the budget allows."""
    rows = max(1, min(n, MAX_FORWARD_ROWS))
    columns = cost.columns_within(budget, rows)
    if columns < min(v, _MIN_COLUMNS):
        columns = min(v, _MIN_COLUMNS)
        rows = min(n, _rows_or_refuse(budget, cost, columns, "the forward pass"))
    elif columns >= v:
        columns, rows = v, min(n, cost.rows_within(budget, v))
    else:
        columns = _slice_width(columns, v)
    return Plan(max(1, rows), columns, cost)


def plan_tiles(head: Head, cost: TileCost) -> Plan:
    """``plan_forward`` in plain torch or of two heads: tiles stay cached on a CPU."""
    rows, on_cpu = min(head.n, MAX_FORWARD_ROWS), head.device.type == "cpu"
    return plan_forward(head.n, head.v, _tile_budget(head, rows, cost, head.options.budget, on_cpu), cost)


def plan_token_chunks(n: int, v: int, budget: int, cost: TileCost, copies: int, taken: int) -> Plan:
    """Chunks of whole rows, for gradients made in the forward pass. copies: bytes of a column that GEMMs copy, in a
    quarter of the budget; ``taken`` bytes are out of it already.
    """
    rows = _rows_or_refuse(budget, cost, v, "one pass over token chunks", taken)
    columns = min(v, max(1, budget // 4 // copies)) if copies else v
    return Plan(min(max(n, 1), rows), columns, cost.of_rows(v), stored=v, taken=taken)


def plan_vocabulary_slices(n: int, v: int, budget: int, cost: TileCost) -> Plan:
    """Slices that see all rows, so each slice of dW is written once; rows are split only where a slice would get too
    narrow.
    """
    columns = cost.columns_within(budget, max(n, 1))
    if columns >= min(v, _MIN_COLUMNS):
        return Plan(max(n, 1), _slice_width(columns, v), cost)
    columns = min(v, _MIN_COLUMNS)
    return Plan(min(n, _rows_or_refuse(budget, cost, columns, "the backward pass")), columns, cost)


def plan_slices(head: Head, cost: TileCost, rows: int) -> Plan:
    """Slices of ``rows`` rows at most, with the sums of dW where a slice has several tiles."""
    given = head.options.budget, head.device.type == "cpu"
    plan = plan_vocabulary_slices(rows, head.v, _tile_budget(head, rows, cost, *given), cost)
    if plan.rows < head.n and head.needs.lm_head_weight:
        cost = replace(cost, column=cost.column + head.d * head.wide.itemsize)
        plan = plan_vocabulary_slices(rows, head.v, _tile_budget(head, rows, cost, *given), cost)
    return plan


def _rows_or_refuse(budget: int, cost: TileCost, columns: int, purpose: str, taken: int = 0) -> int:
    rows = cost.rows_within(budget, columns)
    if rows < 1:
        needed = taken + cost.of_tile(1, columns)
        raise ValueError(
            f"workspace_mb={(budget + taken) / MIB:.3g} is too small for {purpose}: a row of {columns} columns needs "
            f"about {needed / MIB:.3g} MiB; give workspace_mb={-(-2 * needed // MIB)} or more"
        )
    return rows


def _slice_width(columns: int, v: int) -> int:
    """Slices begin at multiples of 64 columns, for aligned operands."""
    return v if columns >= v else max(columns - columns % 64, min(columns, 64))
