"""From a public call to flat tensors: checks, autocast, compaction of ignored rows. Shared by the two primitives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from var_kernels.kernels.rows import LogitTransform
from var_kernels.ops import checks
from var_kernels.ops.backend import choose_backend
from var_kernels.ops.engines import HeadOptions, Needs, tile_dtype
from var_kernels.ops.workspace import UNKNOWN, budget_bytes


@dataclass
class HeadCall:
    """The rows that count, flat, and how to go back.

    kept_NK: which (row, target) pairs count, in the call's own rows. rows: indices of the rows that were kept, None
        for all of them.
    """

    hidden_ND: Tensor
    lm_head_weight_VD: Tensor
    bias_V: Tensor | None
    labels_NK: Tensor
    kept_NK: Tensor
    rows: Tensor | None
    options: HeadOptions
    needs: Needs
    leading: torch.Size
    several: bool

    def restore(self, values: Tensor, fill: float = 0) -> Tensor:
        """(n,) or (n, K) of the kept rows -> the call's leading shape, ``fill`` in the other rows."""
        n_all = self.leading.numel()
        if self.rows is not None:
            full = values.new_full((n_all, *values.shape[1:]), fill)
            values = full.index_copy(0, self.rows, values)
        return values.view(*self.leading, *values.shape[1:])

    def restore_targets(self, values_NK: Tensor) -> Tensor:
        return self.restore(values_NK if self.several else values_NK.squeeze(1))

    def select_targets(self, values: Tensor) -> Tensor:
        """(...) or (..., K) in the call's shape -> (n, K) of the kept rows."""
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


def prepare(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None = None,
    *,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    label_smoothing: float,
    precision: str,
    workspace_mb: float | None,
    lse: bool = False,
    entropy: bool = False,
    argmax: bool = False,
) -> HeadCall:
    """Check everything, then flatten; rows without a target that counts are left out (one synchronisation on an
    accelerator), or masked where nothing may be read from the device: under torch.compile and CUDA-graph capture.
    """
    checks.check_tensors(hidden, lm_head_weight, labels, bias, ignore_index)
    checks.check_head_options(logit_scale, softcap, temperature, label_smoothing, precision, workspace_mb)
    checks.check_token_weight(token_weight, labels)
    device = hidden.device
    if torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        hidden, lm_head_weight = hidden.to(dtype), lm_head_weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    checks.check_dtypes(hidden, lm_head_weight, bias)
    bias = None if bias is None else bias.contiguous()  # row kernels read it by index
    leading = hidden.shape[:-1]
    several = labels.dim() == hidden.dim()
    labels_NK = labels.reshape(leading.numel(), labels.shape[-1] if several else 1).to(torch.int64)
    kept_NK = labels_NK != ignore_index
    # A learned weight has a gradient at 0 too.
    if token_weight is not None and not (torch.is_grad_enabled() and token_weight.requires_grad):
        kept_NK = kept_NK & (token_weight.reshape(kept_NK.shape) != 0)
    labels_NK = labels_NK.where(kept_NK, 0)
    hidden_ND = hidden.reshape(leading.numel(), hidden.shape[-1])

    traced = torch.compiler.is_compiling()
    rows = None
    if traced or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        # Their number would have to be read from the device: masked instead. Padding may hold NaN.
        hidden_ND = hidden_ND.where(kept_NK.any(1, keepdim=True), 0.0)
    else:
        # The one synchronisation of a call: the number of rows decides the sizes of every GEMM that follows.
        rows = kept_NK.any(1).nonzero().squeeze(1)
        if rows.numel() == hidden_ND.shape[0]:
            rows = None
        else:
            hidden_ND = _TakeRows.apply(hidden_ND, rows)
            labels_NK, kept_NK = labels_NK[rows], kept_NK[rows]

    grad = torch.is_grad_enabled()
    needs = Needs(
        hidden=grad and hidden.requires_grad,
        lm_head_weight=grad and lm_head_weight.requires_grad,
        bias=grad and bias is not None and bias.requires_grad,
    )
    budget = UNKNOWN if traced and workspace_mb is None else budget_bytes(workspace_mb, device)
    checks.check_budget(budget, bool(needs))
    return HeadCall(
        hidden_ND=hidden_ND,
        lm_head_weight_VD=lm_head_weight,
        bias_V=bias,
        labels_NK=labels_NK,
        kept_NK=kept_NK,
        rows=rows,
        options=HeadOptions(
            transform=LogitTransform(float(logit_scale), softcap, float(temperature)),
            label_smoothing=label_smoothing,
            precision=precision,
            budget=budget,
            backend="" if traced else choose_backend(device, tile_dtype(hidden.dtype, precision))[0],
            lse=lse,
            entropy=entropy,
            argmax=argmax,
        ),
        needs=needs,
        leading=leading,
        several=several,
    )
