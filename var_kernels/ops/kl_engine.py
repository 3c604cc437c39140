"""The engines of ``linear_token_kl``: two heads over one vocabulary, tile by tile, by the pair kernels.

divergence_pass          2 GEMMs   statistics only: rows x vocabulary slices of both heads, merged; whole rows for "jsd"
gradient_chunk_pass      4 GEMMs   a known upstream gradient, or hidden's alone: chunks of whole rows
stored_gradient_pass     2 GEMMs   the forward for any upstream gradient where the budget holds the gradient in all
                                   logits, and ...
stored_gradients         2 GEMMs   ... its backward: products of it
recomputed_gradients     4 GEMMs   backward for any upstream gradient: both heads' logits again, slice by slice
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from var_kernels.kernels.pairs import PairOptions, divergence_of, empty_state
from var_kernels.ops.backend import pair_kernels
from var_kernels.ops.engines import (
    Gradients,
    compute_logits,
    gradients_by_slices,
    new_cached,
    new_gradients,
    new_tile,
    rounded,
    row_products,
    spans,
    token_products,
)
from var_kernels.ops.head import Head, Tensors
from var_kernels.ops.plan import (
    MAX_CPU_BACKWARD_ROWS,
    MAX_FORWARD_ROWS,
    TileCost,
    accumulator_bytes,
    cpu_tile_budget,
    operand_copies,
    plan_forward,
    plan_slices,
    plan_token_chunks,
    shortest_chunk,
)


@dataclass
class HeadPair:
    """The policy's head p and the reference's q, over the same rows and vocabulary, and what is computed of them."""

    policy: Head
    ref: Head
    kind: str
    beta: float

    def __post_init__(self):
        self.n, self.v, self.budget = self.policy.n, self.policy.v, self.policy.options.budget
        wide = torch.promote_types(self.policy.tile, self.ref.tile)
        self.math = torch.promote_types(wide, torch.float32)
        self.device = self.policy.device
        self.options = PairOptions(self.kind, self.beta, self.policy.options.transform, self.ref.options.transform)
        backends = {self.policy.options.backend, self.ref.options.backend}
        self.backend = "torch" if "torch" in backends else self.policy.options.backend
        self.kernels = pair_kernels(self.backend)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.math, device=self.device)

    def empty_state(self) -> Tensor:
        return empty_state(self.n, self.math, self.device)

    def divergence(self, state_6N: Tensor) -> Tensor:
        return divergence_of(state_6N, self.options).to(self.math)

    def rows(
        self,
        tiles: tuple[Tensor, Tensor],
        rows: slice,
        v_start: int,
        state_6N: Tensor,
        upstream_N: Tensor | None = None,
        out_nv: Tensor | None = None,
        **stages: bool,
    ) -> Tensor | None:
        """The pair kernels on one tile of each model; a gradient is in the operands' dtype, or in the tile's beside a
        bias that learns.
        """
        z_nv, w_nv = tiles
        v_stop = v_start + z_nv.shape[1]
        biases = (head.bias_slice(v_start, v_stop) for head in (self.policy, self.ref))
        # The columns' entries cancel, so they are summed before they are rounded.
        dtype = self.policy.tile if self.policy.needs.bias else self.policy.operand
        return self.kernels.pair_rows(
            z_nv,
            w_nv,
            state_6N[:, rows],
            self.options,
            *biases,
            **stages,
            upstream_n=None if upstream_N is None else upstream_N[rows],
            out_dtype=dtype,
            out_nv=out_nv,
        )

    def cost(self, *, gradient: bool) -> TileCost:
        """Bytes of a tile of both heads' logits; operands' copies are made for one head at a time."""
        copies = operand_copies(self.policy, gradient), operand_copies(self.ref, False)
        raw = self.policy.tile.itemsize + self.ref.tile.itemsize
        narrows = self.policy.operand != self.policy.tile
        copied = self.kernels.COPIES_GRADIENT or (self.policy.needs.bias and narrows)
        cast = self.policy.operand.itemsize if gradient and narrows and copied else 0
        fixed = self.kernels.temporary_bytes(self.n, self.v, self.math)
        return TileCost(raw + cast, max(copies), sum(copies), fixed)

    def chunk_cost(self, budget: int, *, gradient: bool = True) -> TileCost:
        """Cost of whole rows: copies of the weights are made in slices, out of a quarter of the budget."""
        cost = self.cost(gradient=gradient)
        if not cost.column:
            return replace(cost, fixed=cost.fixed + (self.policy.traits.rounding_bytes if gradient else 0))
        dhidden = self.policy.d * self.math.itemsize  # summed up over those slices
        return TileCost(cost.element, 0, cost.row + dhidden, cost.fixed + budget // 4)

    def holds_chunks(self, budget: int) -> bool:
        rows = self.chunk_cost(budget).rows_within(budget, self.v)
        return rows >= min(self.n, shortest_chunk(self.device, gemms_saved=2))

    def weight_slice(self, budget: int) -> int:
        column = self.cost(gradient=True).column
        return min(self.v, max(1, budget // 4 // column)) if column else self.v

    @property
    def stored_bytes(self) -> int:
        """Bytes of the gradient in all logits, in the operands' dtype."""
        return self.n * (self.v + 31) // 32 * 32 * self.policy.operand.itemsize

    @property
    def accumulator(self) -> int:
        """Bytes of the sums of dW over chunks, see ``accumulator_bytes``."""
        return accumulator_bytes(self.policy, self.chunk_cost(self.budget).rows_within(self.budget, self.v))

    def storages(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        return new_tile(self.policy, rows, columns), new_tile(self.ref, rows, columns)

    def logits(self, storages, rows: slice, columns: slice, step: int) -> tuple[Tensor, Tensor]:
        """Raw logits of the policy and of the reference, each in its tile's dtype, from GEMMs of ``step`` columns."""
        (own, other), whole = storages, (rows, columns, step)
        return compute_logits(self.policy, own, *whole), compute_logits(self.ref, other, *whole)


def divergence_pass(pair: HeadPair, merge: Callable[[Tensor, str], None] | None = None) -> Tensor:
    """The state (6, N) of every row. Peak extra memory: the budget. merge(state_6N, stage): brings in what other ranks
    have of each stage; "jsd" computes its logits for each of its two then.
    """
    state_6N, whole = pair.empty_state(), pair.options.needs_whole_rows
    stages = ("stats", "mixture") if whole else ("stats",)
    if whole and merge is None:
        plan = plan_token_chunks(pair.n, pair.v, pair.budget, pair.chunk_cost(pair.budget, gradient=False), 0)
        step, passes = pair.weight_slice(pair.budget), (stages,)
    else:
        cost = pair.cost(gradient=False)
        plan = plan_forward(pair.n, pair.v, cpu_tile_budget(pair.policy, min(pair.n, MAX_FORWARD_ROWS), cost), cost)
        step, passes = plan.columns, tuple((stage,) for stage in stages)
    storages = pair.storages(plan.rows, plan.columns)
    for together in passes:
        for start, stop in spans(0, pair.n, plan.rows):
            rows = slice(start, stop)
            for v_start, v_stop in spans(0, pair.v, plan.columns):
                tiles = pair.logits(storages, rows, slice(v_start, v_stop), step)
                pair.rows(tiles, rows, v_start, state_6N, **dict.fromkeys(together, True))
        if merge is not None:
            merge(state_6N, *together)
    return state_6N


def chunks_fit(pair: HeadPair) -> bool:
    """Return whether the budget holds chunks of a useful length, and the fp32 dW where that is not returned itself.
    Otherwise two passes compute the logits of both heads again.
    """
    return pair.holds_chunks(pair.budget - pair.accumulator)


def gradient_chunk_pass(pair: HeadPair, upstream_N: Tensor) -> tuple[Tensor, Tensors]:
    """Divergences (N,) and the gradients of sum_n upstream_n divergence_n, in one pass."""
    head, accumulator = pair.policy, pair.accumulator
    budget = pair.budget - accumulator
    plan = plan_token_chunks(pair.n, pair.v, budget, pair.chunk_cost(budget), accumulator)
    step = pair.weight_slice(budget)
    storages = pair.storages(plan.rows, pair.v)
    dweight = head.wide if plan.rows < head.n else head.operand
    state_6N, gradients = pair.empty_state(), new_gradients(head, head.operand, dweight)
    dweight_VD, dbias_V, dright_VR = gradients.of_columns(slice(0, pair.v))
    for start, stop in spans(0, pair.n, plan.rows):
        rows = slice(start, stop)
        tiles = pair.logits(storages, rows, slice(0, pair.v), step)
        grad_nv = rounded(head, _whole_rows(pair, tiles, rows, state_6N, upstream_N), dbias_V)
        (hidden_nd, left_nr), (dhidden_nd, dleft_nr) = head.of_rows(rows), gradients.of_rows(rows)
        if dhidden_nd is not None:
            _product_in_slices(head, dhidden_nd, grad_nv, step)
        row_products(head, grad_nv, 0, None, dleft_nr, step, add=True)
        token_products(head, grad_nv, hidden_nd, dweight_VD, left_nr, dright_VR, step, add=start > 0)
        del grad_nv, tiles  # a copy in 16 bit would live on beside the next tile
    return pair.divergence(state_6N), gradients.like(head.tensors)


def _whole_rows(pair: HeadPair, tiles, rows, state_6N, upstream_N, out_nv=None) -> Tensor:
    stages = {"stats": True, "mixture": pair.options.needs_whole_rows}
    return pair.rows(tiles, rows, 0, state_6N, upstream_N, out_nv, **stages)


def _product_in_slices(head: Head, out_nd: Tensor, grad_nv: Tensor, step: int) -> None:
    """out = grad W by ``step`` rows of W at a time: a 16-bit GEMM on a CPU packs the whole operand it is given."""
    weight_VD = head.lm_head_weight_VD
    if step >= head.v:
        head.gemm.product_into(out_nd, grad_nv, weight_VD)
        return
    total_nd = torch.zeros(out_nd.shape, dtype=torch.promote_types(out_nd.dtype, torch.float32), device=out_nd.device)
    for start, stop in spans(0, head.v, step):
        head.gemm.add_product(total_nd, grad_nv[:, start:stop], weight_VD[start:stop])
    out_nd.copy_(total_nd)


def stored_fits(pair: HeadPair) -> bool:
    """Return whether the budget holds the gradient in all logits and chunks of a useful length: then nothing is
    computed twice, whatever the upstream gradient is. fp16 holds too narrow a range of such gradients; a bias of more
    digits needs those of the sums before they are rounded.
    """
    head, budget = pair.policy, pair.budget - pair.stored_bytes
    digits = head.operand == torch.float16 or (head.needs.bias and head.bias_V.dtype != head.operand)
    return not digits and budget > 0 and pair.holds_chunks(budget)


def stored_gradient_pass(pair: HeadPair) -> tuple[Tensor, Tensor]:
    """Divergences (N,) and d divergence_n / d logits_nv (N, V), in the operands' dtype."""
    budget = pair.budget - pair.stored_bytes
    plan = plan_token_chunks(pair.n, pair.v, budget, pair.chunk_cost(budget, gradient=False), pair.stored_bytes)
    step = pair.weight_slice(budget)
    storages, state_6N, ones_N = pair.storages(plan.rows, pair.v), pair.empty_state(), pair.zeros(pair.n).fill_(1.0)
    stored_NV = new_cached(pair.policy, pair.v, pair.policy.operand)
    for start, stop in spans(0, pair.n, plan.rows):
        rows = slice(start, stop)
        tiles = pair.logits(storages, rows, slice(0, pair.v), step)
        _whole_rows(pair, tiles, rows, state_6N, ones_N, out_nv=stored_NV[rows, : pair.v])
    return pair.divergence(state_6N), stored_NV


def stored_gradients(pair: HeadPair, stored_NV: Tensor, upstream_N: Tensor) -> Gradients:
    """Gradients of sum_n upstream_n divergence_n from what ``stored_gradient_pass`` gave."""
    head, grad_NV = pair.policy, stored_NV[:, : pair.v]
    step = pair.weight_slice(pair.budget - pair.stored_bytes)
    wide, upstream_N1 = head.wide, upstream_N.unsqueeze(1)
    gradients = new_gradients(head, wide, head.operand)
    if head.needs.hidden:
        _product_in_slices(head, gradients.dhidden_ND, grad_NV, step)
        gradients.dhidden_ND.mul_(upstream_N1)
    if head.needs.left:
        row_products(head, grad_NV, 0, None, gradients.dleft_NR, step, add=True)
        gradients.dleft_NR.mul_(upstream_N1)
    scaled = [None if t is None else (t * upstream_N1).to(head.operand) for t in head.of_rows(slice(0, head.n))]
    dweight_VD, dbias_V, dright_VR = gradients.of_columns(slice(0, pair.v))
    token_products(head, grad_NV, scaled[0], dweight_VD, scaled[1], dright_VR, step, add=False)
    if dbias_V is not None:
        # In two parts, so that the upstream gradient keeps its digits in 16 bit.
        parts_N2 = torch.stack((upstream_N, upstream_N - upstream_N.to(head.operand)), 1).to(head.operand)
        sums_V2 = torch.zeros(pair.v, 2, dtype=wide, device=pair.device)
        head.gemm.add_product(sums_V2, grad_NV.t(), parts_N2)
        dbias_V.copy_(sums_V2.sum(1))
    return gradients


def recomputed_gradients(pair: HeadPair, state_6N: Tensor, upstream_N: Tensor) -> Gradients:
    """Gradients of sum_n upstream_n divergence_n from what ``divergence_pass`` gave."""
    cost, head = pair.cost(gradient=True), pair.policy
    packs = head.kernels.CACHED_TILES and head.operand == torch.bfloat16
    rows = min(head.n, MAX_CPU_BACKWARD_ROWS) if packs else head.n
    plan = plan_slices(head, cpu_tile_budget(head, rows, cost), cost, rows)
    storages = pair.storages(plan.rows, plan.columns)

    def tile_gradient(rows: slice, columns: slice) -> Tensor:
        tiles = pair.logits(storages, rows, columns, plan.columns)
        return pair.rows(tiles, rows, columns.start, state_6N, upstream_N)

    return gradients_by_slices(head, plan, tile_gradient)
