"""A frozen head: statistics and the gradient in hidden alone, in one walk over the vocabulary (2 GEMMs).

    dL/dh = prob sum_v p_v s_v W_v + label s_y W_y [+ constant s sum_v W_v],    s = dz/dx

The normaliser of p is known only at the end, so the sum is made as attention makes its own, with exp(z - pivot) in
place of p: a row's pivot rises, and its sum shrinks, when the maximum has left it behind; the end divides. Tiles need
not hold whole rows: any budget serves. The label is left out of the sum and joins it at the end, where prob p_y + label
is formed in fp32: as a rounded entry of the sum, p_y - 1 of a confident token would keep no digit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from var_kernels.kernels.rows import RowCoefficients, RowStats
from var_kernels.ops.gemm import add_product, logits_into
from var_kernels.ops.head import Gradients, Head, Needs, accumulation_dtype
from var_kernels.ops.workspace import MAX_CPU_BACKWARD_ROWS, MAX_FORWARD_ROWS, TilePlan, plan_forward, spans

# Nats by which a maximum may exceed its pivot: exponentials stay far below fp16's 65504, and pivots rarely move.
_SLACK = 8.0
# Rows whose labels' vectors W_y are gathered at a time.
_GATHERED_ROWS = 256


def serves(head: Head, needs: Needs) -> bool:
    """Whether ``frozen_head_pass`` gives what is needed: one target a row, no gradient of the entropy, no low-rank
    term; label smoothing without a softcap.
    """
    only_hidden = needs.hidden and not needs.lm_head_weight and not needs.bias and head.left_NR is None
    options = head.options
    smooth = options.label_smoothing > 0 and options.transform.softcap is not None
    return only_hidden and head.labels_NK.shape[1] == 1 and not options.entropy and not smooth


def _plan(head: Head, accumulator: int) -> TilePlan:
    """Tiles beside the sum of their rows."""
    cost = head.tile_cost(gradient=True).with_row(head.d * accumulator)
    rows = min(head.n, MAX_CPU_BACKWARD_ROWS if head.options.backend == "native" else MAX_FORWARD_ROWS)
    return plan_forward(rows, head.v, head.tile_budget(rows, cost), cost)


def frozen_head_pass(
    head: Head, coefficients_of: Callable[[slice, RowStats], RowCoefficients]
) -> tuple[RowStats, Gradients]:
    """As ``engines.token_chunk_pass``, for what it ``serves``; coefficients without logp_slope_N."""
    stats, dtype = head.new_stats(), accumulation_dtype(head.operand)
    dhidden_ND = torch.empty_like(head.hidden_ND, memory_format=torch.contiguous_format)
    smooth = head.options.label_smoothing > 0
    weight_sum_D = head.lm_head_weight_VD.sum(0, dtype=dtype) if smooth else None
    in_place = dhidden_ND.dtype == dtype
    plan = _plan(head, 0 if in_place else dtype.itemsize)
    storage = head.new_tile(plan.rows, plan.columns)
    sums = None if in_place else dhidden_ND.new_empty(plan.rows, head.d, dtype=dtype)
    for start, stop in spans(0, head.n, plan.rows):
        rows = slice(start, stop)
        chunk, hidden_nd = stats.rows(start, stop), head.upcast_rows(start, stop)
        sum_nd = (dhidden_ND[rows] if in_place else sums[: stop - start]).zero_()
        pivot_n = torch.full_like(chunk.max_N, -torch.inf)
        for v_start, v_stop in spans(0, head.v, plan.columns):
            logits_nv = storage.view(stop - start, v_stop - v_start)
            weight_vd = head.lm_head_weight_VD[v_start:v_stop]
            logits_into(logits_nv, hidden_nd, weight_vd, head.options.backend)
            head.row_stats(logits_nv, rows, chunk, v_start)
            pivot_n = _raised(pivot_n, chunk.max_N, sum_nd)
            # A row of -inf so far: whatever is subtracted, its exponentials are 0.
            below_n = pivot_n.where(pivot_n > -torch.inf, 0.0)
            without_label = RowCoefficients(
                torch.ones_like(below_n), -(chunk.label_logit_NK - below_n.unsqueeze(1)).exp()
            )
            exp_nv = head.row_grad(logits_nv, rows, below_n, without_label, v_start, None)
            add_product(sum_nd, exp_nv, weight_vd, head.options.backend)
            del exp_nv  # a copy in 16 bit would live on beside the next slice's logits
        coefficients = coefficients_of(rows, chunk)
        _divide(head, rows, chunk, pivot_n, coefficients, sum_nd)
        if smooth:
            sum_nd.addcmul_((coefficients.constant_N * head.options.transform.slope).unsqueeze(1), weight_sum_D)
        if not in_place:
            dhidden_ND[rows] = sum_nd
    return stats, Gradients(dhidden_ND=dhidden_ND)


def _raised(pivot_n: Tensor, max_n: Tensor, sum_nd: Tensor) -> Tensor:
    """The pivots that the maxima ask for; sums over the old ones are rescaled in place."""
    behind_n = max_n > pivot_n + _SLACK
    # Reading a CPU tensor costs nothing, and after the first slices pivots hardly ever move.
    if behind_n.device.type == "cpu" and not behind_n.any():
        return pivot_n
    raised_n = max_n.where(behind_n, pivot_n)
    sum_nd.mul_((pivot_n - raised_n).exp().where(behind_n, 1.0).unsqueeze(1))
    return raised_n


def _divide(
    head: Head, rows: slice, stats: RowStats, pivot_n: Tensor, coefficients: RowCoefficients, sum_nd: Tensor
) -> None:
    """sum <- prob exp(pivot - lse) sum + (prob p_y + label) s_y W_y. Differences with the maximum come first, and p_y -
    1 is formed as such: a confident token's gradient keeps its digits.
    """
    label_logit_n, log_sum_n = stats.label_logit_NK.squeeze(1), stats.sumexp_N.log()
    prob_n, label_n = coefficients.prob_N, coefficients.label_NK.squeeze(1)
    sum_nd.mul_((prob_n * (pivot_n - stats.max_N - log_sum_n).exp()).unsqueeze(1))
    label_n = prob_n + label_n + prob_n * (label_logit_n - stats.max_N - log_sum_n).expm1()
    label_n = label_n * head.options.transform.derivative(label_logit_n)
    # A label beyond the vocabulary, not looked for on a GPU, has a logit of NaN: there is no vector of it to read.
    labels_n = head.labels_NK[rows].squeeze(1).clamp(0, head.v - 1)
    for start, stop in spans(0, labels_n.shape[0], _GATHERED_ROWS):
        vectors_nd = head.lm_head_weight_VD[labels_n[start:stop]].to(sum_nd.dtype)
        sum_nd[start:stop].addcmul_(vectors_nd, label_n[start:stop].unsqueeze(1))
