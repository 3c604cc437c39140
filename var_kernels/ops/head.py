"""One call's tensors, options and costs, the gradients it gives, and its tiles' memory: what every engine works on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats
from var_kernels.ops.backend import kernels_of

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


@dataclass(frozen=True)
class Needs:
    """Which gradients somebody asked for."""

    hidden: bool = False
    lm_head_weight: bool = False
    bias: bool = False
    left: bool = False
    right: bool = False

    @property
    def flags(self) -> list[bool]:
        """In the order of ``Head.tensors``."""
        return [self.hidden, self.lm_head_weight, self.bias, self.left, self.right]

    @property
    def hidden_alone(self) -> bool:
        return self.hidden and not (self.lm_head_weight or self.bias or self.left or self.right)

    @property
    def whole_rows(self) -> bool:
        """Of a gradient that sums over tokens, which have to know their normalisers first."""
        return self.lm_head_weight or self.bias or self.right

    @property
    def some(self) -> bool:
        """bool(needs), which torch 2.11 does not trace."""
        return self.hidden or self.lm_head_weight or self.bias or self.left or self.right

    def __bool__(self):
        return self.some


def tile_dtype(operand: torch.dtype, precision: str) -> torch.dtype:
    """fp32 logits, fp64 ones for fp64 operands; "fast" keeps the operands' dtype."""
    return operand if operand == torch.float64 or precision == "fast" else torch.float32


def _aligned(columns: int) -> int:
    """A row's stride: GEMMs and vector loads want rows that start at multiples of 64 bytes, and read up to
    32 elements at once (see ``zero_row_ends``)."""
    return -(-columns // _ROW_ELEMENTS) * _ROW_ELEMENTS


def zero_row_ends(values_nv: Tensor) -> None:
    """Zeros in the columns behind a row's last, up to a multiple of 32.

    On CPUs with AMX the bf16 GEMM of torch 2.13 reads them and multiplies by 0, which leaves NaN where they hold NaN.
    """
    if values_nv.device.type != "cpu" or values_nv.dtype != torch.bfloat16:
        return
    n, columns = values_nv.shape
    stride, offset = values_nv.stride(0), values_nv.storage_offset()
    # A copy of one row keeps the tile's stride, and ends with its columns.
    last_row = values_nv.untyped_storage().nbytes() // values_nv.itemsize - offset - (n - 1) * stride
    end = min(-(-columns // 32) * 32, stride, last_row)
    if columns < end:
        values_nv.as_strided((n, end - columns), values_nv.stride(), offset + columns).zero_()


def spans(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive pieces of a range."""
    begins = range(start, stop, step)
    return list(zip(begins, (*begins[1:], stop), strict=False))


@dataclass(frozen=True)
class TileStorage:
    """Memory that tiles of several shapes use in turn."""

    elements: Tensor

    def view(self, rows: int, columns: int) -> Tensor:
        stride = _aligned(columns)
        return self.elements[: rows * stride].view(rows, stride)[:, :columns]


@dataclass
class Head:
    """One call over the head, built where it is prepared and handed to engines, autograd functions and registered ops.

    hidden_ND, lm_head_weight_VD, bias_V or None, labels_NK (ids valid everywhere), the options, which gradients are
    needed, and two factors or None: raw logits are hidden W^T + left right^T.
    """

    hidden_ND: Tensor
    lm_head_weight_VD: Tensor
    bias_V: Tensor | None
    labels_NK: Tensor
    options: HeadOptions
    needs: Needs
    left_NR: Tensor | None = None
    right_VR: Tensor | None = None

    def __post_init__(self):
        self.n, self.d = self.hidden_ND.shape
        self.v = self.lm_head_weight_VD.shape[0]
        self.operand = self.hidden_ND.dtype
        self.factor = self.operand if self.left_NR is None else self.left_NR.dtype
        self.tile = tile_dtype(self.operand, self.options.precision)
        self.wide = torch.promote_types(self.operand, torch.float32)  # of sums
        self.kernels, self.label_kernels, self.gemm = kernels_of(self.options.backend)
        self.stores_exp = self._stores_exp()
        self.upcast = self.gemm.upcasts(self.hidden_ND, self.lm_head_weight_VD, self.tile)
        # Bytes of the label vectors that the label kernels gather at a time.
        device = self.hidden_ND.device
        self.gathered = self.label_kernels.gathered_bytes(self.options.budget, self.d, self.wide, device)

    @classmethod
    def of(cls, tensors, labels_NK: Tensor, options: HeadOptions, needs: Needs) -> "Head":
        """The call over tensors in the order of ``tensors``."""
        hidden_ND, lm_head_weight_VD, bias_V, left_NR, right_VR = tensors
        return cls(hidden_ND, lm_head_weight_VD, bias_V, labels_NK, options, needs, left_NR, right_VR)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Tensors that may have a gradient, in the order in which autograd functions take them."""
        return self.hidden_ND, self.lm_head_weight_VD, self.bias_V, self.left_NR, self.right_VR

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

    def new_tile(self, rows: int, columns: int) -> "TileStorage":
        return TileStorage(torch.empty(rows * _aligned(columns), dtype=self.tile, device=self.hidden_ND.device))

    def new_exp(self, rows: int, columns: int) -> "TileStorage":
        """As ``new_tile``, for ``row_exp``'s exponentials in the operands' dtype; rows end in zeros."""
        elements = torch.empty(rows * _aligned(columns), dtype=self.operand, device=self.hidden_ND.device)
        return TileStorage(elements)

    def new_cached(self, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """For ``columns`` of all rows; rows end in zeros. dtype: None: of exponentials where they are stored, else of
        logits.
        """
        dtype = dtype or (self.operand if self.stores_exp else self.tile)
        cached_NC = torch.empty(self.n, _aligned(columns), dtype=dtype, device=self.hidden_ND.device)
        cached_NC[:, columns:] = 0.0
        return cached_NC

    def upcast_rows(self, start: int, stop: int) -> Tensor:
        rows_nd = self.hidden_ND[start:stop]
        return rows_nd.to(self.tile) if self.upcast else rows_nd

    def of_rows(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Hidden states and left factor."""
        return self.hidden_ND[rows], None if self.left_NR is None else self.left_NR[rows]

    def bias_slice(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias_V is None else self.bias_V[start:stop]

    def row_stats(self, logits_nv: Tensor, rows: slice, stats: RowStats, v_start: int) -> None:
        bias_v = self.bias_slice(v_start, v_start + logits_nv.shape[1])
        self.kernels.row_stats(logits_nv, self.labels_NK[rows], stats, v_start, bias_v, self.options.transform)

    def row_exp(
        self,
        logits_nv: Tensor,
        rows: slice,
        stats: RowStats,
        v_start: int,
        out_nv: Tensor | None,
        earlier_nc: Tensor | None,
    ) -> None:
        """Statistics, and exponentials into out_nv; earlier_nc: those of the row's earlier slices (see the kernel)."""
        bias_v = self.bias_slice(v_start, v_start + logits_nv.shape[1])
        labels_nk, transform = self.labels_NK[rows], self.options.transform
        self.kernels.row_exp(logits_nv, labels_nk, stats, v_start, bias_v, transform, out_nv, earlier_nc)

    @property
    def ends_in_exp(self) -> bool:
        """Whether the backend's GEMM runs ``row_exp`` on its sums: no tile of logits is written."""
        options = self.options
        if options.argmax or options.label_smoothing or self.left_NR is not None or self.tile != torch.float32:
            return False
        return self.gemm.ends_in_exp(self.hidden_ND, self.lm_head_weight_VD)

    def product_exp(
        self, columns: slice, rows: slice, stats: RowStats, out_nv: Tensor | None, earlier_nc: Tensor | None
    ) -> None:
        """As ``row_exp``, where the GEMM ends in it."""
        bias_v = self.bias_slice(columns.start, columns.stop)
        operands = self.hidden_ND[rows], self.lm_head_weight_VD[columns], self.labels_NK[rows]
        self.gemm.product_exp(*operands, stats, columns.start, bias_v, self.options.transform, out_nv, earlier_nc)

    def _stores_exp(self) -> bool:
        """Whether stored exponentials support every gradient that is needed: one target a row, none of the entropy,
        none of a bias of more digits; label smoothing only with hidden's alone, and without a softcap. A call without
        gradients takes the same way, so that its log-probs have the same bits.
        """
        options = self.options
        if self.labels_NK.shape[1] != 1 or options.entropy or options.budget == 0:
            return False
        if self.needs.bias and self.bias_V.dtype != self.operand:
            return False
        if not self.kernels.stores_exp(self.hidden_ND.device, self.operand):
            return False
        return not options.label_smoothing or (self.needs.hidden_alone and options.transform.softcap is None)

    def row_grad(
        self,
        logits_nv: Tensor,
        rows: slice,
        norms_2n: Tensor,
        coefficients: RowCoefficients,
        v_start: int,
    ) -> Tensor:
        """The gradient in the raw logits, in place; in the operands' dtype, or the tile's where a bias learns: the
        columns' entries cancel, so they are summed before they are rounded.
        """
        bias_v = self.bias_slice(v_start, v_start + logits_nv.shape[1])
        labels_nk, transform = self.labels_NK[rows], self.options.transform
        dtype = self.tile if self.needs.bias else self.operand
        return self.kernels.row_grad(logits_nv, labels_nk, norms_2n, coefficients, v_start, bias_v, transform, dtype)

    def rounded(self, dlogits_nv: Tensor, dbias_v: Tensor | None) -> Tensor:
        """A gradient in the raw logits in the operands' dtype, its column sums added to dbias_v."""
        if dbias_v is not None:
            dbias_v += dlogits_nv.sum(0, dtype=torch.promote_types(dbias_v.dtype, dlogits_nv.dtype))
        dlogits_nv = dlogits_nv.to(self.operand)
        zero_row_ends(dlogits_nv)
        return dlogits_nv

    def coefficients(self, dlogp_NK, dlse_N=None, dentropy_N=None, entropy_N=None) -> RowCoefficients:
        return RowCoefficients.from_upstream(
            dlogp_NK, self.options.label_smoothing, self.v, dlse_N, dentropy_N, entropy_N
        )


@dataclass
class Gradients:
    """dhidden_ND and dweight_VD accumulate in the tile's precision (fp32 at least), the others in fp32; None where not
    needed.
    """

    dhidden_ND: Tensor | None = None
    dweight_VD: Tensor | None = None
    dbias_V: Tensor | None = None
    dleft_NR: Tensor | None = None
    dright_VR: Tensor | None = None

    def like(self, tensors) -> "Gradients":
        """Each in the dtype of its tensor; ``tensors``: ``Head.tensors``."""
        pairs = zip(self.tensors, tensors, strict=True)
        return Gradients(*[None if g is None else g.to(t.dtype) for g, t in pairs])

    def of_rows(self, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """dhidden and dleft of some rows."""
        return tuple([None if t is None else t[rows] for t in (self.dhidden_ND, self.dleft_NR)])

    def of_columns(self, columns: slice) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dW, dbias and dright of some vocabulary entries."""
        return tuple([None if t is None else t[columns] for t in (self.dweight_VD, self.dbias_V, self.dright_VR)])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of ``Head.tensors``."""
        return self.dhidden_ND, self.dweight_VD, self.dbias_V, self.dleft_NR, self.dright_VR
