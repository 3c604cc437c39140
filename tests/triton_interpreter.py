"""Triton's CPU interpreter, mended where it is wrong or slow, so that the kernels' own source runs in the tests.

It holds bf16 as the bare 16 bits in numpy: casts from fp32 truncate instead of rounding, and casts to fp32 must
shift. Triton 3.6 also fails on every loop with a run-time bound under numpy >= 2.4, which wants an explicit integer
conversion.

Four fifths of its time change no number: it patches triton.language again in every call of one jitted function by
another, checks integers for overflow and throws the answer away, and builds types and shapes anew for every operation.
"""

import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """fp32 -> the 16 bits of bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def mend() -> None:
    """Patch the interpreter; once is enough."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_mended", False):
        return
    builder._mended = True
    plain_cast = builder.cast_impl

    def cast_impl(self, source, target_type):
        target, origin = target_type.scalar, source.dtype.scalar
        if tl.bfloat16 not in (target, origin) or target == origin:
            return plain_cast(self, source, target_type)
        if origin == tl.bfloat16:
            widened = interpreter.TensorHandle(_widen(source.data), tl.float32)
            return widened if target == tl.float32 else plain_cast(self, widened, target_type)
        return interpreter.TensorHandle(_round(source.data.astype(np.float32)), tl.bfloat16)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = lambda self, source, target_type, _rounding: cast_impl(self, source, target_type)

    plain_dot = builder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (cast_impl(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return plain_dot(self, a, b, *rest)

    builder.create_dot = create_dot
    # tl.maximum(NaN, x) is x, as on a GPU; the interpreter's is NaN
    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor, *scope):
        result = patch_tensor(tensor, *scope)

        def index(self):
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return result

    interpreter._patch_lang_tensor = patch_with_index
    _hasten(builder)


def _hasten(builder: type) -> None:
    """The same numbers in a fifth of the time."""
    options = interpreter.interpreter_builder.options
    assert not options.debug, "overflows of integers are reported after all"
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)

    core, patch_lang = tl.core, interpreter._patch_lang

    def patch_once(fn):
        """Leaves the language alone where a caller of ``fn`` has patched all of it."""
        untouched = any(core.is_builtin(module.program_id) for module in (tl, core))
        return patch_lang(fn) if untouched else None

    interpreter._patch_lang = patch_once

    types = {}
    np_type = interpreter._get_np_dtype

    def cached_np_type(kind):
        scalar = kind.scalar
        if scalar.name not in types:
            types[scalar.name] = np_type(scalar)
        return types[scalar.name]

    interpreter._get_np_dtype = cached_np_type

    shapes = {}
    init_block, init_tensor, equal = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__

    def block_type_init(self, element_ty, shape):
        key = tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
        if key not in shapes:
            init_block(self, element_ty, shape)
            sample = core.tensor.__new__(core.tensor)
            init_tensor(sample, None, self)
            shapes[key] = self.shape, self.numel, str(self.shape), sample.shape, sample.numel
        self.element_ty = element_ty
        self.shape, self.numel, shown, *self.of_tensor = shapes[key]
        self.name = f"<{shown}, {element_ty}>"

    of_scalar = core.tuple([]), core.constexpr(1)

    def tensor_init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensor if isinstance(type, core.block_type) else of_scalar

    core.block_type.__init__, core.tensor.__init__ = block_type_init, tensor_init
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)

    semantic = interpreter.interpreter_semantic
    broadcast = semantic.broadcast_impl_value

    def broadcast_where_shapes_differ(left, right):
        same = getattr(left.type, "shape", None) is getattr(right.type, "shape", None)
        return (left, right) if same else broadcast(left, right)

    semantic.broadcast_impl_value = broadcast_where_shapes_differ
