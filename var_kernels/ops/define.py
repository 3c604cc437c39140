"""One declaration an op: of a forward and a backward, ``define_op`` makes the autograd.Function of eager calls and the
``torch.library`` op of graphs, which is opaque to torch.compile, with its shapes and gradients registered.

Engines, backend, budget and what is cached are chosen where a call is prepared, and are arguments of the op: what it
returns follows from them and from shapes. Without values (see ``checks.is_traced``) inactive rows are masked, not left
out: their number would have to be read from the device.
"""

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from itertools import repeat
from operator import attrgetter
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from var_kernels.ops.head import LEARNING, Head, Tensors

Function = TypeVar("Function", bound=Callable[..., Any])

_SCHEMA = {Tensor: "Tensor", float: "float", int: "SymInt", bool: "bool", str: "str", torch.dtype: "ScalarType"}


@dataclass
class Forward:
    """Results of an op's forward.

    outputs: for the caller. saved: for the backward. reads: the arguments as the backward reads them; None where it
    reads none. once: memory that the first backward may overwrite, so that later ones get None.
    """

    outputs: Tensors
    saved: Tensors
    reads: Any = None
    once: Tensor | None = None


def define_op(
    name: str,
    arguments: type,
    forward: Callable[[Any], Forward],
    backward: Callable[[Any, Tensors, Tensors, Tensor | None], Tensors] | None,
    shapes: Callable[[Any], Forward] | None,
    *,
    outputs: int,
    learns: tuple[str, ...] = (),
) -> Callable[[Any, bool], Tensors]:
    """The function (arguments, traced) -> outputs, differentiable once: eagerly, or as the op ``var_kernels::name``.

    Args:
        arguments: a dataclass with a field ``head``. Its tensors that may learn are ``Head.tensors`` and the fields
            named by ``learns``.
        backward: (arguments, saved, upstream gradients, once) -> gradients of those tensors; None: ``saved`` holds
            the gradients of the first output, a scalar.
        shapes: as ``forward``, tensors without values; None: an op that no graph can hold.
        outputs: how many there are.
    """
    layout = _Layout(arguments)
    paths = [*(f"head.{tensor}" for tensor in LEARNING), *learns]

    class OpFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, call, *_):
            ctx.set_materialize_grads(False)
            found = forward(call)
            # A GPU's backward runs in a thread of its own, where no ``use_backend`` holds.
            ctx.scale_ = call.head.label_kernels.scale_
            ctx.once, ctx.reads, tensors = found.once, found.reads, ()
            if found.reads is not None:
                tensors = attrgetter(*layout.tensors)(found.reads)
                ctx.reads = layout.with_tensors(found.reads, repeat(None))  # autograd keeps them
            ctx.save_for_backward(*tensors, *found.saved)
            return found.outputs

        @staticmethod
        def backward(ctx, *upstream):
            if not any(map(torch.is_tensor, upstream)):
                return (None,) * (1 + len(paths))
            with torch.no_grad():
                saved, once, ctx.once = ctx.saved_tensors, ctx.once, None
                if backward is None:
                    needed = zip(saved, ctx.needs_input_grad[1:], strict=True)
                    needed = [g if needs else None for g, needs in needed]
                    gradients = scaled_gradients(needed, upstream[0], ctx.scale_)
                else:
                    reads, count = ctx.reads, 0
                    if reads is not None:
                        reads, count = layout.with_tensors(reads, iter(saved)), len(layout.tensors)
                    gradients = backward(reads, saved[count:], upstream, once)
            if torch.is_grad_enabled():  # create_graph=True
                # ``once_differentiable`` looks at the upstream gradients alone: where those are constants
                # (``loss.sum()``) a gradient penalty would silently add nothing.
                anchor = torch.zeros((), requires_grad=True)
                gradients = [None if g is None else _Refusal.apply(g, anchor) for g in gradients]
            return None, *gradients

    function: Any = types.new_class(f"{name}_function", (OpFunction,))  # what grad_fn is called
    op = None if shapes is None else _registered(name, layout, paths, forward, backward, shapes, outputs)

    def run(call, traced: bool = False) -> Tensors:
        if traced and op is not None:
            return tuple(_present(t) for t in op(*attrgetter(*layout.paths)(call))[:outputs])
        if not torch.is_grad_enabled():
            return forward(call).outputs
        return function.apply(call, *attrgetter(*paths)(call))

    return run


def _registered(name: str, layout: "_Layout", paths, forward, backward, shapes, outputs: int):
    """The op ``var_kernels::name``, which returns outputs, what is saved, and what may be used once;
    ``var_kernels::name_backward`` computes gradients that are no products with a scalar.
    """
    kinds = ", ".join(layout.schema())
    positions = [layout.paths.index(path) for path in paths]

    def listed(found: Forward, like: Tensor) -> list[Tensor]:
        # Outputs of an op do not share memory.
        saved = [t.clone() if any(t is o for o in found.outputs if t is not None) else t for t in found.saved]
        return [_given(t, like) for t in (*found.outputs, *saved, found.once)]

    def run(*leaves) -> list[Tensor]:
        return listed(forward(layout.build(iter(leaves))), leaves[0])

    def fake(*leaves) -> list[Tensor]:
        return listed(shapes(layout.build(iter(leaves))), leaves[0])

    def run_backward(*arguments) -> list[Tensor]:
        *leaves, saved, upstream = arguments
        *saved, once = (_present(t) for t in saved)
        gradients = backward(layout.build(iter(leaves)), tuple(saved), tuple(upstream), once)
        return [_given(g, leaves[0]) for g in gradients]

    def fake_backward(*arguments) -> list[Tensor]:
        *leaves, _, _ = arguments
        others = (leaves[at].new_empty(leaves[at].shape) for at in positions[len(LEARNING) :])
        return [_given(g, leaves[0]) for g in (*gradient_shapes(layout.build(iter(leaves)).head), *others)]

    def keep(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in inputs]
        ctx.save_for_backward(*(leaf if isinstance(leaf, Tensor) else None for leaf in inputs), *output)

    def differentiate(ctx, upstream):
        count = len(ctx.others)
        leaves = [a if t is None else t for t, a in zip(ctx.saved_tensors[:count], ctx.others, strict=True)]
        saved, upstream = ctx.saved_tensors[count + outputs :], [_present(g) for g in upstream[:outputs]]
        gradients = []
        if any(g is not None for g in upstream):
            if backward is None:
                gradients = [_scaled(_present(g), upstream[0]) for g in saved[:-1]]
            else:
                gradients = [_present(g) for g in op_backward(*leaves, list(saved), upstream)]
        found = dict(zip(positions, gradients, strict=False))
        return tuple(found.get(at) for at in range(count))

    op = torch.library.custom_op(f"var_kernels::{name}", run, mutates_args=(), schema=f"({kinds}) -> Tensor[]")
    op.register_fake(fake)
    op.register_autograd(differentiate, setup_context=keep)
    if backward is not None:
        schema = f"({kinds}, Tensor[] saved, Tensor?[] upstream) -> Tensor[]"
        op_backward = torch.library.custom_op(
            f"var_kernels::{name}_backward", run_backward, mutates_args=(), schema=schema
        )
        op_backward.register_fake(fake_backward)
    return op


def gradient_shapes(head: Head) -> Tensors:
    """Shapes of the gradients that are needed, in the dtypes of the head's tensors."""
    pairs = zip(head.tensors, head.needs, strict=True)
    return tuple(t.new_empty(t.shape) if needed else None for t, needed in pairs)


def _given(t: Tensor | None, like: Tensor) -> Tensor:
    """An op of a graph returns tensors alone: None is one of three dimensions, which nothing else here has."""
    return like.new_empty(0, 0, 0) if t is None else t


def _present(t: Tensor | None) -> Tensor | None:
    return None if t is None or t.dim() == 3 else t


class _Layout:
    """The leaves of a dataclass and of the records in it, in order: the one place that takes arguments apart and puts
    them together.
    """

    def __init__(self, kind: type):
        self.kind, self.paths, self.types = kind, [], []
        # (field, layout of what is in it or None)
        self.parts: list[tuple[str, _Layout | None]] = []
        for name, hint in get_type_hints(kind).items():
            options = get_args(hint)
            optional = type(None) in options
            inner = options[options[0] is type(None)] if optional else hint
            part = _Layout(inner) if is_dataclass(inner) or hasattr(inner, "_fields") else None
            self.parts.append((name, part))
            self.paths += [name] if part is None else [f"{name}.{path}" for path in part.paths]
            self.types += [(inner, optional)] if part is None else part.types
        self.tensors = [path for path, (inner, _) in zip(self.paths, self.types, strict=True) if inner is Tensor]
        self.holding_tensors = [
            (name, part) for name, part in self.parts if name in self.tensors or (part and part.tensors)
        ]

    def schema(self) -> list[str]:
        types = (f"{_SCHEMA[inner]}{'?' if optional else ''}" for inner, optional in self.types)
        return [f"{kind} {path.replace('.', '_')}" for kind, path in zip(types, self.paths, strict=True)]

    def build(self, leaves: Iterator):
        return self.kind(*(next(leaves) if part is None else part.build(leaves) for _, part in self.parts))

    def with_tensors(self, call, tensors: Iterator):
        """A copy of the call over other tensors, in the order of ``tensors``."""
        other = object.__new__(self.kind)  # copy.copy takes six times as long
        other.__dict__.update(call.__dict__)
        for name, part in self.holding_tensors:
            given = next(tensors) if part is None else part.with_tensors(getattr(call, name), tensors)
            setattr(other, name, given)
        return other


def scaled_gradients(gradients, dloss: Tensor, scale_: Callable[[Tensor, Tensor], None]) -> list[Tensor | None]:
    """Finished gradients times the scalar upstream gradient, in their own memory; copies where the graph is kept, since
    another backward may ask for them again. scale_: of the label kernels.
    """
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return [_scaled(g, dloss) for g in gradients]
    # On a CPU reading the scale costs nothing; on Triton the device reads it, and leaves at the usual 1.
    if dloss.device.type == "cpu" and dloss.item() == 1:
        return list(gradients)
    for gradient in gradients:
        if gradient is not None:
            scale_(gradient, dloss)
    return list(gradients)


def _scaled(gradient: Tensor | None, dloss: Tensor) -> Tensor | None:
    return None if gradient is None else (gradient * dloss).to(gradient.dtype)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "the gradients of var_kernels' ops cannot be differentiated again, and this backward asks for it (a "
            "gradient penalty, a Hessian); detach them, or take full logits: hidden @ lm_head_weight.T"
        )


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
