"""int6_linear: argument checks and choice of implementation. The maths is in reference.py."""

from torch import Tensor

from ...dispatch import Impl, always, choose, require
from . import reference
from .weight import Int6Weight

IMPLS = (Impl("reference", reference.forward, always),)


def int6_linear(x: Tensor, weight: Int6Weight, bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """y = x W^T + bias with int6 W: [..., K] -> [..., N].

    Args:
        x: [..., K], floating, on weight's device.
        weight: from quantize_int6 or Int6Weight.from_bytes; (N, K).
        bias: [N] in x's dtype, or None.
        impl: "auto" or "reference".

    Returns:
        [..., N] in x's dtype (in autocast's under autocast). Differentiable in x and bias.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or impl cannot run.
    """
    op = "int6_linear"
    require(isinstance(weight, Int6Weight), op, "weight must be an Int6Weight", type(weight), "see quantize_int6")
    n, k = weight.shape
    require(x.is_floating_point() and x.dim() > 0, op, f"x must be a floating-point tensor [..., {k}]", _describe(x))
    require(x.size(-1) == k, op, f"x must end in K = {k} features", _describe(x))
    require(x.device == weight.device, op, f"x must be on {weight.device}", x.device, "move one with .to(device)")
    if bias is not None:
        ok = bias.shape == (n,) and bias.dtype == x.dtype and bias.device == x.device
        require(ok, op, f"bias must be {x.dtype} [{n}] on {x.device}", _describe(bias))
    args = (x, weight.packed, weight.scale, bias)
    return choose(op, IMPLS, impl, *args).run(*args)


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} on {t.device}"
