"""Triton kernels without a GPU: the interpreter with a true bfloat16.

Triton's interpreter holds bfloat16 as uint16 and computes with the bits (https://github.com/triton-lang/triton/issues/11584):
tl.dot and arithmetic are silently wrong and conversions truncate. Importing this module under TRITON_INTERPRET=1
corrects that. Triton reads the variable when a kernel is defined, so interpreted tests need a process of their own.
"""

from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from pgolf_kernels.dispatch import TRITON_INTERPRETED


def _is_bfloat16(handle: object) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    """A bfloat16 handle as float32; anything else unchanged."""
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(handle):
    """A floating-point handle as bfloat16, to nearest even; comparisons (bool data) unchanged."""
    if handle.data.dtype == np.bool_:
        return handle
    bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return interpreter.TensorHandle(np.where(is_nan, quiet_nan, rounded).astype(np.uint16), tl.bfloat16)


def _in_float32(method: Callable) -> Callable:
    """The builder's `method`, computed in float32 and rounded once where an operand is bfloat16."""

    def wrapped(self, *args):
        result = method(self, *map(_widen, args))
        return _narrow(result) if any(map(_is_bfloat16, args)) else result

    return wrapped


def _correct_bfloat16(builder: type) -> None:
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt", "create_erf"):
        setattr(builder, name, _in_float32(getattr(builder, name)))

    plain_dot, plain_cast, plain_fp_to_fp = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self, a, b, acc, *options):
        result = plain_dot(self, _widen(a), _widen(b), _widen(acc), *options)
        return _narrow(result) if _is_bfloat16(acc) else result

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bfloat16(src) else _narrow(plain_cast(self, src, tl.float32))
        src = _widen(src)
        return src if src.dtype.scalar == dst_type.scalar else plain_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode is None and tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return plain_fp_to_fp(self, src, dst_type, rounding_mode)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    builder.get_bf16 = lambda self, value: _narrow(self.get_fp32(value))

    for reduction in (interpreter.ReduceOps, interpreter.ScanOps):
        reduction.apply_impl = _refuse_bfloat16(reduction.apply_impl)


def _refuse_bfloat16(apply_impl: Callable) -> Callable:
    def wrapped(self, inputs):
        if any(_is_bfloat16(t.handle) for t in inputs):
            raise NotImplementedError("the interpreter has no bfloat16 reduction; reduce in float32")
        return apply_impl(self, inputs)

    return wrapped


def _accept_numpy_2_4() -> None:
    """Triton 3.6 turns one-element arrays into the bounds of a range in a way that NumPy 2.4 and later refuse."""
    plain = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if TRITON_INTERPRETED:
    _correct_bfloat16(interpreter.InterpreterBuilder)
    _accept_numpy_2_4()


@contextmanager
def record_ops():
    """The names of the ops dispatched within, in order, as in "aten::mm"."""
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name().partition(".")[0])
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield names
