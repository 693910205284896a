"""One sweep over each row of logits: the loss, and in place of the logits their gradient.

With t = tanh(u / c) and r = 1 / (1 + exp(2 u / c)): t = 1 - 2 r, z - c = -2 c r and 1 - t^2 = 4 r (1 - r), so one
reciprocal and two exponentials per logit give everything, and because z - c lies in [-2 c, 0] no maximum is needed:
    nll = log(sum exp(z - c)) + 2 c r_y          du = w (exp(z - c) / sum - onehot) 4 r (1 - r)

Logit-sized traffic of head + loss, forward and backward, in units of one [T, V] bfloat16 tensor:
    separate kernels   write u | read u, write loss | read u, write du | read du, du      6
    here               write u | read u, write du                      | read du, du      5
and in chunks of rows (op.py) memory holds the logits of one chunk only.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import tiles


class RowTile(NamedTuple):
    """A row of up to `block` logits stays in registers; a longer one is read twice, the second time from L2."""

    block: int
    num_warps: int


@triton.jit
def _saturation(logits, cols, V, softcap):
    """r = 1 / (1 + exp(2 u / c)) = (1 - tanh(u / c)) / 2, float32; 1 outside the row."""
    u = tl.load(logits + cols, mask=cols < V, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp2(u * (2.8853900817779268 / softcap)))  # 2 log2(e)


@triton.jit
def softcapped_ce_kernel(
    logits,
    targets,
    losses,
    row_weight,
    V,
    stride,
    softcap,
    ignore_index,
    GRAD: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    cols = tl.arange(0, BLOCK_V)
    y = tl.load(targets + row)
    ignored = y == ignore_index
    known = (y >= 0) & (y < V)
    # Read before the row is overwritten; clamped, so that a wrong target reads memory of this row and poisons it below.
    r_y = _saturation(logits, tl.where(known, y, 0), V, softcap)
    to_log2 = -2.8853900817779268 * softcap
    if ONE_BLOCK:
        r = _saturation(logits, cols, V, softcap)
        e = tl.where(cols < V, tl.exp2(to_log2 * r), 0.0)
        total = tl.sum(e, 0)
    else:
        parts = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, V, BLOCK_V):
            r = _saturation(logits, start + cols, V, softcap)
            parts += tl.where(start + cols < V, tl.exp2(to_log2 * r), 0.0)
        total = tl.sum(parts, 0)
    loss = tl.log(total) + 2 * softcap * r_y
    tl.store(losses + row, tl.where(ignored, 0.0, tl.where(known, loss, float("nan"))))
    if GRAD:
        w = tl.load(row_weight)
        w = tl.where(ignored, 0.0, tl.where(known, w, float("nan")))
        inverse = 1.0 / total
        if ONE_BLOCK:
            du = w * (e * inverse - tl.where(cols == y, 1.0, 0.0)) * (4 * r * (1 - r))
            tl.store(logits + cols, du.to(logits.dtype.element_ty), mask=cols < V)
        else:
            for start in range(0, V, BLOCK_V):
                at = start + cols
                r = _saturation(logits, at, V, softcap)
                p = tl.exp2(to_log2 * r) * inverse
                du = w * (p - tl.where(at == y, 1.0, 0.0)) * (4 * r * (1 - r))
                tl.store(logits + at, du.to(logits.dtype.element_ty), mask=at < V)


def loss_and_grad(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    row_weight: Tensor | None,
    softcap: float,
    ignore_index: int,
    tile: RowTile | None = None,
) -> None:
    """Fill losses [T]; with row_weight (one float32), overwrite logits [T, V] by the gradient times it.

    A row with an unknown target gets NaN in both; one with ignore_index gets 0 in both.
    """
    T, V = logits.shape
    columns, on = triton.next_power_of_2(V), tiles.gpu(logits.device)
    tile = tile or tiles.tile(on, "softcapped_cross_entropy", "row", RowTile, columns=columns)
    block = min(columns, tile.block)
    with torch.cuda.device_of(logits):
        softcapped_ce_kernel[(T,)](
            logits,
            targets,
            losses,
            losses if row_weight is None else row_weight,
            V,
            logits.stride(0),
            softcap,
            ignore_index,
            GRAD=row_weight is not None,
            ONE_BLOCK=block >= V,
            BLOCK_V=block,
            num_warps=tile.num_warps,
        )
