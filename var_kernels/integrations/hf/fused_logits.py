"""Logits (B, T, V) that are never computed. A loss of the user's own runs on them as it stands, code and options alike.

Most losses read a few numbers of each row of logits: cross_entropy, log_softmax and gather, logsumexp. ``FusedLogits``
follows the rows through slices, views and masks, and computes these numbers from the hidden states at the moment they
are read, with the labels, weights and options given there. Every other operation raises ValueError with its name, so a
loss is either its own value or refused; nothing is guessed from a trial.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from var_kernels.integrations.hf.calibration import HeadParams
from var_kernels.integrations.hf.capture import tied
from var_kernels.ops import linear_logprob, linear_weighted_nll, vocab_parallel_logprob

_NEVER = -(2**62)  # an ignore_index that no label has
_GONE = (
    "fused_lm_head makes no logits (B, T, V) in a forward pass with labels; leave the labels out of the call, or call "
    "the model outside of the block, to have them. With transformers.Trainer use FusedLossMixin, whose evaluation "
    "gives compute_metrics the model's own logits"
)


def getter(name: str) -> Callable:
    return getattr(Tensor, name).__get__


_VALUES = {getter(name) for name in ("T", "mT", "H", "mH", "real", "imag")}


@dataclass
class Source:
    """The head's input and parameters in one forward pass; ``hidden`` is None once that is over."""

    name: str
    hidden: Tensor | None  # (B, T, D)
    params: HeadParams | None
    check: Callable[[tuple, torch.device], str | None]  # what is wrong with elementwise steps after the head, or None
    options: Mapping[str, Any]
    placeholder: Tensor | None = None
    hooked: bool = False  # a wrapper waits for the gradient of the head's output
    version: int = 0  # counts operations in place

    def __post_init__(self):
        if self.params is not None:
            self.shape = self.params.lm_head_weight.shape

    def close(self) -> None:
        self.hidden = self.params = self.placeholder = None

    def nll_sum(self, rows: Tensor, target: Tensor, unique: bool, weight: Tensor | None, divisor, smoothing: float):
        """sum of weight * -logp / divisor over targets other than -100."""
        if self._weight_group() is not None:
            nll = -self.logp(rows, target, unique, smoothing, ignore_index=-100)
            return ((nll if weight is None else nll * weight) / divisor).sum()
        hidden, labels, weight, options, _ = self._rows(rows, target, unique, -100, weight)
        options |= {"reduction": "mean", "num_items": divisor, "label_smoothing": smoothing}
        params = self.params
        loss = linear_weighted_nll(hidden, params.lm_head_weight, labels, weight, params.bias, **options)
        return self._tied(loss)

    def logp(self, rows, target, unique, smoothing=0.0, *, ignore_index=_NEVER, extra: str | None = None):
        """Log-probs of the targets, of their shape; with ``extra`` ("lse", "argmax") that of each row instead."""
        group = self._weight_group()
        hidden, labels, _, options, at = self._rows(rows, target, unique, ignore_index, None)
        if group is not None:
            if smoothing or extra:
                raise ValueError(
                    f"{self.name}: its own loss must read log-probs of labels alone where the head is sharded over "
                    f"ranks, got {extra or 'smoothed labels'}; leave lm_head out of the tensor-parallel plan"
                )
            options["process_group"] = group
        else:
            options["label_smoothing"] = smoothing
            if extra:
                options[f"return_{extra}"] = True
        params, op = self.params, linear_logprob if group is None else vocab_parallel_logprob
        found: Any = op(hidden, params.lm_head_weight, labels, params.bias, ignore_index=ignore_index, **options)
        found = self._tied(found[1] if extra else found)
        return found[at].view(target.shape)

    def _rows(self, rows: Tensor, target: Tensor, unique: bool, ignore_index: int, weight: Tensor | None):
        """(hidden, labels, weight, options, index of ``rows``): a row for each of the head's, or for each of these."""
        hidden, flat, params = self.hidden.flatten(0, -2), rows.flatten(), self.params
        options = {**params.logit_options, **self.options}
        low_rank = options.pop("low_rank", None)
        target = target.flatten().to(hidden.device, torch.int64)
        weight = None if weight is None else weight.flatten().to(hidden.device)
        # Rows that were sliced away are ignored, or not copied where nothing is.
        scattered = unique and (ignore_index != _NEVER or flat.numel() == len(hidden))
        if scattered:
            labels = torch.full((len(hidden),), ignore_index, device=hidden.device).index_put((flat,), target)
            if weight is not None:
                weight = weight.new_zeros(len(hidden)).index_put((flat,), weight)
        else:
            hidden, labels = hidden[flat], target
        if low_rank is not None:
            left = low_rank[0].flatten(0, -2)
            options["low_rank"] = (left if scattered else left[flat], low_rank[1])
        return hidden, labels, weight, options, flat if scattered else slice(None)

    def _weight_group(self):
        weight = self.params.lm_head_weight
        resident = weight.shape == self.shape
        if weight.device.type != "meta":
            resident &= weight.untyped_storage().size() >= weight.numel() * weight.element_size()
        if not resident:
            raise ValueError(
                f"{self.name}: its own loss must read logits while the sharded lm_head weight is in memory, got a "
                "weight that is freed already; shard the head with the model's root (no unit of its own), or use the "
                "model's own loss"
            )
        return self.params.group

    def _tied(self, value: Tensor) -> Tensor:
        return tied([value], self.placeholder)[0] if self.hooked else value


@dataclass(frozen=True)
class View:
    """The rows of the head's output that a tensor stands for, and the operations on their values so far."""

    source: Source
    rows: Tensor  # int64, the shape of the logits without their vocabulary axis
    axis: int
    width: int
    dtype: torch.dtype
    device: torch.device
    kind: str = "logits"  # "logp", "p": after log_softmax, softmax
    factor: float = 1.0  # of log-probs
    unique: bool = True  # no row comes twice
    detached: bool = False
    steps: tuple = ()  # elementwise functions of logits since the head
    version: int = 0  # of the source when they were made

    @property
    def means(self) -> tuple:
        """All but the rows."""
        return self.axis, self.width, self.kind, self.factor, self.detached, self.version, self.steps

    @property
    def shape(self) -> torch.Size:
        sizes = list(self.rows.shape)
        return torch.Size([*sizes[: self.axis], self.width, *sizes[self.axis :]])


class FusedLogits(Tensor):
    """See the module. After the forward pass any use of its values raises ValueError with the remedy."""

    # torch's functions on them: logits_functions fills it
    handlers: ClassVar[dict[Callable, Callable]] = {}
    view_: View  # named so that no attribute of Tensor is hidden
    base_: Tensor
    grad_fn_: Any

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        handler = cls.handlers.get(func)
        if handler is None:
            first = next((a for a in leaves((*args, *kwargs.values())) if isinstance(a, FusedLogits)), None)
            if getattr(func, "__name__", "") == "__get__" and func not in _VALUES:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            refuse(first, name_of(func))
        return handler(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        refuse(self, "pickle or copy.deepcopy")


def open_logits(placeholder: Tensor, source: Source, vocab: int, dtype: torch.dtype) -> FusedLogits:
    """(B, T, V) in place of the head's output."""
    source.placeholder = placeholder
    lead = source.hidden.shape[:-1]
    rows = torch.arange(math.prod(lead), device=source.hidden.device).view(lead)
    return make(View(source, rows, len(lead), vocab, dtype, source.hidden.device), placeholder)


def no_logits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> FusedLogits:
    """(B, T, V) in an output whose loss is done: metadata, and an error that says where to find logits."""
    rows = torch.empty(shape[:-1], dtype=torch.int64, device="meta")
    source = Source("", None, None, lambda *_: None, {})
    return make(
        View(source, rows, len(shape) - 1, shape[-1], dtype, device), torch.empty(0, dtype=dtype, device=device)
    )


def make(view: View, base: Tensor) -> FusedLogits:
    with torch._C.DisableTorchFunctionSubclass():
        made: Any = base.as_subclass(FusedLogits)
        made.grad_fn_ = made.grad_fn
    made.view_ = view
    made.base_ = base
    return made


def as_view(logits: FusedLogits, **changes: Any) -> FusedLogits:
    check_history(logits)
    return make(replace(logits.view_, **changes), logits.base_)


def check_history(logits: FusedLogits) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        changed = logits.grad_fn is not logits.grad_fn_
    if changed and logits.view_.source.hidden is not None:
        refuse(logits, "a torch.autograd.Function", ", whose gradient would be lost")


def refuse(logits: FusedLogits | None, operation: str, reason: str = "") -> NoReturn:
    source = None if logits is None else logits.view_.source
    if source is None or source.hidden is None:
        raise ValueError(f"logits: {operation} needs their values, got logits that do not exist; {_GONE}")
    raise ValueError(
        f"{source.name}: its own loss must read its logits by cross_entropy, by gather of log_softmax or by logsumexp, "
        f"got {operation}{reason}; write it so, or leave fused_lm_head out for this model"
    )


def name_of(func: Callable) -> str:
    owner = getattr(func, "__self__", None)
    if getattr(func, "__name__", "") == "__get__" and owner is not None:
        return f"Tensor.{getattr(owner, '__name__', owner)}"
    return torch.overrides.resolve_name(func) or getattr(func, "__name__", str(func))


def leaves(values):
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from leaves(value)
        else:
            yield value
