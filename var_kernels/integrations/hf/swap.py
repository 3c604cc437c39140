"""Another forward, attribute or mode in place of a module's own, for the time of a block."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo

_ABSENT = object()


@contextmanager
def swapped(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
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
