"""The engines: which tiles are computed in which order. No autograd here; every tensor is flat and on one device.

forward_pass      1 GEMM   statistics only: rows x vocabulary slices, merged
token_chunk_pass  3 GEMMs  whole rows: statistics, then the gradient in the same tile (known per-token gradient;
frozen head)
vocabulary_pass   3 GEMMs  backward for any upstream gradient: logits recomputed slice by slice, dW written once
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats
from var_kernels.ops.backend import row_kernels
from var_kernels.ops.gemm import add_product, logits_into, partial_bytes, product_into, upcasts
from var_kernels.ops.workspace import (
    MAX_CPU_BACKWARD_ROWS,
    MAX_FORWARD_ROWS,
    TileCost,
    TilePlan,
    holds_token_chunks,
    plan_forward,
    plan_token_chunks,
    plan_vocabulary_slices,
    within_cache,
)

_ROW_ELEMENTS = 32


@dataclass(frozen=True)
class HeadOptions:
    """Everything about the head and the run that is no tensor: budget in bytes; lse, entropy, argmax: outputs that
    were asked for.
    """

    transform: LogitTransform
    label_smoothing: float
    precision: str
    budget: int
    backend: str
    lse: bool = False
    entropy: bool = False
    argmax: bool = False


def tile_dtype(operand: torch.dtype, precision: str) -> torch.dtype:
    """fp32 logits, fp64 ones for fp64 operands; "fast" keeps the operands' dtype."""
    return operand if operand == torch.float64 or precision == "fast" else torch.float32


def _aligned(columns: int) -> int:
    """A row's stride: GEMMs and vector loads want rows that start at multiples of 64 bytes, and read up to
    32 elements at once (see ``_zero_row_ends``)."""
    return -(-columns // _ROW_ELEMENTS) * _ROW_ELEMENTS


def _zero_row_ends(values_nv: Tensor) -> None:
    """Zeros in the columns behind a row's last, up to a multiple of 32.

    On CPUs with AMX the bf16 GEMM of torch 2.13 reads them and multiplies by 0, which leaves NaN where they hold NaN.
    """
    n, columns = values_nv.shape
    end = min(-(-columns // 32) * 32, values_nv.stride(0))
    if columns < end:
        offset = values_nv.storage_offset() + columns
        values_nv.as_strided((n, end - columns), values_nv.stride(), offset).zero_()


@dataclass(frozen=True)
class TileStorage:
    """Memory that tiles of several shapes use in turn."""

    elements: Tensor

    def view(self, rows: int, columns: int) -> Tensor:
        return self.elements[: rows * _aligned(columns)].view(rows, _aligned(columns))[:, :columns]


@dataclass
class Head:
    """One call's tensors: hidden_ND, lm_head_weight_VD, bias_V or None, labels_NK (ids valid everywhere), and the
    options.
    """

    hidden_ND: Tensor
    lm_head_weight_VD: Tensor
    bias_V: Tensor | None
    labels_NK: Tensor
    options: HeadOptions

    def __post_init__(self):
        self.n, self.d = self.hidden_ND.shape
        self.v = self.lm_head_weight_VD.shape[0]
        self.operand = self.hidden_ND.dtype
        self.tile = tile_dtype(self.operand, self.options.precision)
        self.kernels = row_kernels(self.options.backend)
        self.upcast = upcasts(self.hidden_ND, self.lm_head_weight_VD, self.tile, self.options.backend)

    def new_stats(self) -> RowStats:
        options = self.options
        return RowStats.empty(
            self.n,
            self.labels_NK.shape[1],
            self.hidden_ND,
            entropy=options.entropy,
            mean=options.label_smoothing > 0,
            argmax=options.argmax,
        )

    def tile_cost(self, *, gradient: bool) -> TileCost:
        """Bytes of a tile of rows by vocabulary columns, with what the row kernels and the GEMMs need beside it."""
        copies = self._operand_copies(gradient)
        return TileCost(
            self._element(gradient), copies, copies, self.kernels.temporary_bytes(self.n, self.v, self.tile)
        )

    def tile_budget(self, rows: int, cost: TileCost) -> int:
        """The budget of tiles that need not hold whole rows; the C++ kernels run faster on those that stay cached."""
        budget = self.options.budget
        return within_cache(rows, self.v, budget, cost) if self.options.backend == "native" else budget

    def chunk_cost(self, budget: int) -> TileCost:
        """Bytes of a tile of whole rows; copies of the weight are made in slices, out of a quarter of the budget."""
        copies = self._operand_copies(gradient=True)
        fixed = self.kernels.temporary_bytes(self.n, self.v, self.tile) + (budget // 4 if copies else 0)
        return TileCost(self._element(gradient=True), 0, copies, fixed)

    def weight_slice(self, budget: int) -> int:
        """Vocabulary columns whose operand copies fit the quarter that ``chunk_cost`` sets aside; all of them where
        none is made.
        """
        copies = self._operand_copies(gradient=True)
        return min(self.v, max(1, budget // 4 // copies)) if copies else self.v

    def _element(self, gradient: bool) -> int:
        copies = self.kernels.COPIES_GRADIENT or self.bias_V is not None
        cast = self.operand.itemsize if gradient and copies and self.operand != self.tile else 0
        return self.tile.itemsize + cast

    def _operand_copies(self, gradient: bool) -> int:
        """Bytes a row or column of upcast operand and of a partial result in 16 bit (see ops/gemm.py)."""
        upcast = self.tile.itemsize if self.upcast else 0
        partial = 0
        if gradient:
            partial = partial_bytes(self.operand, self.hidden_ND.device, self.options.backend)
        return self.d * (upcast + partial)

    def new_tile(self, rows: int, columns: int) -> "TileStorage":
        return TileStorage(torch.empty(rows * _aligned(columns), dtype=self.tile, device=self.hidden_ND.device))

    def upcast_rows(self, start: int, stop: int) -> Tensor:
        rows_nd = self.hidden_ND[start:stop]
        return rows_nd.to(self.tile) if self.upcast else rows_nd

    def bias_slice(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias_V is None else self.bias_V[start:stop]

    def row_stats(self, logits_nv: Tensor, rows: slice, stats: RowStats, v_start: int) -> None:
        bias_v = self.bias_slice(v_start, v_start + logits_nv.shape[1])
        self.kernels.row_stats(logits_nv, self.labels_NK[rows], stats, v_start, bias_v, self.options.transform)

    def row_grad(
        self,
        logits_nv: Tensor,
        rows: slice,
        lse_n: Tensor,
        coefficients: RowCoefficients,
        v_start: int,
        dbias_v: Tensor | None,
    ) -> Tensor:
        """The gradient in the raw logits, in the operands' dtype, its column sums added to dbias_v; in place."""
        bias_v = self.bias_slice(v_start, v_start + logits_nv.shape[1])
        labels_nk, transform = self.labels_NK[rows], self.options.transform
        # The columns' entries cancel, so they are summed before they are rounded.
        dtype = self.operand if dbias_v is None else self.tile
        dlogits_nv = self.kernels.row_grad(logits_nv, labels_nk, lse_n, coefficients, v_start, bias_v, transform, dtype)
        if dbias_v is not None:
            dbias_v += dlogits_nv.sum(0, dtype=dbias_v.dtype)
        dlogits_nv = dlogits_nv.to(self.operand)
        if dlogits_nv.device.type == "cpu" and self.operand == torch.bfloat16:
            _zero_row_ends(dlogits_nv)
        return dlogits_nv

    def coefficients(self, dlogp_NK, dlse_N=None, dentropy_N=None, entropy_N=None) -> RowCoefficients:
        return RowCoefficients.from_upstream(
            dlogp_NK, self.options.label_smoothing, self.v, dlse_N, dentropy_N, entropy_N
        )


@dataclass(frozen=True)
class Needs:
    """Which gradients somebody asked for."""

    hidden: bool
    lm_head_weight: bool
    bias: bool

    def __bool__(self):
        return self.hidden or self.lm_head_weight or self.bias


@dataclass
class Gradients:
    """dhidden_ND and dweight_VD accumulate in the tile's precision (fp32 at least), dbias_V in fp32; None where not
    needed.
    """

    dhidden_ND: Tensor | None = None
    dweight_VD: Tensor | None = None
    dbias_V: Tensor | None = None

    def cast(self, dtype: torch.dtype) -> "Gradients":
        def to(t):
            return None if t is None else t.to(dtype)

        return Gradients(to(self.dhidden_ND), to(self.dweight_VD), to(self.dbias_V))


def _accumulation_dtype(operand: torch.dtype) -> torch.dtype:
    return torch.float64 if operand == torch.float64 else torch.float32


def _spans(total: int, step: int):
    for start in range(0, total, step):
        yield start, min(start + step, total)


def forward_plan(head: Head) -> TilePlan:
    cost = head.tile_cost(gradient=False)
    return plan_forward(head.n, head.v, head.tile_budget(min(head.n, MAX_FORWARD_ROWS), cost), cost)


def chunk_plan(head: Head, needs: Needs) -> TilePlan:
    accumulator = dweight_bytes(head, needs)
    budget = head.options.budget - accumulator
    return plan_token_chunks(head.n, head.v, budget, head.chunk_cost(budget), accumulator)


def slice_plan(head: Head) -> TilePlan:
    cost, rows = head.tile_cost(gradient=True), head.n
    if head.options.backend == "native" and head.operand == torch.bfloat16 and rows > MAX_CPU_BACKWARD_ROWS:
        # With the fp32 sums of a slice of dW.
        cost, rows = replace(cost, column=cost.column + 4 * head.d), MAX_CPU_BACKWARD_ROWS
    return plan_vocabulary_slices(rows, head.v, head.tile_budget(rows, cost), cost)


def keeps_logits(head: Head) -> bool:
    """Whether the budget holds all logits, so that the backward need not recompute them."""
    return head.n > 0 and head.tile_cost(gradient=True).columns_within(head.options.budget, head.n) >= head.v


def forward_with_logits(head: Head) -> tuple[RowStats, Tensor]:
    """Statistics of every row and the whole tile of raw logits, for ``vocabulary_pass``."""
    stats = head.new_stats()
    logits_NV = head.new_tile(head.n, head.v).view(head.n, head.v)
    logits_into(logits_NV, head.upcast_rows(0, head.n), head.lm_head_weight_VD, head.options.backend)
    head.row_stats(logits_NV, slice(0, head.n), stats, 0)
    return stats, logits_NV


def forward_pass(head: Head) -> RowStats:
    """Statistics of every row; peak extra memory: the budget. Without one, logits stay in registers."""
    stats = head.new_stats()
    if head.options.budget == 0:
        _fused_forward(head, stats)
        return stats
    plan = forward_plan(head)
    storage = head.new_tile(plan.rows, plan.columns)
    for start, stop in _spans(head.n, plan.rows):
        hidden_nd = head.upcast_rows(start, stop)
        for v_start, v_stop in _spans(head.v, plan.columns):
            logits_nv = storage.view(stop - start, v_stop - v_start)
            weight_vd = head.lm_head_weight_VD[v_start:v_stop]
            logits_into(logits_nv, hidden_nd, weight_vd, head.options.backend)
            head.row_stats(logits_nv, slice(start, stop), stats.rows(start, stop), v_start)
    return stats


def _fused_forward(head: Head, stats: RowStats) -> None:
    """GEMM and statistics in one kernel, which one backend has."""
    if head.options.backend != "triton":
        raise ValueError(
            f"workspace_mb must be positive on backend {head.options.backend!r}, got 0; only 'triton' (a GPU, operands "
            "of 16 or 32 bit) keeps logits in registers; pass None for the default"
        )
    from var_kernels.kernels.forward_triton import fused_forward

    operands = (head.hidden_ND, head.lm_head_weight_VD, head.bias_V, head.labels_NK)
    fused_forward(*operands, stats, head.options.transform)


def one_pass_fits(head: Head, needs: Needs) -> bool:
    """Whether the budget holds the fp32 dW (beyond the gradient that is returned anyway) and chunks of a useful
    length.
    """
    budget = head.options.budget - dweight_bytes(head, needs)
    return holds_token_chunks(head.n, head.v, budget, head.chunk_cost(budget))


def _in_one_chunk(head: Head) -> bool:
    """Whether the budget holds all rows at once: dW is then one product and needs no accumulator."""
    return head.chunk_cost(head.options.budget).rows_within(head.options.budget, head.v) >= head.n > 0


def dweight_bytes(head: Head, needs: Needs) -> int:
    """Bytes of the accumulator of dW, where it is not itself the gradient that is returned."""
    accumulation = _accumulation_dtype(head.operand)
    if not needs.lm_head_weight or accumulation == head.operand or _in_one_chunk(head):
        return 0
    return head.v * head.d * accumulation.itemsize


def token_chunk_pass(
    head: Head, needs: Needs, coefficients_of: Callable[[slice, RowStats], RowCoefficients]
) -> tuple[RowStats, Gradients]:
    """Statistics and gradients in one pass; ``coefficients_of(rows, their finished statistics)`` gives the rows'
    gradient.
    """
    stats = head.new_stats()
    gradients, backend = Gradients(), head.options.backend
    plan = chunk_plan(head, needs)
    slice_width = head.weight_slice(head.options.budget - dweight_bytes(head, needs))
    storage = head.new_tile(plan.rows, head.v)
    accumulation = _accumulation_dtype(head.operand)
    if needs.hidden:
        gradients.dhidden_ND = torch.empty_like(head.hidden_ND, memory_format=torch.contiguous_format)
    if needs.lm_head_weight:
        dtype = accumulation if plan.rows < head.n else head.operand
        create = torch.empty if head.n else torch.zeros
        gradients.dweight_VD = create(head.lm_head_weight_VD.shape, dtype=dtype, device=head.hidden_ND.device)
    if needs.bias:
        gradients.dbias_V = torch.zeros(head.v, dtype=accumulation, device=head.hidden_ND.device)

    for start, stop in _spans(head.n, plan.rows):
        rows = slice(start, stop)
        logits_nv = storage.view(stop - start, head.v)
        hidden_nd = head.upcast_rows(start, stop)
        for v_start, v_stop in _spans(head.v, slice_width):
            weight_vd = head.lm_head_weight_VD[v_start:v_stop]
            logits_into(logits_nv[:, v_start:v_stop], hidden_nd, weight_vd, backend)
        chunk_stats = stats.rows(start, stop)
        head.row_stats(logits_nv, rows, chunk_stats, 0)
        coefficients = coefficients_of(rows, chunk_stats)
        dlogits_nv = head.row_grad(logits_nv, rows, chunk_stats.lse_N, coefficients, 0, gradients.dbias_V)
        if needs.hidden:
            product_into(gradients.dhidden_ND[rows], dlogits_nv, head.lm_head_weight_VD, backend)
        if needs.lm_head_weight:
            for v_start, v_stop in _spans(head.v, slice_width):
                multiply = add_product if start else product_into
                dlogits_vn = dlogits_nv[:, v_start:v_stop].t()
                multiply(gradients.dweight_VD[v_start:v_stop], dlogits_vn, head.hidden_ND[rows], backend)
        del dlogits_nv  # a copy in 16 bit would live on beside the next chunk's logits
    return stats, gradients


def vocabulary_pass(
    head: Head, needs: Needs, lse_N: Tensor, coefficients: RowCoefficients, logits_NV: Tensor | None = None
) -> Gradients:
    """Gradients for any per-row coefficients; logits are recomputed once, slice by slice, or taken and overwritten."""
    accumulation, backend = _accumulation_dtype(head.operand), head.options.backend
    if logits_NV is None:
        plan = slice_plan(head)
        storage = head.new_tile(plan.rows, plan.columns)
    else:
        plan = TilePlan(max(head.n, 1), head.v)
    gradients = Gradients()
    if needs.hidden:
        gradients.dhidden_ND = torch.zeros(head.hidden_ND.shape, dtype=accumulation, device=head.hidden_ND.device)
    if needs.lm_head_weight:
        gradients.dweight_VD = torch.empty_like(head.lm_head_weight_VD, memory_format=torch.contiguous_format)
    if needs.bias:
        gradients.dbias_V = torch.zeros(head.v, dtype=accumulation, device=head.hidden_ND.device)

    row_spans = list(_spans(head.n, plan.rows))
    for v_start, v_stop in _spans(head.v, plan.columns):
        weight_vd = head.lm_head_weight_VD[v_start:v_stop]
        dbias_v = gradients.dbias_V[v_start:v_stop] if needs.bias else None
        dweight_vd = None
        if needs.lm_head_weight:
            dweight_vd = gradients.dweight_VD[v_start:v_stop]
            if len(row_spans) != 1:
                create = torch.empty if head.n else torch.zeros
                dweight_vd = create(weight_vd.shape, dtype=accumulation, device=head.hidden_ND.device)
        for start, stop in row_spans:
            rows = slice(start, stop)
            logits_nv = logits_NV
            if logits_NV is None:
                logits_nv = storage.view(stop - start, v_stop - v_start)
                logits_into(logits_nv, head.upcast_rows(start, stop), weight_vd, backend)
            chunk = coefficients.rows(start, stop)
            dlogits_nv = head.row_grad(logits_nv, rows, lse_N[rows], chunk, v_start, dbias_v)
            if needs.hidden:
                add_product(gradients.dhidden_ND[rows], dlogits_nv, weight_vd, backend)
            if needs.lm_head_weight:
                multiply = add_product if start else product_into
                multiply(dweight_vd, dlogits_nv.t(), head.hidden_ND[rows], backend)
            del dlogits_nv
        if needs.lm_head_weight and len(row_spans) != 1:
            gradients.dweight_VD[v_start:v_stop] = dweight_vd
    return gradients
