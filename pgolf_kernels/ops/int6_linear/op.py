"""int6_linear: argument checks, choice of implementation, registration, autograd. The maths is in reference.py."""

import torch
from torch import Tensor

from ...dispatch import LIBRARY, TRITON_INTERPRETED, Impl, always, choose, meant, record, require, require_tensors
from ...matmul import matmul
from . import cpu, gpu, reference
from .weight import Int6Weight

OP = "int6_linear"
IMPLS = (  # the last always runs; the order of the three on a GPU depends on the number of rows, see gpu.order
    Impl("cpu", cpu.run, cpu.why_not),
    Impl("cuda", gpu.run_cuda, gpu.why_not_cuda),
    Impl("triton", gpu.run_tiles, gpu.why_not_tiles),
    Impl("dequantize", gpu.run_dequantize, gpu.why_not_dequantize),
    Impl("reference", reference.forward, always),
)
_BY_NAME = {impl.name: impl for impl in IMPLS}


def _fastest_first(x: Tensor) -> tuple[Impl, ...]:
    return (IMPLS[0], *(_BY_NAME[name] for name in gpu.order(x)), IMPLS[-1]) if x.is_cuda else IMPLS


LIBRARY.define("int6_linear_cpu(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor")
LIBRARY.define("int6_linear_cuda(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor")
LIBRARY.define("int6_linear_triton(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor")
LIBRARY.define("int6_dequantize(Tensor packed, Tensor scale, int num_columns, ScalarType dtype) -> Tensor")
LIBRARY.impl("int6_linear_cpu", cpu.forward, "CPU")
LIBRARY.impl("int6_linear_cuda", gpu.forward, "CUDA")
for _device in ("CUDA", *("CPU",) * TRITON_INTERPRETED):
    LIBRARY.impl("int6_linear_triton", gpu.forward_tiles, _device)
    LIBRARY.impl("int6_dequantize", gpu.dequantize_by_triton, _device)


def _fake(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


@torch.library.register_fake("pgolf::int6_dequantize", lib=LIBRARY)
def _(packed: Tensor, scale: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(packed.shape[0], num_columns, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, packed, scale, _ = inputs
    ctx.num_columns = x.shape[-1]
    ctx.save_for_backward(packed, scale)


def _backward(ctx, dy: Tensor):
    packed, scale = ctx.saved_tensors
    needs_x, _, _, needs_bias = ctx.needs_input_grad
    dx = matmul(dy, gpu.dequantize(packed, scale, ctx.num_columns, dy.dtype)).to(dy.dtype) if needs_x else None
    return dx, None, None, dy.sum_to_size(scale.shape[0]) if needs_bias else None


for _name in ("cpu", "cuda", "triton"):
    torch.library.register_fake(f"pgolf::int6_linear_{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"pgolf::int6_linear_{_name}", _backward, setup_context=_setup_context, lib=LIBRARY)


def int6_linear(x: Tensor, weight: Int6Weight, bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """y = x W^T + bias with int6 W: [..., K] -> [..., N].

    Args:
        x: [..., K], floating, on weight's device.
        weight: from quantize_int6 or Int6Weight.from_bytes; (N, K).
        bias: [N] in x's dtype, or None.
        impl: "auto", "cpu" (float32 and bfloat16), on a GPU "cuda" (float32, bfloat16, float16), "triton" (bfloat16,
            float16) or "dequantize" (a dense copy of the weight, then PyTorch's product), or "reference".

    Returns:
        [..., N] in x's dtype (in autocast's under autocast). Differentiable in x and bias.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or impl cannot run.
    """
    _check(x, weight, bias)
    args = (x, weight.packed, weight.scale, bias)
    if meant(impl) in ("auto", "cpu") and cpu.why_not(*args) is None:  # what choose would find, a microsecond earlier
        record(OP, "cpu")
        return cpu.run(*args)
    return choose(OP, _fastest_first(x), impl, *args).run(*args)


def _check(x: Tensor, weight: Int6Weight, bias: Tensor | None) -> None:
    """Raise ValueError if the arguments do not fit together. Messages are made only when one is needed."""
    if not isinstance(weight, Int6Weight):
        require(False, OP, "weight must be an Int6Weight", type(weight), "see quantize_int6")
    if not isinstance(x, Tensor) or not isinstance(bias, Tensor | None):
        require_tensors(OP, x=x, **({} if bias is None else {"bias": bias}))
    n, k = weight.shape
    if not (x.is_floating_point() and x.dim() > 0):
        require(False, OP, f"x must be a floating-point tensor [..., {k}]", _describe(x))
    if x.shape[-1] != k:
        require(False, OP, f"x must end in K = {k} features", _describe(x))
    if x.device != weight.packed.device:
        require(False, OP, f"x must be on {weight.device}", x.device, "move one with .to(device)")
    if bias is not None and not (bias.shape == (n,) and bias.dtype == x.dtype and bias.device == x.device):
        require(False, OP, f"bias must be {x.dtype} [{n}] on {x.device}", _describe(bias))


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} on {t.device}"
