"""The engines of ``linear_token_kl``: two heads over one vocabulary, tile by tile. Plain torch, on a CPU and on CUDA.

kl_forward_pass      2 GEMMs   statistics only: rows x vocabulary slices of both heads, merged
kl_chunk_pass        4 GEMMs   whole rows: KL, then its gradient in the same tiles
kl_vocabulary_pass   4 GEMMs   backward for any upstream gradient: both heads' logits recomputed slice by slice
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from var_kernels.ops.engines import fill_logits, gradients_by_slices, new_gradients, row_products, token_products
from var_kernels.ops.gemm import add_product, product_into
from var_kernels.ops.head import Gradients, Head, TileStorage, accumulation_dtype, spans
from var_kernels.ops.plan import (
    MAX_FORWARD_ROWS,
    Plan,
    TileCost,
    dweight_bytes,
    holds_token_chunks,
    operand_copies,
    plan_forward,
    plan_token_chunks,
    plan_vocabulary_slices,
    shortest_chunk,
    within_cache,
)

# exp() of it is 0 and 0 times it is 0, which -inf does not give.
_LOWEST = -1e30


@dataclass
class HeadPair:
    """The policy's head p and the reference's q, over the same rows and vocabulary. reverse: KL(p||q), not KL(q||p)."""

    policy: Head
    ref: Head
    reverse: bool

    def __post_init__(self):
        self.n, self.v, self.budget = self.policy.n, self.policy.v, self.policy.options.budget
        wide = torch.promote_types(self.policy.tile, self.ref.tile)
        self.math = torch.promote_types(wide, torch.float32)
        self.device = self.policy.hidden_ND.device

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.math, device=self.device)

    def element_bytes(self) -> int:
        """Two tiles of logits and a temporary in the arithmetic's dtype, a mask; raw tiles where they are narrower; the
        softcap's slope. A 16-bit copy of the gradient takes the temporary's place.
        """
        raw = sum(head.tile.itemsize for head in (self.policy, self.ref) if head.tile != self.math)
        temporaries = 2 if self.policy.options.transform.softcap is not None else 1
        return (2 + temporaries) * self.math.itemsize + 1 + raw

    def _copies(self, gradient: bool) -> tuple[int, int]:
        """Bytes that GEMMs copy of a row or column of each head: those of torch, which pack 16-bit operands, whichever
        backend runs.
        """
        return operand_copies(self.policy, gradient, "torch"), operand_copies(self.ref, False)

    def column_bytes(self, gradient: bool) -> int:
        """One head at a time."""
        return max(self._copies(gradient))

    def cost(self, *, gradient: bool) -> TileCost:
        return TileCost(self.element_bytes(), self.column_bytes(gradient), sum(self._copies(gradient)))

    def chunk_cost(self, budget: int) -> TileCost:
        """Of whole rows: copies of the weights are made in slices, out of a quarter of the budget."""
        cost = self.cost(gradient=True)
        if not cost.column:
            return cost
        dhidden = self.policy.d * self.math.itemsize  # summed up over those slices
        return TileCost(cost.element, 0, cost.row + dhidden, budget // 4)

    def weight_slice(self, budget: int) -> int:
        column = self.column_bytes(gradient=True)
        return min(self.v, max(1, budget // 4 // column)) if column else self.v

    def tile_budget(self, rows: int, cost: TileCost) -> int:
        return within_cache(rows, self.v, self.budget, cost) if self.device.type == "cpu" else self.budget

    def storages(self, rows: int, columns: int) -> tuple[TileStorage, TileStorage]:
        return self.policy.new_tile(rows, columns), self.ref.new_tile(rows, columns)

    def logits(self, storages, rows: slice, v_start: int, v_stop: int, step: int) -> tuple[Tensor, Tensor]:
        """z_nv of the policy and w_nv of the reference, in the arithmetic's dtype; both may be overwritten."""
        pairs = zip((self.policy, self.ref), storages, strict=True)
        return tuple(head_logits(head, storage, rows, v_start, v_stop, step, self.math) for head, storage in pairs)


def head_logits(head: Head, storage: TileStorage, rows: slice, v_start: int, v_stop: int, step: int, math) -> Tensor:
    """z_nv in the dtype ``math``, from GEMMs of ``step`` columns; it lies in the storage where that has the dtype."""
    raw_nv = storage.view(rows.stop - rows.start, v_stop - v_start)
    fill_logits(head, raw_nv, rows, slice(v_start, v_stop), step)
    return head.options.transform.apply_(raw_nv.to(math), head.bias_slice(v_start, v_stop))


@dataclass
class KLStats:
    """Running statistics of KL(a||b) over the slices seen so far, each (N,): maxima, sums of exponentials, and
    shifted = sum exp(a - max_a) ((a - max_a) - (b - max_b)), whose terms stay small whatever the logits' size is.
    """

    max_a: Tensor
    sumexp_a: Tensor
    max_b: Tensor
    sumexp_b: Tensor
    shifted: Tensor

    @classmethod
    def empty(cls, pair: HeadPair) -> "KLStats":
        lowest = [pair.zeros(pair.n).fill_(-torch.inf) for _ in range(2)]
        return cls(lowest[0], pair.zeros(pair.n), lowest[1], pair.zeros(pair.n), pair.zeros(pair.n))

    def merge(self, rows: slice, a_nv: Tensor, b_nv: Tensor) -> None:
        """Add a slice; both tiles are overwritten."""
        max_a_n, drop_a_n, pivot_a_n = _advance(self.max_a[rows], a_nv)
        max_b_n, drop_b_n, pivot_b_n = _advance(self.max_b[rows], b_nv)
        a_nv -= pivot_a_n.unsqueeze(1)
        b_nv -= pivot_b_n.unsqueeze(1)
        exp_a_nv = a_nv.exp()
        # where a forbids a token the difference may be NaN, and its probability is 0
        terms_nv = a_nv.sub_(b_nv).mul_(exp_a_nv).masked_fill_(exp_a_nv == 0, 0.0)
        decay_a_n = drop_a_n.exp()
        shifted_n = self.shifted[rows] + (drop_a_n - drop_b_n) * self.sumexp_a[rows]
        self.shifted[rows] = shifted_n * decay_a_n + terms_nv.sum(1)
        self.sumexp_a[rows] = self.sumexp_a[rows] * decay_a_n + exp_a_nv.sum(1)
        self.sumexp_b[rows] = self.sumexp_b[rows] * drop_b_n.exp() + b_nv.exp_().sum(1)
        self.max_a[rows], self.max_b[rows] = max_a_n, max_b_n

    @property
    def kl_N(self) -> Tensor:
        kl_N = self.shifted / self.sumexp_a - self.sumexp_a.log() + self.sumexp_b.log()
        return kl_N.clamp_(min=0.0)  # rounding of a difference that is never negative


def _advance(max_n: Tensor, tile_nv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The new maximum, by how much the old one lies below it, and the new one with 0 for a row of -inf alone."""
    new_max_n = torch.maximum(max_n, tile_nv.amax(1))
    pivot_n = new_max_n.masked_fill(new_max_n == -torch.inf, 0.0)
    return new_max_n, (max_n - pivot_n).clamp_(min=_LOWEST), pivot_n


def kl_forward_pass(pair: HeadPair) -> tuple[Tensor, Tensor]:
    """KL (N,), and the normalisers (4, N): maximum and log of the sum of exponentials above it, of p and then of q.

    Peak extra memory: the budget.
    """
    stats = KLStats.empty(pair)
    cost = pair.cost(gradient=False)
    plan = plan_forward(pair.n, pair.v, pair.tile_budget(min(pair.n, MAX_FORWARD_ROWS), cost), cost)
    storages = pair.storages(plan.rows, plan.columns)
    for start, stop in spans(0, pair.n, plan.rows):
        rows = slice(start, stop)
        for v_start, v_stop in spans(0, pair.v, plan.columns):
            z_nv, w_nv = pair.logits(storages, rows, v_start, v_stop, plan.columns)
            stats.merge(rows, *((z_nv, w_nv) if pair.reverse else (w_nv, z_nv)))
    of_a, of_b = [stats.max_a, stats.sumexp_a.log()], [stats.max_b, stats.sumexp_b.log()]
    return stats.kl_N, torch.stack(of_a + of_b if pair.reverse else of_b + of_a)


def _normalisers(logits_nv: Tensor) -> list[Tensor]:
    """Maximum and log of the sum of exponentials above it, (n,) each; the maximum is taken off the logits."""
    max_n, _, pivot_n = _advance(logits_nv.new_full(logits_nv.shape[:1], -torch.inf), logits_nv)
    logits_nv -= pivot_n.unsqueeze(1)
    return [max_n, logits_nv.logsumexp(1)]


def _kl_and_grad(pair: HeadPair, z_nv, w_nv, upstream_n, norms_4n=None, kl_n=None) -> tuple[Tensor, Tensor]:
    """KL (n,), unless it is given, and the gradient in the policy's raw logits (n, columns); overwrites both tiles.

    KL(p||q): p (log p - log q) - KL p.   KL(q||p): p - q.   Whole rows need neither normalisers nor KL.
    """
    transform = pair.policy.options.transform
    cap_slope_nv = transform.cap_slope(z_nv)
    # The maximum first, then the rest: log p of a likely token keeps its digits, which KL p multiplies by hundreds.
    if norms_4n is None:
        norms_4n = [*_normalisers(z_nv), *_normalisers(w_nv)]
    else:
        z_nv -= norms_4n[0].unsqueeze(1)
        w_nv -= norms_4n[2].unsqueeze(1)
    z_nv -= norms_4n[1].unsqueeze(1)
    w_nv -= norms_4n[3].unsqueeze(1)
    if pair.reverse:
        p_nv = z_nv.exp()
        z_nv.sub_(w_nv).mul_(p_nv).masked_fill_(p_nv == 0, 0.0)
        kl_n = z_nv.sum(1) if kl_n is None else kl_n
        grad_nv = z_nv.addcmul_(p_nv, kl_n.unsqueeze(1), value=-1.0)
    else:
        q_nv = w_nv.exp()
        if kl_n is None:
            kl_n = w_nv.sub_(z_nv).mul_(q_nv).masked_fill_(q_nv == 0, 0.0).sum(1)
        grad_nv = z_nv.exp_().sub_(q_nv)
    grad_nv.mul_((upstream_n * transform.slope).unsqueeze(1))
    return kl_n, grad_nv if cap_slope_nv is None else grad_nv.mul_(cap_slope_nv)


def kl_one_pass_fits(pair: HeadPair) -> bool:
    """Whether the budget holds the fp32 dW, where it is no gradient that is returned, and chunks of a useful length:
    two passes would compute the logits of both heads again.
    """
    budget = pair.budget - dweight_bytes(pair.policy)
    shortest = shortest_chunk(pair.policy.hidden_ND.device, gemms_saved=2)
    return holds_token_chunks(pair.n, pair.v, budget, pair.chunk_cost(budget), shortest)


def kl_chunk_pass(pair: HeadPair, upstream_N: Tensor) -> tuple[Tensor, Gradients]:
    """KL (N,) and the gradients of sum_n upstream_n KL_n, in one pass."""
    head = pair.policy
    accumulator = dweight_bytes(head)
    budget = pair.budget - accumulator
    plan = plan_token_chunks(pair.n, pair.v, budget, pair.chunk_cost(budget), accumulator)
    step = pair.weight_slice(budget)
    storages = pair.storages(plan.rows, pair.v)
    kl_N, gradients = pair.zeros(pair.n), new_gradients(head, head.operand, accumulation_dtype(head.operand))
    dweight_VD, dbias_V, dright_VR = gradients.of_columns(slice(0, pair.v))
    backend = head.options.backend
    for start, stop in spans(0, pair.n, plan.rows):
        rows = slice(start, stop)
        z_nv, w_nv = pair.logits(storages, rows, 0, pair.v, step)
        kl_n, grad_nv = _kl_and_grad(pair, z_nv, w_nv, upstream_N[rows])
        kl_N[rows] = kl_n
        grad_nv = head.rounded(grad_nv, dbias_V)
        (hidden_nd, left_nr), (dhidden_nd, dleft_nr) = head.of_rows(rows), gradients.of_rows(rows)
        if dhidden_nd is not None:
            _product_in_slices(dhidden_nd, grad_nv, head.lm_head_weight_VD, step, backend)
        row_products(head, grad_nv, 0, None, dleft_nr, step, add=True)
        token_products(head, grad_nv, hidden_nd, dweight_VD, left_nr, dright_VR, step, add=start > 0)
        del grad_nv  # its copy in 16 bit would live on beside the next tile's temporary
    return kl_N.clamp_(min=0.0), gradients.like(head.tensors)


def _product_in_slices(out_nd: Tensor, grad_nv: Tensor, weight_VD: Tensor, step: int, backend: str) -> None:
    """out = grad W by ``step`` rows of W at a time: a 16-bit GEMM on a CPU packs the whole operand it is given."""
    if step >= weight_VD.shape[0]:
        product_into(out_nd, grad_nv, weight_VD, backend)
        return
    total_nd = torch.zeros(out_nd.shape, dtype=torch.promote_types(out_nd.dtype, torch.float32), device=out_nd.device)
    for start, stop in spans(0, weight_VD.shape[0], step):
        add_product(total_nd, grad_nv[:, start:stop], weight_VD[start:stop], backend)
    out_nd.copy_(total_nd)


def kl_vocabulary_pass(pair: HeadPair, norms_4N: Tensor, kl_N: Tensor, upstream_N: Tensor) -> Gradients:
    """Gradients of sum_n upstream_n KL_n from what ``kl_forward_pass`` gave."""
    cost = pair.cost(gradient=True)
    plan = plan_slices(pair.policy, pair.tile_budget(pair.n, cost), cost)
    storages = pair.storages(plan.rows, plan.columns)

    def tile_gradient(rows: slice, columns: slice) -> Tensor:
        z_nv, w_nv = pair.logits(storages, rows, columns.start, columns.stop, plan.columns)
        return _kl_and_grad(pair, z_nv, w_nv, upstream_N[rows], norms_4N[:, rows], kl_N[rows])[1]

    return gradients_by_slices(pair.policy, plan, tile_gradient)


def plan_slices(head: Head, budget: int, cost: TileCost) -> Plan:
    plan = plan_vocabulary_slices(head.n, head.v, budget, cost)
    if plan.rows < head.n and head.needs.lm_head_weight:  # then a slice of dW is summed up beside its tiles
        accumulator = head.d * accumulation_dtype(head.operand).itemsize
        plan = plan_vocabulary_slices(head.n, head.v, budget, replace(cost, column=cost.column + accumulator))
    return plan
