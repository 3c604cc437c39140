"""A module's forward: whose code it is, another one in its place for a block, and what a head returns there."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

_LIBRARIES = frozenset(("transformers", "torch", "accelerate", "peft", "deepspeed", "var_kernels"))
_ABSENT = object()


def known_arguments(inner: nn.Module) -> set[str]:
    """Names of the arguments of its class's forward and those that this one extends: a forward that someone wrapped,
    in a subclass or on the instance, may name none.
    """
    forwards = [vars(cls)["forward"] for cls in type(inner).__mro__ if "forward" in vars(cls) and cls is not nn.Module]
    return {name for forward in forwards for name in inspect.signature(forward).parameters}


def of_a_library(function: Any) -> bool:
    """Return whether a function and all wrappers around it are a library's code."""
    while function is not None:
        layer, names = _layer(function)
        called = [names[n] for n in getattr(layer, "__code__", _layer.__code__).co_names if n in names]
        homes = [home_of(function), *(_root(c.__globals__["__name__"]) for c in called if hasattr(c, "__globals__"))]
        if not _LIBRARIES.issuperset(homes):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def home_of(function: Any) -> str:
    """The package whose code the outermost layer of a function is."""
    layer, names = _layer(function)
    return _root(names.get("__name__", type(layer).__module__))


def _layer(function: Any) -> tuple[Any, dict[str, Any]]:
    """(the function under a partial or a bound method, its globals)."""
    layer = function.func if isinstance(function, functools.partial) else getattr(function, "__func__", function)
    return layer, getattr(layer, "__globals__", {})


def _root(module: str) -> str:
    return module.partition(".")[0]


def own_forward(head: nn.Module) -> Callable | None:
    """The function that replaces nn.Linear's forward, in the class or on the instance; None where none does, or where
    a library put its own around it (tensor parallelism, offloading), which the head's trial shows.
    """
    hooked = hasattr(head, "_hf_hook") and hasattr(head, "_old_forward")  # accelerate's, which calls the old one
    forward = head._old_forward if hooked else vars(head).get("forward")
    if forward is None or (of_a_library(forward) and home_of(forward) != "torch"):
        forward = type(head).forward
    if getattr(forward, "__self__", head) is head:
        forward = getattr(forward, "__func__", forward)
    return None if forward is nn.Linear.forward else forward


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name = value`` inside the block; afterwards the instance attribute that was there before, or none."""
    before = owner.__dict__.get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside the block, without a call of ``eval``, which a model may have overridden;
    afterwards each in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def swapped_head(head: nn.Linear, forward: Callable[[Tensor], Any]) -> Iterator[None]:
    """``head(hidden)`` runs ``forward(hidden)`` inside the block, between whatever hooks the head carries."""
    mine = object()
    if head.__dict__.setdefault("_var_kernels_busy", mine) is not mine:  # one step: threads may race
        raise RuntimeError(
            "this lm_head is captured already: a loss run inside the head must not call the model again, nor two "
            "threads (nn.DataParallel's among them) take losses of one model at a time; use DistributedDataParallel"
        )
    try:
        with swapped_forward(head, forward):
            yield
    finally:
        del head._var_kernels_busy


# Runs eagerly in a compiled model, and so does what it puts in place: a swap is nothing that a graph can hold.
@_disable_dynamo
def swapped_forward(module: nn.Module, forward: Callable):
    """``module(...)`` runs ``forward`` inside the block, between whatever hooks the module carries; in other threads,
    which may generate meanwhile, it runs as ever.
    """
    # accelerate's device_map hooks replace .forward and bring the weight to its device before they call _old_forward.
    name = "_old_forward" if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward") else "forward"
    plain, thread = getattr(module, name), threading.get_ident()

    @_disable_dynamo
    def here(*args, **kwargs):
        if not args and "input" in kwargs:  # nn.Linear's own name of it
            args = (kwargs.pop("input"),)
        return (forward if threading.get_ident() == thread else plain)(*args, **kwargs)

    return swapped(module, name, here)


def placeholder(hidden: Tensor, *results: Tensor, vocab: int | None = None, value: float = 0.0) -> Tensor:
    """Make the tensor that a head returns in place of (B, T, V) logits: (B, T, 1), or (B, T, vocab) on the meta device,
    which takes no memory."""
    width, device = (1, hidden.device) if vocab is None else (vocab, torch.device("meta"))
    return Placeholder.apply((*hidden.shape[:-1], width), value, hidden.dtype, device, *results)


class Placeholder(torch.autograd.Function):
    """One value in place of logits. The results are its ancestors in the graph and get a gradient of zero from it."""

    @staticmethod
    def forward(ctx, shape, value, dtype, device, *results):
        ctx.like = [(r.shape, r.dtype, r.device) for r in results]
        return torch.full(shape, value, dtype=dtype, device=device)

    @staticmethod
    def backward(ctx, _grad):
        return None, None, None, None, *zeros(ctx.like)


def zeros(like):
    return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in like)
