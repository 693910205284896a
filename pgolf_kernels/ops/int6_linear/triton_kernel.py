"""Triton kernels over int6 weights: a linear layer for tens of rows of x, and plain dequantisation.

Both read a group of 4 codes as its three bytes: any K has whole groups, and a row may start at any address. What bounds
the linear layer is latency, not bytes, so its loop asks for the next bytes before it uses the last ones; Triton itself
prefetches x only, because asynchronous copies move at least 4 bytes. It computes y^T = W x^T: the decoded codes then
are the left operand, which tensor cores take from registers.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import tiles


class Tile(NamedTuple):
    """Rows of x and of the weight; groups of 4 codes in a step: few steps are few latencies, large ones may spill."""

    block_m: int
    block_n: int
    groups: int
    num_warps: int
    num_stages: int
    registers: int  # told nothing, ptxas spills to fit one block more


class DequantizeTile(NamedTuple):
    rows: int
    groups: int
    num_warps: int


@triton.jit
def _decode(b0, b1, b2, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Bytes [ROWS, GROUPS] -> codes [ROWS, 4 GROUPS] in -32..31."""
    b0, b1, b2 = b0.to(tl.int32), b1.to(tl.int32), b2.to(tl.int32)
    c0, c1, c2, c3 = b0 & 63, (b0 >> 6 | b1 << 2) & 63, (b1 >> 4 | b2 << 4) & 63, b2 >> 2
    codes = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # [ROWS, GROUPS, 2, 2], the last index the lowest
    return tl.reshape(codes, (ROWS, 4 * GROUPS)) - 32


@triton.jit
def int6_dequantize_kernel(packed_ptr, scale_ptr, w_ptr, N, K, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """w[n, k] = scale[n] * code[n, k], rounded once."""
    groups = tl.cdiv(K, 4)
    across = tl.cdiv(groups, GROUPS)
    first = (tl.program_id(0) % across) * GROUPS
    n = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    row = n.to(tl.int64)[:, None]
    g = first + tl.arange(0, GROUPS)
    at, inside = packed_ptr + row * (3 * groups) + 3 * g[None, :], (n[:, None] < N) & (g[None, :] < groups)
    b0 = tl.load(at, mask=inside, other=0)
    b1 = tl.load(at + 1, mask=inside, other=0)
    b2 = tl.load(at + 2, mask=inside, other=0)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    w = _decode(b0, b1, b2, ROWS, GROUPS).to(tl.float32) * scale[:, None]
    k = 4 * first + tl.arange(0, 4 * GROUPS)
    tl.store(w_ptr + row * K + k[None, :], w.to(w_ptr.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))


@triton.jit
def int6_linear_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    WHOLE_STEPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """y = x W^T + bias, a tile [BLOCK_N, BLOCK_M] of its transpose. WHOLE_STEPS: K is a multiple of 4 GROUPS; > 0."""
    groups = tl.cdiv(K, 4)
    across = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the last rows the last ones are read once more, for sums that nobody stores.
    row_m, row_n = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    g, k = tl.arange(0, GROUPS), tl.arange(0, 4 * GROUPS)
    packed_ptr += row_n[:, None] * (3 * groups)
    x_at = x_ptr + row_m[None, :] * K + k[:, None]  # [4 GROUPS, BLOCK_M]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Where x is 0 any codes will do, so beyond the last group the last one is read once more: no masks to keep.
    at = packed_ptr + 3 * tl.minimum(g, groups - 1)[None, :]  # [BLOCK_N, GROUPS]
    b0, b1, b2 = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    for start in range(0, groups, GROUPS):
        w = _decode(b0, b1, b2, BLOCK_N, GROUPS).to(tl.float32).to(x_ptr.dtype.element_ty)
        if WHOLE_STEPS:
            at = packed_ptr + 3 * (tl.minimum(start + GROUPS, groups - GROUPS) + g)[None, :]
            x = tl.load(x_at)
        else:
            at = packed_ptr + 3 * tl.minimum(start + GROUPS + g, groups - 1)[None, :]
            x = tl.load(x_at, mask=k[:, None] < K - 4 * start, other=0.0)
        b0, b1, b2 = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        x_at += 4 * GROUPS
        acc = tl.dot(w, x, acc)
    scale = tl.load(scale_ptr + row_n).to(tl.float32)
    y = acc * scale[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + row_n).to(tl.float32)[:, None]
    inside = (n[:, None] < N) & (m[None, :] < M)
    tl.store(y_ptr + row_m[None, :] * N + row_n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


def choose_tile(device: torch.device, M: int, N: int, K: int) -> Tile:
    """The table's, by rows of x, programs that tiles of 64 x 32 would make, and the power of 2 (to 256) in K."""
    facts = {"rows": M, "programs": triton.cdiv(M, 64) * triton.cdiv(N, 32), "divisor": math.gcd(K, 256)}
    return tiles.tile(tiles.gpu(device), "int6_linear", "linear", Tile, **facts)


def forward(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, tile: Tile | None = None) -> Tensor:
    """x W^T + bias in x's dtype, bfloat16 or float16; nothing may be empty."""
    *batch, K = x.shape
    N = scale.shape[0]
    x, scale = x.contiguous(), scale.contiguous()
    y = x.new_empty(*batch, N)
    M = y.numel() // N
    t = tile or choose_tile(x.device, M, N, K)
    with torch.cuda.device_of(x):
        int6_linear_kernel[(triton.cdiv(M, t.block_m) * triton.cdiv(N, t.block_n),)](
            x,
            packed,
            scale,
            x if bias is None else bias.contiguous(),
            y,
            M,
            N,
            K,
            WHOLE_STEPS=K % (4 * t.groups) == 0,
            HAS_BIAS=bias is not None,
            BLOCK_M=t.block_m,
            BLOCK_N=t.block_n,
            GROUPS=t.groups,
            num_warps=t.num_warps,
            num_stages=t.num_stages,
            maxnreg=t.registers,
        )
    return y


def dequantize(packed: Tensor, scale: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    """W [N, num_columns] as reference.dequantize has it, to the bit; nothing may be empty."""
    N, scale = len(packed), scale.contiguous()
    w = packed.new_empty(N, num_columns, dtype=dtype)
    t = tiles.tile(tiles.gpu(packed.device), "int6_linear", "dequantize", DequantizeTile)
    programs = triton.cdiv(N, t.rows) * triton.cdiv(packed.shape[1] // 3, t.groups)
    with torch.cuda.device_of(packed):
        int6_dequantize_kernel[(programs,)](
            packed, scale, w, N, num_columns, ROWS=t.rows, GROUPS=t.groups, num_warps=t.num_warps
        )
    return w
