"""int6_linear and quantize_int6: argument checks and choice of implementation. The maths is in reference.py."""

import math

import torch
from torch import Tensor

from ...dispatch import Impl, always, choose, require
from . import reference
from .weight import Int6Weight

IMPLS = (Impl("reference", reference.forward, always),)


def quantize_int6(w: Tensor, clip: str | float = "search", floor: float | None = None) -> Int6Weight:
    """Quantise a matrix to 6 bits with one scale per row: scale = fp16(max(c / 31, floor)), codes in -31..31.

    Args:
        w: [N, K], any floating dtype and device; every value finite.
        clip: where c comes from. "search": of five quantiles of |row| (0.999 to 1) the one with the least squared error
            over the whole matrix; "max": the largest |w| of the row; a number k: k standard deviations of the row.
        floor: the smallest step between codes. None: 1/31 for "search" and "max", as in the published systems, where
            weights are trained to span many such steps, and 1e-10 for k standard deviations. For other weights pass 0:
            a row whose values are all below 1/62 becomes zero under 1/31.

    Returns:
        Int6Weight on w's device. Not differentiable.

    Raises:
        ValueError: w is no finite floating matrix, clip or floor is out of range, or a scale exceeds float16.

    Source: openai/parameter-golf #1217 ("search"), #1394 (standard deviations).
    """
    op = "quantize_int6"
    require(w.is_floating_point() and w.dim() == 2, op, "w must be a floating-point matrix [N, K]", _describe(w))
    if isinstance(clip, str):
        require(clip in ("search", "max"), op, "clip must be 'search', 'max' or a number", repr(clip))
    else:
        require(math.isfinite(clip) and clip > 0, op, "clip must be a finite number of deviations above 0", clip)
    floor = (1 / 31 if isinstance(clip, str) else 1e-10) if floor is None else floor
    require(0 <= floor <= 65504, op, "floor must lie in 0..65504, the largest float16", floor)
    w = w.detach() if w.dtype == torch.float64 else w.detach().float()
    require(bool(w.isfinite().all()), op, "w must be finite", "NaN or infinity", "check the training run")
    codes, scale = reference.quantize(w, clip, floor)
    require(bool(scale.isfinite().all()), op, "every scale must fit float16 (65504)", "a larger one", "scale w down")
    return Int6Weight.from_codes(codes, scale)


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
