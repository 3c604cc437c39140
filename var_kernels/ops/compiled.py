"""The primitives as ``torch.library`` ops, for torch.compile: opaque to the compiler, shapes and gradients registered.

Under the compiler an autograd.Function is traced through, so the public functions take this way when they are being
compiled. Engines, backend, budget and what is cached are chosen where the call is prepared and become arguments of the
op: what it returns follows from them and from shapes. Rows that do not count are masked, not left out: their
number would have to be read from the device. Each op is declared beside its autograd.Function.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from var_kernels.kernels.rows import LogitTransform
from var_kernels.ops.head import Head, HeadOptions, Needs

# One for all ops: lists, which ``_packed`` and ``_unpacked`` write and read.
_SCHEMA = "(Tensor[] tensors, bool[] given, float[] numbers, SymInt[] sizes, bool[] flags, str[] words) -> Tensor[]"


Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class OpCall:
    """What a registered op is called with: the five of ``Head.tensors`` and others of the op's own; the head's
    options; numbers (z_loss, alpha, ...), sizes, flags and words of the op's own.
    """

    tensors: list[Tensor | None]
    options: HeadOptions
    needs: Needs
    numbers: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    flags: list[bool] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def head(self, labels_NK: Tensor) -> Head:
        return Head.of(self.tensors[:5], labels_NK, self.options, self.needs)


def packed_transform(transform: LogitTransform) -> list[float]:
    return [transform.logit_scale, transform.softcap or 0.0, transform.temperature]


def unpacked_transform(numbers: list[float]) -> LogitTransform:
    logit_scale, softcap, temperature = numbers
    return LogitTransform(logit_scale, softcap or None, temperature)


def _packed(call: OpCall):
    options = call.options
    return (
        [t for t in call.tensors if t is not None],
        [t is not None for t in call.tensors],
        [*packed_transform(options.transform), options.label_smoothing, *call.numbers],
        [options.budget, *call.sizes],
        [*call.needs.flags, options.lse, options.entropy, options.argmax, *call.flags],
        [options.precision, options.backend, *call.words],
    )


def _unpacked(tensors, given, numbers, sizes, flags, words) -> OpCall:
    present = iter(tensors)
    precision, backend, *words = words
    budget, *sizes = sizes
    transform = unpacked_transform(numbers[:3])
    options = HeadOptions(transform, numbers[3], precision, budget, backend, *flags[5:8])
    tensors = [next(present) if there else None for there in given]
    return OpCall(tensors, options, Needs(*flags[:5]), list(numbers[4:]), sizes, list(flags[8:]), words)


def registered(
    name: str,
    run: Callable[[OpCall], list[Tensor | None]],
    shapes: Callable[[OpCall], list[Tensor | None]],
    gradients: Callable[[OpCall, tuple[Tensor, ...], list[Tensor | None]], list[Tensor]] | None = None,
) -> Callable[[OpCall], list[Tensor]]:
    """The op ``var_kernels::name``, whose outputs are ``run(call)``, contiguous, an empty tensor for None.

    shapes(call): tensors like the outputs, for a call without values. gradients(call, outputs, upstream): of
    call.tensors, as many as may have one, by operations that can be traced (another op of this kind, for one); those of
    the five that are not needed are dropped.
    """

    def outputs_of(function):
        def outputs(*arguments) -> list[Tensor]:
            like = arguments[0][0]
            return [like.new_empty(0) if t is None else t for t in function(_unpacked(*arguments))]

        return outputs

    op = torch.library.custom_op(f"var_kernels::{name}", outputs_of(run), mutates_args=(), schema=_SCHEMA)
    op.register_fake(outputs_of(shapes))

    def keep(ctx, inputs, output):
        tensors, *ctx.others = inputs
        ctx.set_materialize_grads(False)
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors, *output)

    def backward(ctx, upstream):
        saved, found = ctx.saved_tensors, []
        call = _unpacked(saved[: ctx.count], *ctx.others)
        if any(g is not None for g in upstream):
            found = gradients(call, saved[ctx.count :], upstream)
        found = [*found, *[None] * (len(call.tensors) - len(found))]
        wanted = [*call.needs.flags, *[True] * (len(found) - 5)]
        found = [g if want else None for g, want in zip(found, wanted, strict=True)]
        return [g for g, t in zip(found, call.tensors, strict=True) if t is not None], *(None,) * 5

    if gradients is not None:
        op.register_autograd(backward, setup_context=keep)
    return lambda call: op(*_packed(call))


def gradient_shapes(call: OpCall) -> list[Tensor | None]:
    """Of what ``Gradients.tensors`` holds, in the operands' dtypes."""
    return [
        t.new_empty(t.shape) if needed else None for t, needed in zip(call.tensors[:5], call.needs.flags, strict=True)
    ]


def of_finished(gradients: list[Tensor], dloss: Tensor) -> list[Tensor]:
    """Gradients that the forward made, times the scalar upstream gradient."""
    return [(g * dloss).to(g.dtype) for g in gradients]


def outside_of_graphs(reason: str) -> Callable[[Function], Function]:
    """A function that runs eagerly in a compiled one, after a graph break; fullgraph=True is refused by it."""

    def decorated(fn):
        eager = _disable_dynamo(fn)

        @functools.wraps(fn)
        def call(*args, **kwargs):
            if not torch.compiler.is_compiling():
                return fn(*args, **kwargs)
            torch._dynamo.graph_break(msg=reason)
            return eager(*args, **kwargs)

        return call

    return decorated
