"""The two passes of Muon around the orthogonalisation, each over all parameters of a group in one launch.

    momentum_kernel   m <- momentum m + g;  u = g + momentum m (Nesterov) or m     reads g, m, writes m, u
    update_kernel     p <- (1 - lr wd) p - lr scale o;  average <- lerp            reads p, o, writes p

Memory is all they cost: with float32 m and p and the rest in bfloat16, 12 and 10 bytes a parameter, and 8 more for an
average that follows p.
"""

from collections import defaultdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..multi_tensor import (
    ALIGNMENT,
    TL_DTYPES,
    PassTile,
    address_table,
    aligned,
    constants,
    follow,
    locate,
    number,
    pieces,
    pointer,
)
from .averages import Averages


@triton.jit
def momentum_kernel(
    addresses_ptr,
    updates_ptr,
    momentum,
    pieces_ptr,
    count,
    NESTEROV: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
):
    """addresses: of the gradients, then of the momentum buffers (float32); updates: packed."""
    tensor, offset, at, exists = locate(pieces_ptr, count, PADDED, SIZE, ALIGNED)
    g_ptr = pointer(addresses_ptr, tensor, G_DTYPE, ALIGNED)
    m_ptr = pointer(addresses_ptr, count + tensor, tl.float32, ALIGNED)
    momentum = number(momentum, ON_DEVICE)
    g = tl.load(g_ptr + at, mask=exists).to(tl.float32)
    m = momentum * tl.load(m_ptr + at, mask=exists) + g
    tl.store(m_ptr + at, m, mask=exists)
    u = g + momentum * m if NESTEROV else m
    tl.store(updates_ptr + offset + at, u.to(updates_ptr.dtype.element_ty), mask=exists)


@triton.jit
def update_kernel(
    addresses_ptr,
    scales_ptr,
    lr,
    weight_decay,
    pieces_ptr,
    count,
    one_minus_decay,
    ON_DEVICE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    O_DTYPE: tl.constexpr,
    A_DTYPE: tl.constexpr,
    AVERAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
):
    """addresses: of the parameters, their orthogonalised updates, their averages if AVERAGE; scales: one each."""
    tensor, _, at, exists = locate(pieces_ptr, count, PADDED, SIZE, ALIGNED)
    p_ptr = pointer(addresses_ptr, tensor, P_DTYPE, ALIGNED)
    o_ptr = pointer(addresses_ptr, count + tensor, O_DTYPE, ALIGNED)
    lr, weight_decay = number(lr, ON_DEVICE), number(weight_decay, ON_DEVICE)
    p = tl.load(p_ptr + at, mask=exists).to(tl.float32)
    o = tl.load(o_ptr + at, mask=exists).to(tl.float32)
    p = (1 - lr * weight_decay) * p - lr * tl.load(scales_ptr + tensor) * o
    tl.store(p_ptr + at, p.to(P_DTYPE), mask=exists)
    if AVERAGE:
        a_ptr = pointer(addresses_ptr, 2 * count + tensor, A_DTYPE, ALIGNED)
        follow(a_ptr + at, p.to(P_DTYPE), one_minus_decay, exists)


def momentum_banks(
    grads: list[list[Tensor]],
    buffers: list[list[Tensor]],
    momentum: float | Tensor,
    nesterov: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Advance the momentum buffers; return the updates of each bank, (matrices, rows, cols) in `dtype`.

    grads, buffers: per bank, its parameters' (any floating dtype; float32 and contiguous), matrices or stacks of them.
    momentum: a number, or a float32 tensor on the device.
    """
    banks, together = [], defaultdict(list)
    totals = defaultdict(int)
    for bank in grads:
        device = bank[0].device
        banks.append((device, totals[device], sum(g.numel() for g in bank)))
        totals[device] = banks[-1][1] + triton.cdiv(banks[-1][2], ALIGNMENT) * ALIGNMENT
    packed = {device: torch.empty(total, dtype=dtype, device=device) for device, total in totals.items()}
    for (device, start, _), some_grads, some_buffers in zip(banks, grads, buffers, strict=True):
        for g, m in zip(some_grads, some_buffers, strict=True):
            together[device, g.dtype].append((g.contiguous(), m, start))
            start += g.numel()
    for (device, g_dtype), entries in together.items():
        gs, ms, offsets = zip(*entries, strict=True)
        tile = tiles.tile(tiles.gpu(device), "optim", "momentum", PassTile)
        sizes = pieces(tuple(g.numel() for g in gs), offsets, tile.size, device)
        addresses = [t.data_ptr() for t in (*gs, *ms)]
        with torch.cuda.device_of(packed[device]):
            momentum_kernel[(sizes.total,)](
                address_table(addresses, device),
                packed[device],
                momentum,
                **sizes.arguments(),
                NESTEROV=nesterov,
                ON_DEVICE=isinstance(momentum, Tensor),
                G_DTYPE=TL_DTYPES[g_dtype],
                ALIGNED=sizes.aligned and aligned(addresses),
                num_warps=tile.num_warps,
            )
    shapes = [(-1, *bank[0].shape[-2:]) for bank in grads]
    slices = (packed[device][start : start + numel] for device, start, numel in banks)
    return [updates.view(shape) for updates, shape in zip(slices, shapes, strict=True)]


def update_banks(
    params: list[list[Tensor]],
    orthogonal: list[Tensor],
    scales: list[float],
    lr: float | Tensor,
    weight_decay: float | Tensor,
    averages: Averages,
) -> None:
    """p <- (1 - lr weight_decay) p - lr scale o for the parameters of every bank; then their averages follow.

    params: per bank, contiguous; orthogonal: per bank, (matrices, rows, cols), contiguous; scales: one per bank.
    lr, weight_decay: both numbers, or both float32 tensors on the device.
    """
    together = defaultdict(list)
    for bank, o, scale in zip(params, orthogonal, scales, strict=True):
        address = o.data_ptr()
        for p in bank:
            together[p.device, p.dtype, o.dtype, averages.dtype(p)].append((p, address, scale))
            address += p.numel() * o.element_size()
    for (device, p_dtype, o_dtype, a_dtype), entries in together.items():
        ps, some_orthogonal, some_scales = zip(*entries, strict=True)
        tile = tiles.tile(tiles.gpu(device), "optim", "update", PassTile)
        sizes = pieces(tuple(p.numel() for p in ps), (0,) * len(ps), tile.size, device)
        addresses = [*(p.data_ptr() for p in ps), *some_orthogonal]
        if a_dtype is not None:
            addresses += [averages.of[p].data_ptr() for p in ps]
        with torch.cuda.device_of(ps[0]):
            update_kernel[(sizes.total,)](
                address_table(addresses, device),
                constants(some_scales, device),
                lr,
                weight_decay,
                **sizes.arguments(),
                one_minus_decay=1 - averages.decay,
                ON_DEVICE=isinstance(lr, Tensor),
                P_DTYPE=TL_DTYPES[p_dtype],
                O_DTYPE=TL_DTYPES[o_dtype],
                A_DTYPE=TL_DTYPES[a_dtype or p_dtype],
                AVERAGE=a_dtype is not None,
                ALIGNED=sizes.aligned and aligned(addresses),
                num_warps=tile.num_warps,
            )
