"""One call over the head: its tensors, options and capabilities, made of a public op's arguments (``prepare``), and the
way back to the caller's shape.
"""

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from var_kernels.kernels.compile_time import compile_time
from var_kernels.kernels.pairs import PairOptions, divergence_of, empty_state
from var_kernels.kernels.rows import LogitTransform
from var_kernels.machine import usable_memory
from var_kernels.ops import checks
from var_kernels.ops.backend import choose_backend, kernels_of, pair_kernels, warn_in_plain_torch
from var_kernels.ops.signatures import LogprobKeywords

Tensors = tuple[Tensor | None, ...]
# Fields of ``Head`` that may have a gradient, in the order in which autograd functions take them.
LEARNING = ("hidden_ND", "lm_head_weight_VD", "bias_V", "left_NR", "right_VR")
MIB = 1 << 20
# Rows of a chunk that a default budget holds beside the sums of dW: reading and writing those costs more with fewer.
_CPU_CHUNK = 512


@dataclass(frozen=True)
class HeadOptions:
    """Everything about the head and the run that is no tensor: dtype of logits; budget in bytes; lse, entropy, argmax:
    outputs that were asked for.
    """

    transform: LogitTransform
    label_smoothing: float
    tile: torch.dtype
    budget: int
    backend: str
    lse: bool = False
    entropy: bool = False
    argmax: bool = False


class Needs(NamedTuple):
    """The gradients that are needed, in the order of ``Head.tensors``."""

    hidden: bool = False
    lm_head_weight: bool = False
    bias: bool = False
    left: bool = False
    right: bool = False

    @property
    def whole_rows(self) -> bool:
        """Return whether a gradient sums over tokens, whose normalisers must be known first."""
        return self.lm_head_weight or self.bias or self.right


HIDDEN_ALONE = Needs(hidden=True)


@dataclass(frozen=True)
class TileCost:
    """Bytes of a tile of r rows and c columns: r c element + c column + r row + fixed."""

    element: int
    column: int = 0
    row: int = 0
    fixed: int = 0

    def with_row(self, more: int) -> "TileCost":
        return replace(self, row=self.row + more)

    def of_rows(self, columns: int) -> "TileCost":
        """Bytes of tiles that all have so many columns."""
        return TileCost(0, 0, self.row + columns * self.element, self.fixed + columns * self.column)

    def columns_within(self, budget: int, rows: int) -> int:
        return (budget - self.fixed - rows * self.row) // (rows * self.element + self.column)

    def rows_within(self, budget: int, columns: int) -> int:
        return (budget - self.fixed - columns * self.column) // (columns * self.element + self.row)

    def of_tile(self, rows: int, columns: int) -> int:
        return self.fixed + columns * self.column + rows * (columns * self.element + self.row)


@dataclass
class Head:
    """One call over the head, built where it is prepared and handed to engines, autograd functions and registered ops.

    hidden_ND, lm_head_weight_VD, bias_V or None, labels_NK (ids valid everywhere), the options, which gradients are
    needed, and two factors or None: raw logits are hidden W^T + left right^T. What follows from them: sizes, dtypes
    (``operand``; ``tile``: of logits; ``wide``: of sums; ``cached``: of columns that are held until the backward), the
    backend's kernels and their traits, and two choices:

    stores_exp: stored exponentials make every gradient that is needed (``row_exp``). ends_in_exp: the GEMM runs
        ``row_exp`` on its sums, and no tile of logits is written.
    """

    hidden_ND: Tensor
    lm_head_weight_VD: Tensor
    bias_V: Tensor | None
    labels_NK: Tensor
    options: HeadOptions
    needs: Needs
    left_NR: Tensor | None = None
    right_VR: Tensor | None = None
    tensors = property(attrgetter(*LEARNING))

    def __post_init__(self):
        options = self.options
        (self.n, self.d), self.v = self.hidden_ND.shape, self.lm_head_weight_VD.shape[0]
        self.device = self.hidden_ND.device
        self.operand = self.hidden_ND.dtype
        self.tile = options.tile
        self.wide = torch.promote_types(self.operand, torch.float32)
        self.kernels, self.label_kernels, self.gemm = kernels_of(options.backend)
        self.traits = self.gemm.traits(self.hidden_ND, self.lm_head_weight_VD, self.tile)
        # One target a row, nothing of the entropy, none of a bias of more digits; label smoothing only with hidden's
        # gradient alone and without a softcap. fp16 holds too narrow a range; where the host reads raised pivots, an
        # accelerator would be waited for. A call without gradients goes the same way, so that its log-probs have the
        # same bits.
        self.stores_exp = (
            self.labels_NK.shape[1] == 1
            and not (options.entropy or options.budget == 0 or self.operand == torch.float16)
            and not (self.needs.bias and self.bias_V.dtype != self.operand)
            and not (self.kernels.READS_PIVOTS and self.device.type != "cpu")
            and (not options.label_smoothing or (self.needs == HIDDEN_ALONE and options.transform.softcap is None))
        )
        self.cached = self.operand if self.stores_exp else self.tile
        plain = not (options.argmax or options.label_smoothing or self.left_NR is not None)
        self.ends_in_exp = plain and self.tile == torch.float32 and self.traits.ends_in_exp
        # Bytes of the label vectors that the label kernels gather at a time, and of a tile of logits.
        self.gathered = self.label_kernels.gathered_bytes(options.budget, self.d, self.wide, self.device)
        # Bytes a row or column of upcast operands, and of factors in the tile's dtype; the same with a backward, which
        # makes partial results in 16 bit and factors in the operands' dtype.
        tile, partial = self.tile.itemsize, self.traits.partial_bytes
        self.copies = self.d * tile if self.traits.upcasts else 0
        self.gradient_copies = self.copies + self.d * partial
        if self.left_NR is not None:
            rank, factor = self.left_NR.shape[1], self.left_NR.dtype
            casts, narrowed = tile * (factor != self.tile), self.operand.itemsize * (factor != self.operand)
            self.copies += rank * casts
            self.gradient_copies += rank * (casts + partial + narrowed)
        temporary = self.kernels.temporary_bytes(self.n, self.v, self.tile)
        self.cost = TileCost(tile, self.copies, self.copies, temporary)

    def of_rows(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Hidden states and left factor of some rows."""
        return self.hidden_ND[rows], None if self.left_NR is None else self.left_NR[rows]

    def bias_slice(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias_V is None else self.bias_V[start:stop]


@dataclass
class HeadPair:
    """The policy's head p and the reference's q, over the same rows and vocabulary, and what is computed of them: the
    arguments of an op that has no others.
    """

    head: Head
    ref: Head
    kind: str
    beta: float

    def __post_init__(self):
        own, ref = self.head.options, self.ref.options
        self.n, self.v, self.device, self.budget = self.head.n, self.head.v, self.head.device, own.budget
        self.math = torch.promote_types(torch.promote_types(own.tile, ref.tile), torch.float32)
        self.options = PairOptions(self.kind, self.beta, own.transform, ref.transform)
        self.kernels = pair_kernels("torch" if "torch" in (own.backend, ref.backend) else own.backend)

    def ones(self) -> Tensor:
        return torch.ones(self.n, dtype=self.math, device=self.device)

    def empty_state(self) -> Tensor:
        return empty_state(self.n, self.math, self.device)

    def divergence(self, state_6N: Tensor) -> Tensor:
        return divergence_of(state_6N, self.options).to(self.math)


def budget_bytes(workspace_mb: float | None, lm_head_weight: Tensor, *, sums: bool = True) -> int:
    """Bytes of a budget. None: on an accelerator 1/32 of its memory, at least 128 MiB; on a CPU half of the head's
    bytes, at least 64 MiB (with less, dW is added up from chunks so short that memory and not arithmetic sets the
    time), or with ``sums`` for 16-bit operands what one pass takes over chunks of 512 rows (the fp32 sums of dW and the
    rows' exponentials), if that is at most 1/32 of the memory that this process may use.
    """
    if workspace_mb is not None:
        return int(workspace_mb * MIB)
    device, (v, d) = lm_head_weight.device, lm_head_weight.shape
    if device.type == "cuda":
        return max(128, _cuda_memory(device.index or 0) // 32 // MIB) * MIB
    tiles = max(64, v * d * lm_head_weight.itemsize // 2 // MIB) * MIB
    if not sums or lm_head_weight.itemsize != 2:  # dW is itself the sum
        return tiles
    rows = _CPU_CHUNK * (2 * v + 8 * d)  # with their sums and scaled hidden states
    one_pass = ((4 * v * d + rows) // MIB + 8) * MIB  # with a tile
    return max(tiles, one_pass) if one_pass <= _cpu_memory() // 32 else tiles


@compile_time
def _cpu_memory() -> int:
    return usable_memory()


@compile_time
def _cuda_memory(index: int) -> int:
    if not torch.cuda.is_available():  # a fake tensor's device
        return 0
    return torch.cuda.get_device_properties(index).total_memory


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

    def outputs(self, first: Tensor, *others: Tensor | None, argmax_N: Tensor | None = None):
        """Return ``first``, or a tuple of it and those of the others that are there, in the call's shape."""
        found = [first, *[self.restore(t) for t in others if t is not None]]
        if argmax_N is not None:
            found.append(self.restore(argmax_N, fill=-1))
        return first if len(found) == 1 else tuple(found)

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


def _active_rows(active_N: Tensor, num_active: int) -> Tensor | None:
    """``num_active`` distinct rows with every active one among them, or None for all rows; nothing is read from the
    device, where a count that is too small ends the run by a device-side assertion.
    """
    if num_active >= active_N.shape[0]:
        return None
    enough = active_N.sum() <= num_active
    if not checks.values_readable(active_N):
        torch._assert_async(enough, "num_active is smaller than the number of rows that count")
    elif not enough:
        raise ValueError(
            f"num_active must be at least the number of rows that count, {int(active_N.sum())}, got {num_active}; "
            "count labels != ignore_index after the shift"
        )
    return (~active_N).to(torch.uint8).argsort(stable=True)[:num_active]


def model_head(
    tensors,
    options: LogprobKeywords,
    labels_NK: Tensor,
    rows: Tensor | None,
    active_N1: Tensor | None,
    prefix: str = "",
    **asked: bool,
) -> Head:
    """A model's head over some ``rows`` (None: all) of its ``tensors`` (hidden, lm_head_weight, bias, left, right), in
    autocast's dtype under autocast unless it is in fp64. active_N1: the rows that count; None: all do.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    if dtype != torch.float64 and device.type != "meta" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    checks.check_dtypes(*tensors, prefix)
    hidden, lm_head_weight, bias, left, right = tensors
    grad = torch.is_grad_enabled()
    needs = Needs(*[grad and t is not None and t.requires_grad for t in tensors])
    budget = budget_bytes(options["workspace_mb"], lm_head_weight)
    if budget == 0 and any(needs):  # a backward works on tiles
        raise ValueError(
            "workspace_mb must be positive for a call that needs gradients, got 0; pass None for the default, 1 or "
            "more (MiB), or call it under torch.no_grad()"
        )
    of_rows = []
    for values in (hidden, left):
        if values is not None:
            values = values.reshape(values.shape[:-1].numel(), values.shape[-1])
            values = values if rows is None else _TakeRows.apply(values, rows)
            values = values if active_N1 is None else values.where(active_N1, 0.0)  # padding may hold NaN
        of_rows.append(values)
    hidden_ND, left_NR = of_rows
    bias = None if bias is None else bias.contiguous()  # row kernels read it by index
    transform = LogitTransform(float(options["logit_scale"]), options["softcap"], float(options["temperature"]))
    tile = dtype if options["precision"] == "fast" else torch.promote_types(dtype, torch.float32)
    backend, _ = choose_backend(device, tile)
    head_options = HeadOptions(transform, options["label_smoothing"], tile, budget, backend, **asked)
    return Head(hidden_ND, lm_head_weight, bias, labels_NK, head_options, needs, left_NR, right)


def prepare(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: LogprobKeywords,
    *,
    token_weight: Tensor | None = None,
    vocabulary: int | None = None,
    **asked: bool,
) -> HeadCall:
    """Check everything, then flatten; rows without a target that counts are left out. Their number is read from the
    device (one synchronisation on an accelerator) unless ``num_active`` gives it; where nothing may be read, under
    torch.compile and CUDA-graph capture, they are masked.
    """
    ignore_index, num_active, low_rank = options["ignore_index"], options["num_active"], options["low_rank"]
    checks.check_tensors(hidden, lm_head_weight, labels, bias, ignore_index)
    device, traced, left, right = hidden.device, checks.is_traced(hidden), None, None
    if token_weight is not None:
        checks.check_token_weight(token_weight, labels)
    if device.type == "cpu" and not traced:  # reading values is free
        checks.check_values(labels, token_weight, ignore_index, vocabulary or lm_head_weight.shape[0])
    if num_active is not None:
        checks.check_num_active(num_active)
    if low_rank is not None:
        checks.check_low_rank(low_rank, hidden, lm_head_weight, options["workspace_mb"])
        left, right = low_rank
    leading = hidden.shape[:-1]
    several = labels.dim() == hidden.dim()
    labels_NK = labels.reshape(leading.numel(), labels.shape[-1] if several else 1).to(torch.int64)
    active_NK = labels_NK != ignore_index
    # A learned weight has a gradient at 0 too.
    if token_weight is not None and not (torch.is_grad_enabled() and token_weight.requires_grad):
        active_NK = active_NK & (token_weight.reshape(active_NK.shape) != 0)
    capturing = not traced and device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    masked = num_active is not None or traced or capturing
    stand_in = 0
    if masked:  # of its own: one program adds all rows of an id to dW
        stand_in = torch.arange(leading.numel(), device=device).unsqueeze(1) % lm_head_weight.shape[0]
    labels_NK = labels_NK.where(active_NK, stand_in)
    rows = None
    if num_active is not None:
        rows = _active_rows(active_NK.any(1), num_active)
    elif not masked:
        # The one synchronisation of a call: the number of rows decides the sizes of every GEMM that follows.
        rows = active_NK.any(1).nonzero().squeeze(1)
        rows = None if rows.numel() == leading.numel() else rows
    if rows is not None:
        labels_NK, active_NK = labels_NK.index_select(0, rows), active_NK.index_select(0, rows)
    # Some of these rows may not count.
    active_N1 = active_NK.any(1, keepdim=True) if masked else None
    head = model_head((hidden, lm_head_weight, bias, left, right), options, labels_NK, rows, active_N1, **asked)
    if not traced:
        warn_in_plain_torch(device, head.operand, head.n * head.v)
    return HeadCall(head, active_NK, rows, masked, traced, leading, several)
