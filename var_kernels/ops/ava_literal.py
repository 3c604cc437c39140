"""``linear_prob_lse``: log sum_v exp(alpha p_v) over the vocabulary's probabilities, for AVA's Q read literally."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from var_kernels.kernels.rows import spans
from var_kernels.ops.checks import complete_options
from var_kernels.ops.define import Forward, define_op
from var_kernels.ops.engines import Gradients, compute_logits, forward_pass, gradients_by_slices, new_tile
from var_kernels.ops.head import Head, Tensors, TileCost, prepare
from var_kernels.ops.plan import plan_slices, plan_tiles
from var_kernels.ops.signatures import RowKeywords, names_options


@names_options
def linear_prob_lse(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: float,
    **options: Unpack[RowKeywords],
) -> Tensor:
    """The log-normaliser of a softmax over probabilities, without the [N, V] logits.

        out = log sum_v exp(alpha p_v),   p = softmax(z)
        d out/dz_v = alpha p_v (s_v - sum_u s_u p_u),   s = softmax(alpha p)

    Two passes over the vocabulary forward (2 GEMMs), a third in the backward (5 in all); peak extra memory
    ``workspace_mb``, and in the backward an fp32 [N, D].

    Args:
        hidden, lm_head_weight, bias, low_rank, workspace_mb, precision and the head's options: see ``linear_logprob``.
        labels: (...) int64; only which rows count matters, those not equal to ``ignore_index``.
        alpha: > 0.

    Returns:
        The shape of labels, nats, between log V and log V + alpha, 0 where ignored; fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: argument, what was expected, what came, the remedy.

    Source: arXiv 2411.09341, Q read literally (see ``var_kernels.losses.ava``).
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be finite and > 0, got {alpha}; it scales the probabilities")
    if isinstance(hidden, Tensor) and isinstance(labels, Tensor) and labels.dim() == hidden.dim():
        raise ValueError(
            f"labels must hold one entry a row, shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}; the "
            "normaliser does not depend on the target"
        )
    options = complete_options("linear_prob_lse", options, RowKeywords)
    call = prepare(hidden, lm_head_weight, labels, bias, options)
    return call.restore(*_prob_lse(ProbLseArguments(call.head, float(alpha)), call.traced))


@dataclass
class ProbLseArguments:
    head: Head
    alpha: float


@dataclass
class _Tiles:
    """Tiles of the probabilities: p_nv = exp(z - max) / sumexp."""

    head: Head
    alpha: float
    max_N: Tensor
    sumexp_N: Tensor

    def __post_init__(self):
        self.math = torch.promote_types(self.head.tile, torch.float32)

    def cost(self, *, gradient: bool) -> TileCost:
        """A tile in the arithmetic's dtype and a temporary, the raw tile where it is narrower, the softcap's slope."""
        head = self.head
        capped = 1 if gradient and head.options.transform.softcap is not None else 0
        raw = head.tile.itemsize if head.tile != self.math else 0
        copies = head.gradient_copies if gradient else head.copies
        return TileCost((2 + capped) * self.math.itemsize + raw, copies, copies)

    def logits(self, storage: Tensor, rows: slice, columns: slice) -> Tensor:
        """z_nv in the arithmetic's dtype; it lies in the storage where that has the dtype."""
        raw_nv = compute_logits(self.head, storage, rows, columns).to(self.math)
        return self.head.options.transform.apply_(raw_nv, self.head.bias_slice(columns.start, columns.stop))

    def probabilities_(self, z_nv: Tensor, rows: slice) -> Tensor:
        return z_nv.sub_(self.max_N[rows].unsqueeze(1)).exp_().div_(self.sumexp_N[rows].unsqueeze(1))

    def shares(self, p_nv: Tensor, rows: slice) -> Tensor:
        """exp(alpha (p - largest p)): at most 1, whatever alpha is."""
        return (p_nv - (1 / self.sumexp_N[rows]).unsqueeze(1)).mul_(self.alpha).exp_()

    def sums(self) -> tuple[Tensor, Tensor]:
        """sum of the shares, and the shares' mean of p, each (N,)."""
        head = self.head
        plan = plan_tiles(head, self.cost(gradient=False))
        storage = new_tile(head, plan.rows, plan.columns)
        total_N, weighted_N = torch.zeros_like(self.max_N), torch.zeros_like(self.max_N)
        for rows in spans(0, head.n, plan.rows):
            for columns in spans(0, head.v, plan.columns):
                p_nv = self.probabilities_(self.logits(storage, rows, columns), rows)
                shares_nv = self.shares(p_nv, rows)
                total_N[rows] += shares_nv.sum(1)
                weighted_N[rows] += shares_nv.mul_(p_nv).sum(1)
        return total_N, weighted_N / total_N

    def gradients(self, total_N: Tensor, mean_N: Tensor, upstream_N: Tensor) -> Gradients:
        head = self.head
        plan = plan_slices(head, self.cost(gradient=True), head.n)
        storage = new_tile(head, plan.rows, plan.columns)
        transform = head.options.transform

        def tile_gradient(rows: slice, columns: slice) -> Tensor:
            z_nv = self.logits(storage, rows, columns)
            cap_slope_nv = None if transform.softcap is None else transform.cap_slope(z_nv)
            p_nv = self.probabilities_(z_nv, rows)
            shares_nv = self.shares(p_nv, rows).div_(total_N[rows].unsqueeze(1)).sub_(mean_N[rows].unsqueeze(1))
            scale_n = upstream_N[rows] * (self.alpha * transform.slope)
            grad_nv = p_nv.mul_(shares_nv).mul_(scale_n.unsqueeze(1))
            return grad_nv if cap_slope_nv is None else grad_nv.mul_(cap_slope_nv)

        return gradients_by_slices(head, plan, tile_gradient)


def _forward(arguments: ProbLseArguments) -> Forward:
    head, alpha = arguments.head, arguments.alpha
    stats = forward_pass(head)
    total_N, mean_N = _Tiles(head, alpha, stats.max_N, stats.sumexp_N).sums()
    prob_lse_N = alpha / stats.sumexp_N + total_N.log()
    return Forward((prob_lse_N,), (stats.max_N, stats.sumexp_N, total_N, mean_N), arguments)


def _shapes(arguments: ProbLseArguments) -> Forward:
    head = arguments.head
    prob_lse_N, *saved = (head.hidden_ND.new_empty(head.n, dtype=head.wide) for _ in range(5))
    return Forward((prob_lse_N,), tuple(saved))


def _backward(arguments: ProbLseArguments, saved: Tensors, upstream: Tensors, _: None) -> Tensors:
    head, (max_N, sumexp_N, total_N, mean_N) = arguments.head, saved
    gradients = _Tiles(head, arguments.alpha, max_N, sumexp_N).gradients(total_N, mean_N, *upstream)
    return gradients.like(head.tensors)


_prob_lse = define_op("prob_lse", ProbLseArguments, _forward, _backward, _shapes, outputs=1)
