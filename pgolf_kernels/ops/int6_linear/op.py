"""int6_linear: argument checks, choice of implementation, registration, autograd. The maths is in reference.py."""

import torch
from torch import Tensor

from ...dispatch import CHOSEN, LIBRARY, Impl, always, choose, meant, require
from . import cpu, reference
from .weight import Int6Weight

OP = "int6_linear"
IMPLS = (  # fastest first; the last always runs
    Impl("cpu", cpu.run, cpu.why_not),
    Impl("reference", reference.forward, always),
)

LIBRARY.define("int6_linear_cpu(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor")
LIBRARY.impl("int6_linear_cpu", cpu.forward, "CPU")


@torch.library.register_fake("pgolf::int6_linear_cpu", lib=LIBRARY)
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    x, packed, scale, _ = inputs
    ctx.num_columns = x.shape[-1]
    ctx.save_for_backward(packed, scale)


def _backward(ctx, dy: Tensor):
    packed, scale = ctx.saved_tensors
    needs_x, _, _, needs_bias = ctx.needs_input_grad
    dx = dy @ reference.dequantize(packed, scale, ctx.num_columns, dy.dtype) if needs_x else None
    return dx, None, None, dy.sum_to_size(scale.shape[0]) if needs_bias else None


torch.library.register_autograd("pgolf::int6_linear_cpu", _backward, setup_context=_setup_context, lib=LIBRARY)


def int6_linear(x: Tensor, weight: Int6Weight, bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """y = x W^T + bias with int6 W: [..., K] -> [..., N].

    Args:
        x: [..., K], floating, on weight's device.
        weight: from quantize_int6 or Int6Weight.from_bytes; (N, K).
        bias: [N] in x's dtype, or None.
        impl: "auto", "cpu" (float32 and bfloat16) or "reference".

    Returns:
        [..., N] in x's dtype (in autocast's under autocast). Differentiable in x and bias.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or impl cannot run.
    """
    _check(x, weight, bias)
    args = (x, weight.packed, weight.scale, bias)
    if meant(impl) in ("auto", "cpu") and cpu.why_not(*args) is None:  # what choose would find, a microsecond earlier
        CHOSEN[OP] = "cpu"
        return cpu.run(*args)
    return choose(OP, IMPLS, impl, *args).run(*args)


def _check(x: Tensor, weight: Int6Weight, bias: Tensor | None) -> None:
    """Raise ValueError if the arguments do not fit together. Messages are made only when one is needed."""
    if not isinstance(weight, Int6Weight):
        require(False, OP, "weight must be an Int6Weight", type(weight), "see quantize_int6")
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
