"""Triton's CPU interpreter, mended where it is wrong, so that the kernels' own source runs in the tests.

It holds bf16 as the bare 16 bits in numpy: casts from fp32 truncate instead of rounding, and casts to fp32 must
shift. Triton 3.6 also
fails on every loop with a run-time bound under numpy >= 2.4, which wants an explicit integer conversion.
"""

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
