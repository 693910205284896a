"""Triton kernels of the LeakyReLU^2 MLP: each product carries its element-wise half in the epilogue.

    leaky_relu2_up_kernel   a  = leaky(x w_up^T)^2          dp_kernel   dp = (dy w_down) * da/dp

The sign of p hides in the last bit of `a`. Of the two bfloat16 neighbours of a, one has an even pattern and one an odd
one: p >= 0 takes the even one, p < 0 the odd one. So one [M, H] tensor feeds the down product, dw_down and, through
da/dp = 2 sqrt(a) or -2 |s| sqrt(a), the gradient. `a` is off by at most 1 ulp instead of 1/2, which is still closer
than squaring a rounded p (up to 3/2); the root halves the relative error, so da/dp is as exact as a rounded p. A true
zero of the negative side (s = 0, or underflow) reads 9e-41.

[M, H] tensors moved in forward and backward, with the other products left to the vendor's library:
    p and a kept         write p, a   read a | read p   write dp   read a, dp, dp     8    (2 kept for backward)
    a and a sign bitmap  write a+     read a | read a+  write dp   read a, dp, dp     7.1  (1.06 kept)
    da/dp kept, a again  write g, a   read a | read g   write dp,a read a, dp, dp     9    (1 kept, 2 at the peak)
    here                 write a      read a | read a   write dp   read a, dp, dp     7    (1 kept)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import tiles
from ...tiles import Gpu


class Tiling(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_epilogue: bool  # store a tile in two halves: half the shared memory for the epilogue
    programs_per_sm: int  # persistent programs on each multiprocessor; 0: one program per tile
    flatten: bool = False  # one loop over tiles and K, so that a tile's first loads overlap the last one's epilogue


@triton.jit
def _origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile; GROUP_M row blocks share each column block while it is in L2."""
    num_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * num_n
    first_m = tile // per_group * GROUP_M
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    within = tile % per_group
    return (first_m + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _load(src, row, col, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr, ACCESS: tl.constexpr):
    """[ROWS, COLS] of a row-major matrix, 0 outside; src is a descriptor ("tma") or a pointer ("even", "masked")."""
    if ACCESS == "tma":
        tile = src.load([row, col])
    else:
        i = tl.arange(0, ROWS)[:, None]
        j = tl.arange(0, COLS)[None, :]
        at = src + tl.cast(row, tl.int64) * num_cols + col + i * num_cols + j
        if ACCESS == "even":
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(row + i < num_rows) & (col + j < num_cols), other=0.0)
    return tile


@triton.jit
def _store(dst, value, row, col, num_rows, num_cols, ACCESS: tl.constexpr):
    if ACCESS == "tma":
        dst.store([row, col], value)
    else:
        i = tl.arange(0, value.shape[0])[:, None]
        j = tl.arange(0, value.shape[1])[None, :]
        at = dst + tl.cast(row, tl.int64) * num_cols + col + i * num_cols + j
        if ACCESS == "even":
            tl.store(at, value)
        else:
            tl.store(at, value, mask=(row + i < num_rows) & (col + j < num_cols))


@triton.jit
def _halves(tile):
    """Left and right half of a tile's columns."""
    pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def _square_with_sign(p, negative_slope):
    """bfloat16 nearest to leaky(p)^2 whose last bit is 1 exactly where p < 0 (or NaN)."""
    leaky = tl.where(p >= 0, p, p * negative_slope)
    bits = (leaky * leaky).to(tl.uint32, bitcast=True)
    even = tl.where(p >= 0, 0x10000, 0).to(tl.uint32)
    # Even: round to the nearest multiple of 2 ulp. Odd: the odd neighbour of a truncated value is the nearest one.
    bits = ((bits + even) & 0xFFFEFFFF) | (even ^ 0x10000)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _slope_from_square(a, negative_slope):
    """da/dp, float32, from a stored by _square_with_sign."""
    odd = (a.to(tl.uint16, bitcast=True) & 1) != 0
    return tl.sqrt(a.to(tl.float32)) * tl.where(odd, -2 * tl.abs(negative_slope), 2.0)


@triton.jit
def leaky_relu2_up_kernel(
    x_src,
    w_src,
    a_dst,
    M,
    H,
    D,
    negative_slope,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr,
    ACCESS: tl.constexpr,
):
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(H, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, col = _origin(tile, M, H, BLOCK_M, BLOCK_N, GROUP_M)
        p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            x = _load(x_src, row, k, M, D, BLOCK_M, BLOCK_K, ACCESS)  # [BLOCK_M, BLOCK_K]
            w = _load(w_src, col, k, H, D, BLOCK_N, BLOCK_K, ACCESS)  # [BLOCK_N, BLOCK_K]
            p = tl.dot(x, w.T, p)
        if SPLIT:
            left, right = _halves(p)
            _store(a_dst, _square_with_sign(left, negative_slope), row, col, M, H, ACCESS)
            _store(a_dst, _square_with_sign(right, negative_slope), row, col + BLOCK_N // 2, M, H, ACCESS)
        else:
            _store(a_dst, _square_with_sign(p, negative_slope), row, col, M, H, ACCESS)


@triton.jit
def leaky_relu2_dp_kernel(
    dy_src,
    w_src,
    a_src,
    dp_dst,
    M,
    H,
    D,
    negative_slope,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr,
    ACCESS: tl.constexpr,
):
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(H, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, col = _origin(tile, M, H, BLOCK_M, BLOCK_N, GROUP_M)
        da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            dy = _load(dy_src, row, k, M, D, BLOCK_M, BLOCK_K, ACCESS)  # [BLOCK_M, BLOCK_K]
            w = _load(w_src, k, col, D, H, BLOCK_K, BLOCK_N, ACCESS)  # [BLOCK_K, BLOCK_N]
            da = tl.dot(dy, w, da)
        if SPLIT:
            left, right = _halves(da)
            right_col = col + BLOCK_N // 2
            left *= _slope_from_square(_load(a_src, row, col, M, H, BLOCK_M, BLOCK_N // 2, ACCESS), negative_slope)
            _store(dp_dst, left.to(tl.bfloat16), row, col, M, H, ACCESS)
            right *= _slope_from_square(
                _load(a_src, row, right_col, M, H, BLOCK_M, BLOCK_N // 2, ACCESS), negative_slope
            )
            _store(dp_dst, right.to(tl.bfloat16), row, right_col, M, H, ACCESS)
        else:
            a = _load(a_src, row, col, M, H, BLOCK_M, BLOCK_N, ACCESS)
            _store(dp_dst, (da * _slope_from_square(a, negative_slope)).to(tl.bfloat16), row, col, M, H, ACCESS)


def _source(t: Tensor, rows: int, cols: int, access: str) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(t, [rows, cols]) if access == "tma" else t


def _access(on: Gpu, t: Tiling, shape: tuple[int, int, int], operands: tuple[Tensor, ...]) -> str:
    """How kernels read and write: TMA needs Hopper and 16-byte aligned rows; masks are spared where tiles fit."""
    if on.capability >= (9, 0) and all(o.data_ptr() % 16 == 0 and o.shape[1] % 8 == 0 for o in operands):
        return "tma"
    fits = all(size % block == 0 for size, block in zip(shape, (t.block_m, t.block_n, t.block_k), strict=True))
    return "even" if fits else "masked"


def _launch(name: str, kernel, operands: tuple[Tensor, ...], shape, negative_slope: float, tiling: Tiling | None):
    """Run `kernel` over the [M, H] grid; operands: [M, D], a weight, and the [M, H] tensors of the epilogue."""
    M, H, D = shape
    on = tiles.gpu(operands[0].device)
    t = tiling or tiles.tile(on, "leaky_relu2_mlp", name, Tiling, hidden=H)
    access = _access(on, t, shape, operands)
    left, weight, *epilogue = operands
    weight_block = (t.block_n, t.block_k) if name == "up" else (t.block_k, t.block_n)
    num_tiles = triton.cdiv(M, t.block_m) * triton.cdiv(H, t.block_n)
    grid = min(num_tiles, t.programs_per_sm * on.num_sms) if t.programs_per_sm else num_tiles
    with torch.cuda.device_of(left):
        kernel[(grid,)](
            _source(left, t.block_m, t.block_k, access),
            _source(weight, *weight_block, access),
            *(_source(tile, t.block_m, t.block_n // (1 + t.split_epilogue), access) for tile in epilogue),
            M,
            H,
            D,
            negative_slope,
            BLOCK_M=t.block_m,
            BLOCK_N=t.block_n,
            BLOCK_K=t.block_k,
            GROUP_M=8,
            SPLIT=t.split_epilogue,
            FLATTEN=t.flatten,
            ACCESS=access,
            num_warps=t.num_warps,
            num_stages=t.num_stages,
        )


def up(x: Tensor, w_up: Tensor, negative_slope: float, tiling: Tiling | None = None) -> Tensor:
    """a = leaky(x w_up^T)^2 with the sign of p in its last bit; x [M, D], w_up [H, D], contiguous bfloat16."""
    (M, D), H = x.shape, w_up.shape[0]
    a = x.new_empty(M, H)
    _launch("up", leaky_relu2_up_kernel, (x, w_up, a), (M, H, D), negative_slope, tiling)
    return a


def dp(dy: Tensor, w_down: Tensor, a: Tensor, negative_slope: float, tiling: Tiling | None = None) -> Tensor:
    """dp = (dy w_down) * da/dp; dy [M, D], w_down [D, H], a [M, H] from `up`, contiguous bfloat16."""
    (M, D), H = dy.shape, w_down.shape[1]
    out = torch.empty_like(a)
    _launch("dp", leaky_relu2_dp_kernel, (dy, w_down, a, out), (M, H, D), negative_slope, tiling)
    return out


def probe(device: torch.device) -> tuple[Tensor, Tensor]:
    """dp of a small problem from both kernels, and float64's."""
    M, D, H = 256, 64, 256
    x, dy, w_up, w_down = (torch.randn(s, device=device).bfloat16() for s in ((M, D), (M, D), (H, D), (D, H)))
    p = x.double() @ w_up.double().T
    exact = (dy.double() @ w_down.double()) * torch.where(p > 0, 2 * p, 0.5 * p)
    return dp(dy, w_down, up(x, w_up, 0.5), 0.5), exact
