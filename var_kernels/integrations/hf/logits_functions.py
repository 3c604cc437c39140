"""torch's functions on ``FusedLogits``: metadata, views, elementwise steps, and what reads numbers of the rows.

Logits are opened through here, so that they have them.
"""

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import TracingContext

from var_kernels.integrations.hf.forwards import of_a_library
from var_kernels.integrations.hf.fused_logits import (
    FusedLogits,
    Source,
    View,
    as_view,
    check_history,
    getter,
    leaves,
    make,
    name_of,
    no_logits,
    open_logits,
    refuse,
)

__all__ = ["Source", "no_logits", "open_logits"]

# ---- metadata and conversions ----------------------------------------------------------------------------------------


def _size(logits, dim=None):
    return logits.view_.shape if dim is None else logits.view_.shape[dim]


def _same(logits, *_args, **_kwargs):
    return logits


def _detach(logits):
    return as_view(logits, detached=True)


def _to(logits, *args, **kwargs):
    like = next((a for a in (*args, kwargs.get("other")) if isinstance(a, Tensor)), None)
    if like is not None:
        return as_view(logits, dtype=like.dtype, device=like.device)
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    changed = replace(logits.view_, dtype=dtype or logits.view_.dtype, device=device or logits.view_.device)
    same = (changed.dtype, changed.device) == (logits.view_.dtype, logits.view_.device)
    return logits if same else make(changed, logits.base_)


def _cast(dtype, logits, **_kwargs):
    return logits if logits.view_.dtype == dtype else as_view(logits, dtype=dtype)


def _cpu(logits, *_args, **_kwargs):
    _open(logits, "Tensor.cpu")
    return as_view(logits, device=torch.device("cpu"))


def _register_hook(logits, hook):
    """Register a library's hook, which waits for the gradient of the head's output and does not change it."""
    if not of_a_library(hook):
        refuse(logits, "Tensor.register_hook")
    logits.view_.source.hooked = True
    return logits.base_.register_hook(hook)


def _requires_grad(logits):
    with torch._C.DisableTorchFunctionSubclass():
        return getter("requires_grad")(logits) and not logits.view_.detached


def _text(logits, *_args, **_kwargs):
    view = logits.view_
    return f"FusedLogits(shape={tuple(view.shape)}, dtype={view.dtype}, values never computed)"


def _open(logits, operation: str) -> View:
    if logits.view_.source.hidden is None:
        refuse(logits, operation)
    return logits.view_


# ---- views -----------------------------------------------------------------------------------------------------------


def _viewed(func, logits, *args, **kwargs):
    """A view of the logits: made of their rows, and of a mark that shows where the vocabulary axis goes."""
    view = _open(logits, name_of(func))
    sizes = view.shape
    strides = [0] * len(sizes)
    strides[view.axis] = 1
    mark = torch.empty(view.width, dtype=torch.bool, device="meta").as_strided(sizes, strides)
    spread = view.rows.unsqueeze(view.axis).expand(sizes)
    marks, pieces = func(mark, *args, **kwargs), func(spread, *args, **kwargs)
    if isinstance(marks, Tensor):
        return _piece(logits, marks, pieces, func)
    return tuple(_piece(logits, m, p, func) for m, p in zip(marks, pieces, strict=True))


def _piece(logits, mark: Tensor, rows: Tensor, func) -> FusedLogits:
    axes = [i for i, stride in enumerate(mark.stride()) if stride == 1]
    if len(axes) != 1 or mark.storage_offset() != 0:
        refuse(logits, name_of(func), " of single ids")
    axis, width, steps = axes[0], mark.shape[axes[0]], logits.view_.steps
    if width != logits.view_.width:
        if logits.view_.kind != "logits":
            refuse(logits, name_of(func), " of a part of the vocabulary's log-probs")
        steps = (*steps, lambda x: x[..., :width])
    return as_view(logits, rows=rows.select(axis, 0), axis=axis, width=width, steps=steps)


def _reshaped(logits, sizes, operation: str):
    view = _open(logits, operation)
    sizes, numel = list(sizes), math.prod(view.shape)
    if -1 in sizes:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = numel // known if known else 0
    if view.axis != view.rows.dim() or not sizes or sizes[-1] != view.width or math.prod(sizes) != numel:
        if torch.Size(sizes) == view.shape:
            return logits
        refuse(logits, operation, f" of {tuple(view.shape)} to {tuple(sizes)}")
    return as_view(logits, rows=view.rows.reshape(sizes[:-1]), axis=len(sizes) - 1)


def _reshape(logits, *sizes, **kwargs):
    sizes = kwargs.get("shape", kwargs.get("size", sizes))
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):
        refuse(logits, "Tensor.view(dtype)")
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    return _reshaped(logits, [int(s) for s in sizes], "reshape")


def _reshape_as(logits, other):
    if logits.view_.source.hidden is None and other.shape == logits.view_.shape:
        return logits  # torch.autograd.Function does so to what passes through it (DDP)
    return _reshaped(logits, other.shape, "reshape_as")


def _flatten(logits, start_dim=0, end_dim=-1):
    shape = _open(logits, "flatten").shape
    start, end = start_dim % len(shape), end_dim % len(shape)
    return _reshaped(logits, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]], "flatten")


def _unflatten(logits, dim, sizes):
    shape = _open(logits, "unflatten").shape
    dim %= len(shape)
    sizes = [shape[dim] // -math.prod(sizes) if s == -1 else s for s in sizes]
    return _reshaped(logits, [*shape[:dim], *sizes, *shape[dim + 1 :]], "unflatten")


def _getitem(logits, key):
    view = _open(logits, "indexing")
    key = key if isinstance(key, tuple) else (key,)
    key = tuple(torch.as_tensor(k, device=view.rows.device) if isinstance(k, list) else k for k in key)
    tensors = [k for k in key if isinstance(k, Tensor)]
    if not tensors:
        return _viewed(Tensor.__getitem__, logits, key)
    ndim = len(view.shape)
    fill = (slice(None),) * (ndim - sum(map(_consumes, key)))
    at = next((i for i, k in enumerate(key) if k is Ellipsis), len(key))
    key = (*key[:at], *fill, *key[at + 1 :])
    if view.axis != ndim - 1:
        refuse(logits, "indexing", " by a tensor where the vocabulary is not the last axis")
    last = key[-1]
    if isinstance(last, slice) and last in (slice(None), slice(0, view.width), slice(None, view.width)):
        key = tuple(k.to(view.rows.device) if isinstance(k, Tensor) else k for k in key[:-1])
        unique = view.unique and all(k.dtype == torch.bool for k in key if isinstance(k, Tensor))
        rows = view.rows[key]
        return as_view(logits, rows=rows, axis=rows.dim(), unique=unique)
    ints = all(isinstance(k, Tensor) and not k.is_floating_point() and k.dtype != torch.bool for k in key)
    if not ints:
        refuse(logits, "indexing", " of single ids by a mask or a slice of rows")
    *lead, target = torch.broadcast_tensors(*(k.to(view.rows.device) for k in key))
    return _values(as_view(logits, rows=view.rows[tuple(lead)], axis=target.dim(), unique=False), target, "indexing")


def _consumes(key) -> int:
    if key is None or key is Ellipsis:
        return 0
    return key.dim() if isinstance(key, Tensor) and key.dtype == torch.bool else 1


def _index_select(logits, dim, index):
    view = _open(logits, "index_select")
    dim %= len(view.shape)
    if dim == view.axis:
        refuse(logits, "index_select", " of single ids")
    at = dim if dim < view.axis else dim - 1
    return as_view(logits, rows=view.rows.index_select(at, index.to(view.rows.device)), unique=False)


def _cat(tensors, dim=0, **_kwargs):
    first = next(t for t in tensors if isinstance(t, FusedLogits))
    view = _open(first, "torch.cat")
    others = [t.view_ for t in tensors if isinstance(t, FusedLogits)]
    dim %= len(view.shape)
    alike = len(others) == len(tensors) and all(o.source is view.source and o.means == view.means for o in others)
    if not alike or dim == view.axis:
        refuse(first, "torch.cat", " with other tensors")
    at = dim if dim < view.axis else dim - 1
    return as_view(first, rows=torch.cat([o.rows for o in others], at), unique=False)


def _iter(logits):
    return iter(_viewed(torch.unbind, logits))


# ---- elementwise -----------------------------------------------------------------------------------------------------


def _step(func, *args, **kwargs):
    """scale, softcap, bias ...: kept, and compared with what the model does to its logits once they are read."""
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, FusedLogits)]
    logits, name = given[0], name_of(func)
    view = _open(logits, name)
    others = [a for a in leaves((*args, *kwargs.values())) if isinstance(a, Tensor) and not isinstance(a, FusedLogits)]
    for other in others:
        alike = other.numel() == 1 and not other.requires_grad
        alike |= other.dim() > 0 and other.numel() == other.shape[-1] == view.width and view.axis == view.rows.dim()
        if not alike:
            refuse(logits, name, " with a tensor for each row, or with a number that it learns")
    if len(given) > 1:
        refuse(logits, name, " of logits with logits")
    if view.kind != "logits":
        return _scaled(func, logits, *args, **kwargs)

    def step(x: Tensor) -> Tensor:
        put = [x if isinstance(a, FusedLogits) else a.to(x.device) if isinstance(a, Tensor) else a for a in args]
        named = {k: x if isinstance(a, FusedLogits) else a for k, a in kwargs.items()}
        result = func(*put, **named)
        return x if result is None else result

    changed = as_view(logits, steps=(*view.steps, step))
    return _written(logits, changed.view_) if func in _IN_PLACE else changed


def _written(logits, view: View):
    """Record an in-place write: other tensors of these logits may share their memory, so reading them raises."""
    view.source.version += 1
    logits.view_ = replace(view, version=view.source.version)
    return logits


def _scaled(func, logits, *args, **kwargs):
    """Log-probs times a number, or negated."""
    factors = [func(*[x if isinstance(a, FusedLogits) else a for a in args], **kwargs) for x in (_ONE, 2 * _ONE)]
    if func in _IN_PLACE or logits.view_.kind != "logp" or factors[1] != 2 * factors[0]:
        refuse(logits, name_of(func), " of probabilities")
    return as_view(logits, factor=logits.view_.factor * factors[0].item())


_ONE = torch.ones((), dtype=torch.float64, device="cpu")


def _setitem(logits, key, value):
    keys = key if isinstance(key, tuple) else (key,)
    lead = keys[:-1]
    view = _open(logits, "assignment")
    whole = all(not isinstance(k, Tensor) and (k is Ellipsis or k == slice(None)) for k in lead)
    full = any(k is Ellipsis for k in keys) or len(keys) == len(view.shape)
    if not (full and whole and view.axis == view.rows.dim()) or (isinstance(value, Tensor) and value.numel() > 1):
        refuse(logits, "assignment", " to some rows")

    def step(x):
        x = x.clone()
        x[..., keys[-1]] = value
        return x

    _written(logits, replace(view, steps=(*view.steps, step)))


# ---- reads -----------------------------------------------------------------------------------------------------------


def _read(logits, name: str) -> View:
    view = _open(logits, name)
    if view.version != view.source.version:
        refuse(logits, name, " after another view of its logits was written to")
    check_history(logits)
    wrong = view.source.check(view.steps, view.source.hidden.device)
    if wrong:
        refuse(logits, name, f" of other logits than the model's own: {wrong}")
    return view


def _quietly(view: View):
    return torch.set_grad_enabled(torch.is_grad_enabled() and not view.detached)


def _softmax_kind(kind, logits, dim=None, *_args, dtype=None, **_kwargs):
    view = _read(logits, kind)
    if dim is None or dim % len(view.shape) != view.axis or view.kind != "logits":
        refuse(logits, {"logp": "log_softmax", "p": "softmax"}[kind], " over another axis than the vocabulary")
    return as_view(logits, kind=kind, dtype=dtype or view.dtype)


def _change_kind(func, before, after, logits):
    view = _open(logits, name_of(func))
    if view.kind != before or view.factor != 1.0:
        refuse(logits, name_of(func))
    return as_view(logits, kind=after)


def _values(logits, target: Tensor, name: str) -> Tensor:
    """Values at the ids ``target``, each in the row of the same place; rows have target's shape."""
    view = _read(logits, name)
    rows = view.rows.expand(target.shape)
    target = target.to(rows.device)
    with _quietly(view):
        logp = view.source.logp(rows, target, view.unique)
        if view.kind == "logits":
            value = logp + view.source.logp(rows, target, view.unique, extra="lse")
        else:
            value = logp.exp() if view.kind == "p" else view.factor * logp
    return value.to(view.device)


def _gather(logits, dim, index, **_kwargs):
    view = _read(logits, "gather")
    if dim % len(view.shape) != view.axis or index.dim() != len(view.shape):
        refuse(logits, "gather", " over another axis than the vocabulary")
    lead = [*index.shape[: view.axis], *index.shape[view.axis + 1 :]]
    rows = view.rows[tuple(slice(0, n) for n in lead)].unsqueeze(view.axis).expand(index.shape)
    unique = view.unique and index.shape[view.axis] == 1
    return _values(as_view(logits, rows=rows, unique=unique), index, "gather")


def _take_along_dim(logits, indices, dim=None, **_kwargs):
    view = _read(logits, "take_along_dim")
    if dim is None or indices.dim() != len(view.shape):
        refuse(logits, "take_along_dim", " of flattened logits")
    sizes = list(view.shape)
    sizes[dim % len(sizes)] = indices.shape[dim]
    return _gather(logits, dim, indices.expand(sizes))


def _row_number(extra, logits, dim=None, keepdim=False):
    view = _read(logits, {"lse": "logsumexp", "argmax": "argmax"}[extra])
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    wanted = "logits" if extra == "lse" else view.kind
    if len(dims) != 1 or dims[0] is None or dims[0] % len(view.shape) != view.axis or view.kind != wanted:
        refuse(logits, extra, " over another axis than the vocabulary")
    with _quietly(view):
        value = view.source.logp(view.rows, torch.zeros_like(view.rows), view.unique, extra=extra)
    value = value.to(view.device)
    return value.unsqueeze(view.axis) if keepdim else value


def _nll(
    name,
    logits,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """cross_entropy of logits or their log_softmax, or nll_loss of the latter."""
    view = _read(logits, name) if isinstance(logits, FusedLogits) else refuse(target, name, " as targets")
    if name == "nll_loss" and view.kind != "logp":
        refuse(logits, name, " of what is no log_softmax")
    if name == "cross_entropy" and (view.kind == "p" or (view.kind == "logp" and view.factor != 1.0)):
        refuse(logits, name, " of probabilities")
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if target.is_floating_point() or isinstance(target, FusedLogits):
        refuse(logits, name, " with probabilities as targets")
    if view.axis != min(1, view.rows.dim()) or target.shape != view.rows.shape:
        refuse(logits, name, f" of logits {tuple(view.shape)} with targets {tuple(target.shape)}")
    if weight is not None and (label_smoothing or weight.requires_grad or len(weight) != view.width):
        refuse(logits, name, " with class weights and label_smoothing, or class weights that it learns")
    rows, target = view.rows, target.to(view.rows.device, torch.int64)
    counted = target != ignore_index
    target = target.masked_fill(~counted, 0)
    known = torch.where(counted, target, -100)
    # What is no id and not ignored must not count as ignored: the ops name it.
    known = torch.where(counted & (target == -100), -1, known)
    factor = None
    if weight is not None:
        factor = weight.detach().to(rows.device, torch.float32)[target].where(counted, 0.0)
    with _quietly(view):
        if reduction == "none":
            loss = -view.source.logp(rows, known, view.unique, label_smoothing, ignore_index=-100)
            return view.factor * (loss if factor is None else loss * factor).to(view.device)
        total = 1.0
        if reduction == "mean":
            total = counted.sum() if factor is None else factor.sum()
            empty = total == 0
            total = total.masked_fill(empty, 1)
        loss = view.source.nll_sum(rows, known, view.unique, factor, total, label_smoothing)
        if reduction == "mean":
            loss = loss.masked_fill(empty, math.nan)  # as torch: 0 / 0, with gradients of 0
    return view.factor * loss.to(view.device)


def _of(names: str, handler) -> dict:
    """The handler for the functions of these names, of torch and of Tensor."""
    owners = [(owner, name) for name in names.split() for owner in (torch, Tensor)]
    return {getattr(owner, name): handler for owner, name in owners if hasattr(owner, name)}


_VIEWS = (
    *("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "squeeze", "unsqueeze", "narrow"),
    *("select", "split", "chunk", "tensor_split", "unbind"),
)
FusedLogits.handlers |= {
    getter("shape"): _size,
    getter("dtype"): lambda logits: logits.view_.dtype,
    getter("device"): lambda logits: logits.view_.device,
    getter("ndim"): lambda logits: len(logits.view_.shape),
    getter("requires_grad"): _requires_grad,
    getter("data"): _detach,
    # A kind of tensor that Dynamo leaves to eager mode, between two graphs.
    getter("is_nested"): lambda logits: TracingContext.try_get() is not None,
    **_of("size", _size),
    **_of("dim ndimension", lambda logits: len(logits.view_.shape)),
    **_of("__len__", lambda logits: logits.view_.shape[0]),
    **_of("numel nelement", lambda logits: math.prod(logits.view_.shape)),
    **_of("is_floating_point", lambda logits: True),
    **_of("is_complex", lambda logits: False),
    **_of("is_contiguous", lambda logits, **_: True),
    **_of("get_device", lambda logits: -1 if logits.view_.device.type == "cpu" else logits.view_.device.index),
    Tensor.__hash__: id,
    Tensor.__repr__: _text,
    Tensor.__format__: _text,
    **_of("detach", _detach),
    **_of("to type_as", _to),
    Tensor.float: partial(_cast, torch.float32),
    Tensor.double: partial(_cast, torch.float64),
    Tensor.half: partial(_cast, torch.float16),
    Tensor.bfloat16: partial(_cast, torch.bfloat16),
    Tensor.cpu: _cpu,
    **_of("contiguous clone requires_grad_", _same),
    Tensor.register_hook: _register_hook,
    **{f: partial(_viewed, f) for name in _VIEWS for f in (getattr(torch, name), getattr(Tensor, name))},
    **_of("reshape view", _reshape),
    **_of("view_as reshape_as", _reshape_as),
    **_of("flatten", _flatten),
    **_of("unflatten", _unflatten),
    Tensor.__getitem__: _getitem,
    Tensor.__setitem__: _setitem,
    Tensor.__iter__: _iter,
    **_of("index_select", _index_select),
    **_of("cat concat", _cat),
    F.log_softmax: lambda logits, dim=None, _stacklevel=3, dtype=None: _softmax_kind("logp", logits, dim, dtype=dtype),
    F.softmax: lambda logits, dim=None, _stacklevel=3, dtype=None: _softmax_kind("p", logits, dim, dtype=dtype),
    **{f: partial(_softmax_kind, "logp") for f in (torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax)},
    **{f: partial(_softmax_kind, "p") for f in (torch.softmax, Tensor.softmax, torch.special.softmax)},
    **{f: partial(_change_kind, f, "p", "logp") for f in (torch.log, Tensor.log)},
    **{f: partial(_change_kind, f, "logp", "p") for f in (torch.exp, Tensor.exp)},
    **_of("gather", _gather),
    **_of("take_along_dim", _take_along_dim),
    **{f: partial(_row_number, "lse") for f in (torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp)},
    **_of("argmax", partial(_row_number, "argmax")),
    F.cross_entropy: partial(_nll, "cross_entropy"),
    F.nll_loss: partial(_nll, "nll_loss"),
}
_ELEMENTWISE = ("mul", "multiply", "div", "divide", "true_divide", "add", "sub", "subtract", "neg", "tanh", "clamp")
_OPERATORS = ("__mul__", "__rmul__", "__truediv__", "__add__", "__radd__", "__sub__", "__rsub__", "__neg__")
_IN_PLACE = {getattr(Tensor, f"{name}_") for name in _ELEMENTWISE}
_IN_PLACE |= {
    getattr(Tensor, name)
    for name in ("__imul__", "__itruediv__", "__iadd__", "__isub__", "__idiv__")
    if hasattr(Tensor, name)
}
_IN_PLACE |= {Tensor.masked_fill_, Tensor.index_fill_}
_STEPS = {getattr(owner, name) for name in _ELEMENTWISE for owner in (torch, Tensor)} | _IN_PLACE
_STEPS |= {getattr(Tensor, name) for name in _OPERATORS}
_STEPS |= {torch.masked_fill, Tensor.masked_fill, torch.index_fill, Tensor.index_fill, torch.rsub}
FusedLogits.handlers |= {func: partial(_step, func) for func in _STEPS if func not in FusedLogits.handlers}
