"""quantize_int6: argument checks around reference.quantize."""

import math

import torch
from torch import Tensor

from ...dispatch import require, require_numbers, require_tensors
from . import reference
from .weight import Int6Weight


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
    require_tensors(op, w=w)
    require(
        w.is_floating_point() and w.dim() == 2,
        op,
        "w must be a floating-point matrix [N, K]",
        f"{w.dtype} {tuple(w.shape)}",
    )
    if isinstance(clip, str):
        require(clip in ("search", "max"), op, "clip must be 'search', 'max' or a number", repr(clip))
    else:
        require_numbers(op, clip=clip)
        require(math.isfinite(clip) and clip > 0, op, "clip must be a finite number of deviations above 0", clip)
    floor = (1 / 31 if isinstance(clip, str) else 1e-10) if floor is None else floor
    require_numbers(op, floor=floor)
    require(0 <= floor <= 65504, op, "floor must lie in 0..65504, the largest float16", floor)
    w = w.detach() if w.dtype == torch.float64 else w.detach().float()
    require(bool(w.isfinite().all()), op, "w must be finite", "NaN or infinity", "check the training run")
    codes, scale = reference.quantize(w, clip, floor)
    require(bool(scale.isfinite().all()), op, "every scale must fit float16 (65504)", "a larger one", "scale w down")
    return Int6Weight.from_codes(codes, scale)
