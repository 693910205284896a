"""Triton kernels without a GPU: the interpreter with a true bfloat16, and machine code compiled ahead of time.

Triton's interpreter holds bfloat16 as uint16 and computes with the bits (https://github.com/triton-lang/triton/issues/11584):
tl.dot and arithmetic are silently wrong and conversions truncate. Importing this module under TRITON_INTERPRET=1
corrects that. Triton reads the variable when a kernel is defined, so interpreted tests need a process of their own.

`machine_code` compiles what a launcher would launch, for any NVIDIA architecture, with the launch's specialisation.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from pgolf_kernels.dispatch import TRITON_INTERPRETED

MAX_SHARED_BYTES = 227 * 1024  # per block, compute capability 9.0 and 10.0
_DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTIONS = r"\b(HGMMA|HMMA|UTCHMMA|UTMALDG|UTMASTG|LDGSTS|STL|LDL)\b"


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


@dataclass(frozen=True)
class MachineCode:
    """What ptxas made of one kernel. `instructions` counts the SASS mnemonics named in _INSTRUCTIONS."""

    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: dict[str, int]

    @property
    def spills(self) -> bool:
        return self.stack_bytes > 0 or any(self.instructions.get(name) for name in ("STL", "LDL"))


class _NoGpu(DriverBase):
    """Answers the questions a compilation asks, for a GPU that is not there."""

    def __init__(self, capability: int):
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_benchmarker(self):
        raise RuntimeError("nothing can be timed without a GPU")


def machine_code(launch: Callable[[int], None], capability: int) -> list[MachineCode]:
    """Compile, without running, each kernel that launch(capability) launches, once; capability as in 90 for sm_90.

    It replaces Triton's driver for good: call it in a process of its own.
    """
    triton.runtime.driver.set_active(_NoGpu(capability))
    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = compile_only
    try:
        launch(capability)
    finally:
        JITFunction.run = run
    return [_inspect(kernel) for kernel in {kernel.hash: kernel for kernel in compiled}.values()]


def _inspect(kernel) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(kernel.asm["cubin"])
        usage = _disassemble("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _disassemble("nvdisasm", "-c", cubin.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    counts = Counter(re.findall(_INSTRUCTIONS, sass))
    return MachineCode(kernel.metadata.name, registers, stack, kernel.metadata.shared, dict(counts))


def _disassemble(tool: str, *args: str) -> str:
    return subprocess.run([_DISASSEMBLER / tool, *args], capture_output=True, text=True, check=True).stdout
