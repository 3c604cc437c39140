"""From a public call to flat tensors: checks, autocast, compaction of ignored rows. Shared by the two primitives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from var_kernels.kernels.rows import LogitTransform
from var_kernels.ops import checks
from var_kernels.ops.backend import choose_backend, warn_in_plain_torch
from var_kernels.ops.head import Head, HeadOptions, Needs, tile_dtype
from var_kernels.ops.plan import budget_bytes
from var_kernels.ops.signatures import LogprobKeywords


@dataclass
class HeadCall:
    """A call over the active rows, and the way back to the caller's shape.

    head: tensors of the active rows, options, gradients that are needed. active_NK: (row, target) pairs that count, of
        the head's rows. rows: indices of the head's rows among the caller's, None for all of them. masked: rows
        without a target that counts may be among them. traced: there are no values (see ``checks.is_traced``), so the
        registered ops are called.
    """

    head: Head
    active_NK: Tensor
    rows: Tensor | None
    masked: bool
    traced: bool
    leading: torch.Size
    several: bool

    def restore(self, values: Tensor, fill: float = 0) -> Tensor:
        """(n,) or (n, K) of the active rows -> the call's leading shape, with K where labels have it; ``fill`` in the
        other rows.
        """
        n_all = self.leading.numel()
        if values.dim() == 2 and not self.several:
            values = values.squeeze(1)
        if self.masked:
            active_N = self.active_NK.any(1)
            values = values.where(active_N if values.dim() == 1 else active_N.unsqueeze(1), fill)
        if self.rows is not None:
            full = values.new_full((n_all, *values.shape[1:]), fill)
            values = full.index_copy(0, self.rows, values)
        return values.view((*self.leading, *values.shape[1:]))

    def restore_logprob(
        self, logp_NK: Tensor, lse_N: Tensor | None, entropy_N: Tensor | None, argmax_N: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        """What ``linear_logprob`` returns: log-probs, alone or with the outputs that were asked for."""
        logp = self.restore(logp_NK)
        if lse_N is None and entropy_N is None and argmax_N is None:
            return logp
        others = [self.restore(t) for t in (lse_N, entropy_N) if t is not None]
        return logp, *others, *([] if argmax_N is None else [self.restore(argmax_N, fill=-1)])

    def select_targets(self, values: Tensor) -> Tensor:
        """(...) or (..., K) in the call's shape -> (n, K) of the active rows."""
        flat_NK = values.reshape(self.leading.numel(), values.shape[-1] if self.several else 1)
        return flat_NK if self.rows is None else flat_NK.index_select(0, self.rows)


class _TakeRows(torch.autograd.Function):
    """hidden[rows] for distinct rows; its backward is a copy, where autograd's own adds."""

    @staticmethod
    def forward(ctx, hidden_ND, rows):
        ctx.save_for_backward(rows)
        ctx.shape = hidden_ND.shape
        return hidden_ND.index_select(0, rows)

    @staticmethod
    def backward(ctx, dtaken_nD):
        (rows,) = ctx.saved_tensors
        return dtaken_nD.new_zeros(ctx.shape).index_copy_(0, rows, dtaken_nD), None


def _taken(values_NX: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values_NX is None else _TakeRows.apply(values_NX, rows)


def _active_rows(active_N: Tensor, num_active: int) -> Tensor | None:
    """``num_active`` distinct rows with every active one among them, or None for all rows; nothing is read from the
    device, where a count that is too small ends the run by a device-side assertion.
    """
    if num_active >= active_N.shape[0]:
        return None
    enough = active_N.sum() <= num_active
    if checks.values_readable(active_N):
        checks.check_enough_rows(bool(enough), active_N, num_active)
    else:
        torch._assert_async(enough, "num_active is smaller than the number of rows that count")
    return (~active_N).to(torch.uint8).argsort(stable=True)[:num_active]


def prepare(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: LogprobKeywords,
    *,
    token_weight: Tensor | None = None,
    vocabulary: int | None = None,
    lse: bool = False,
    entropy: bool = False,
    argmax: bool = False,
) -> HeadCall:
    """Check everything, then flatten; rows without a target that counts are left out. Their number is read from the
    device (one synchronisation on an accelerator) unless ``num_active`` gives it; where nothing may be read, under
    torch.compile and CUDA-graph capture, they are masked.
    """
    checks.check_no_transform()
    ignore_index, num_active, low_rank = options["ignore_index"], options["num_active"], options["low_rank"]
    checks.check_tensors(hidden, lm_head_weight, labels, bias, ignore_index, vocabulary)
    checks.check_head_options(options)
    left = right = None
    if token_weight is not None:
        checks.check_token_weight(token_weight, labels, ignore_index)
    if num_active is not None:
        checks.check_num_active(num_active)
    if low_rank is not None:
        checks.check_low_rank(low_rank, hidden, lm_head_weight, options["workspace_mb"])
        left, right = low_rank
    device = hidden.device
    if device.type != "meta" and torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        hidden, lm_head_weight = hidden.to(dtype), lm_head_weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        left, right = (None, None) if left is None else (left.to(dtype), right.to(dtype))
    checks.check_dtypes(hidden, lm_head_weight, bias)
    if left is not None:
        checks.check_low_rank_dtypes(left, right, hidden)
    bias = None if bias is None else bias.contiguous()  # row kernels read it by index
    leading = hidden.shape[:-1]
    several = labels.dim() == hidden.dim()
    labels_NK = labels.reshape(leading.numel(), labels.shape[-1] if several else 1).to(torch.int64)
    active_NK = labels_NK != ignore_index
    # A learned weight has a gradient at 0 too.
    if token_weight is not None and not (torch.is_grad_enabled() and token_weight.requires_grad):
        active_NK = active_NK & (token_weight.reshape(active_NK.shape) != 0)
    labels_NK = labels_NK.where(active_NK, 0)
    hidden_ND = hidden.reshape(leading.numel(), hidden.shape[-1])
    left_NR = None if left is None else left.reshape(leading.numel(), left.shape[-1])

    traced = checks.is_traced(hidden)
    capturing = not traced and device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    masked = num_active is not None or traced or capturing
    rows = None
    if masked:
        if num_active is not None:
            rows = _active_rows(active_NK.any(1), num_active)
        if rows is not None:
            hidden_ND, left_NR = _taken(hidden_ND, rows), _taken(left_NR, rows)
            labels_NK, active_NK = labels_NK[rows], active_NK[rows]
        # Some of these rows may not count: masked. Padding may hold NaN.
        active_N1 = active_NK.any(1, keepdim=True)
        hidden_ND, left_NR = hidden_ND.where(active_N1, 0.0), None if left_NR is None else left_NR.where(active_N1, 0.0)
    else:
        # The one synchronisation of a call: the number of rows decides the sizes of every GEMM that follows.
        rows = active_NK.any(1).nonzero().squeeze(1)
        if rows.numel() == hidden_ND.shape[0]:
            rows = None
        else:
            hidden_ND, left_NR = _taken(hidden_ND, rows), _taken(left_NR, rows)
            labels_NK, active_NK = labels_NK[rows], active_NK[rows]

    grad = torch.is_grad_enabled()
    needs = Needs(
        hidden=grad and hidden.requires_grad,
        lm_head_weight=grad and lm_head_weight.requires_grad,
        bias=grad and bias is not None and bias.requires_grad,
        left=grad and left is not None and left.requires_grad,
        right=grad and right is not None and right.requires_grad,
    )
    budget = budget_bytes(options["workspace_mb"], lm_head_weight)
    if budget == 0:
        checks.check_budget(needs.some)
    if not traced:
        warn_in_plain_torch(device, hidden.dtype, labels_NK.shape[0] * lm_head_weight.shape[0])
    transform = LogitTransform(float(options["logit_scale"]), options["softcap"], float(options["temperature"]))
    backend, _ = choose_backend(device, tile_dtype(hidden.dtype, options["precision"]))
    smoothing, precision = options["label_smoothing"], options["precision"]
    head_options = HeadOptions(transform, smoothing, precision, budget, backend, lse, entropy, argmax)
    head = Head(hidden_ND, lm_head_weight, bias, labels_NK, head_options, needs, left_NR, right)
    return HeadCall(head, active_NK, rows, masked, traced, leading, several)
