"""Triton Newton-Schulz for a bank of equal matrices, in float16 inside: eight times finer than bfloat16 at equal speed.

X stays in the layout of g; `short` and `long` name its smaller and larger side, and strides do the transposing. Steps
run in blocks. Within a block everything is a polynomial of R = X X^T: products are short x short and symmetric, so only
tiles on and below the diagonal are computed, each stored twice. At the end of a block X <- (p I + P) X.
    Z = bR + cR^2        P <- aP + pZ + ZP,  p <- ap        T = aR + ZR,  R <- aT + TZ
A block of one step is the standard iteration. Blocks of several steps (the Gram form) save products with X when
long >= 2 short, at a price in accuracy: rounding grows with p, the product of the block's a. In the first block that
meets small singular values, which a power-law spectrum has many of (without any restart it diverges); in later blocks
p I + P cancels down to 1. Hence the two bounds on p below; and the identity itself is never added in 16 bits.

Inside, sides are padded with zeros to multiples of SIDE. They stay zero, so no product needs a mask.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import tiles
from .products import apply_product, frobenius_scale, row_squares, symmetric_product
from .schedule import Steps, blocks_of, single_steps

GRAM_FORM_RATIO = 2  # long / short from which the Gram form needs clearly less arithmetic
SIDE = 64


@triton.jit
def row_squares_kernel(
    g_ptr, sums_ptr, rows, cols, stride_matrix, stride_row, stride_col, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """sums[matrix, row] = |g[matrix, row]|^2 in float32."""
    matrix = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS).to(tl.int64)
    at = g_ptr + matrix * stride_matrix + row.to(tl.int64)[:, None] * stride_row + col[None, :] * stride_col
    sums = row_squares(at, row, rows, cols, stride_col, ROWS, COLS)
    tl.store(sums_ptr + matrix * rows + row, sums, mask=row < rows)


@triton.jit
def normalize_kernel(
    g_ptr,
    sums_ptr,
    x_ptr,
    eps,
    rows,
    cols,
    padded_rows,
    padded_cols,
    stride_matrix,
    stride_row,
    stride_col,
    ROW_NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """x = g, rows divided by their norms if asked, divided by its Frobenius norm; x is contiguous, its padding zero."""
    matrix = tl.program_id(1).to(tl.int64)
    sums_ptr += matrix * rows
    scale = frobenius_scale(sums_ptr, rows, eps, ROW_NORMALIZE, COLS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scales = tl.zeros((ROWS,), tl.float32) + scale
    if ROW_NORMALIZE:
        squares = tl.load(sums_ptr + row, mask=row < rows, other=1.0)
        scales = scales / tl.maximum(tl.sqrt(squares), eps)
    col = tl.arange(0, COLS).to(tl.int64)
    row_at = row.to(tl.int64)[:, None]
    g_at = g_ptr + matrix * stride_matrix + row_at * stride_row + col[None, :] * stride_col
    x_at = x_ptr + (matrix * padded_rows + row_at) * padded_cols + col[None, :]
    for start in range(0, padded_cols, COLS):
        inside = (row[:, None] < rows) & (start + col[None, :] < cols)
        g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
        stored = (row[:, None] < padded_rows) & (start + col[None, :] < padded_cols)
        tl.store(x_at, (g * scales[:, None]).to(x_ptr.dtype.element_ty), mask=stored)
        g_at += COLS * stride_col
        x_at += COLS


@triton.jit
def symmetric_kernel(
    u_ptr,
    v_ptr,
    out_ptr,
    alpha,
    beta,
    gamma,
    size,
    depth,
    stride_row,
    stride_col,
    ADD_U: tl.constexpr,
    ADD_V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = alpha U V^T + beta U + gamma V, known to be symmetric: U = V, or both symmetric and commuting.

    U, V: [matrix, size, depth] with the strides given (square if ADD_*); out: [matrix, size, size], contiguous.
    """
    across = size // BLOCK
    tiles = across * (across + 1) // 2
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    symmetric_product(
        u_ptr + matrix * size * depth,
        v_ptr + matrix * size * depth,
        out_ptr + matrix * size * size,
        tl.program_id(0) % tiles,
        alpha,
        beta,
        gamma,
        size,
        depth,
        stride_row,
        stride_col,
        ADD_U,
        ADD_V,
        BLOCK,
        BLOCK_K,
        CACHE="",
    )


@triton.jit
def apply_kernel(
    p_ptr,
    x_ptr,
    out_ptr,
    scale,
    short,
    long,
    stride_short,
    stride_long,
    out_short,
    out_long,
    out_stride_short,
    out_stride_long,
    CROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = scale X + P X. P: [matrix, short, short], contiguous; X: [matrix, short, long] with the strides given.

    out: the first out_short by out_long of it (CROP: these are fewer), with its own strides.
    """
    down, along = short // BLOCK_M, long // BLOCK_N
    matrix = (tl.program_id(0) // (down * along)).to(tl.int64)
    tile = tl.program_id(0) % (down * along)
    first_m, first_n = (tile % down).to(tl.int64) * BLOCK_M, (tile // down).to(tl.int64) * BLOCK_N
    acc = apply_product(
        p_ptr + matrix * short * short,
        x_ptr + matrix * short * long,
        first_m,
        first_n,
        scale,
        short,
        stride_short,
        stride_long,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        CACHE="",
    )
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    out_ptr += matrix * out_short * out_long + first_m * out_stride_short + first_n * out_stride_long
    out_at = out_ptr + m[:, None] * out_stride_short + n[None, :] * out_stride_long
    out = acc.to(out_ptr.dtype.element_ty)
    if CROP:
        m_inside, n_inside = tile % down * BLOCK_M + m < out_short, tile // down * BLOCK_N + n < out_long
        tl.store(out_at, out, mask=m_inside[:, None] & n_inside[None, :])
    else:
        tl.store(out_at, out)


class Tile(NamedTuple):
    """Block sizes of a product (symmetric ones use block_m both ways), warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class NormTile(NamedTuple):
    """Rows of a program and columns at a time in the two normalisation kernels."""

    rows: int
    cols: int
    num_warps: int


def norm_tile(device: torch.device) -> NormTile:
    """The table's; the megakernel adds up squares with the same one, so that both give the same norms."""
    return tiles.tile(tiles.gpu(device), "newton_schulz", "normalize", NormTile)


def symmetric_tile(device: torch.device, matrices: int, size: int) -> Tile:
    """The table's, by size, the power of 2 (to 256) in it, and the programs that 128-wide tiles would make.

    64-wide tiles waste less of the triangle: up to size 512 faster on an H200 (10.9 us against 12.3 at 11 x 512^2).
    Larger matrices take 128-wide ones, which load half as much, once these occupy most multiprocessors of a large GPU.
    """
    across = size // 128
    facts = {"size": size, "divisor": math.gcd(size, 256), "programs": matrices * across * (across + 1) // 2}
    return tiles.tile(tiles.gpu(device), "newton_schulz", "symmetric", Tile, **facts)


def apply_tile(device: torch.device, matrices: int, short: int, long: int) -> Tile:
    """The table's, by `short` as size, the power of 2 (to 256) in both sides, and the programs of 128-wide tiles.

    These once they occupy most multiprocessors of a large GPU: 64-wide ones load twice as much.
    """
    programs = matrices * (short // 128) * (long // 128)
    facts = {"size": short, "divisor": math.gcd(short, long, 256), "programs": programs}
    return tiles.tile(tiles.gpu(device), "newton_schulz", "apply", Tile, **facts)


def _count(side: int, block: int) -> int:
    """Tiles along a side. Products have no masks, so a row of the table that has no fitting min_divisor is refused."""
    if side % block:
        raise ValueError(f"newton_schulz: a tile of {block} does not divide {side}; its row needs a min_divisor")
    return side // block


def normalized(g: Tensor, row_normalize: bool, eps: float, dtype: torch.dtype, tile: NormTile | None = None) -> Tensor:
    """(matrices, rows, cols), any strides -> padded, contiguous, in dtype, Frobenius norms 1."""
    tile = tile or norm_tile(g.device)
    matrices, rows, cols = g.shape
    padded_rows, padded_cols = (triton.cdiv(side, SIDE) * SIDE for side in (rows, cols))
    sums = torch.empty(matrices, rows, dtype=torch.float32, device=g.device)
    x = torch.empty(matrices, padded_rows, padded_cols, dtype=dtype, device=g.device)
    row_squares_kernel[(triton.cdiv(rows, tile.rows), matrices)](
        g, sums, rows, cols, *g.stride(), ROWS=tile.rows, COLS=tile.cols, num_warps=tile.num_warps
    )
    normalize_kernel[(triton.cdiv(padded_rows, tile.rows), matrices)](
        g,
        sums,
        x,
        eps,
        rows,
        cols,
        padded_rows,
        padded_cols,
        *g.stride(),
        ROW_NORMALIZE=row_normalize,
        ROWS=tile.rows,
        COLS=tile.cols,
        num_warps=tile.num_warps,
    )
    return x


def symmetric(
    u: Tensor, v: Tensor, short_dim: int, alpha: float, beta: float = 0.0, gamma: float = 0.0, tile: Tile | None = None
) -> Tensor:
    """alpha U V^T + beta U + gamma V, summed over the dimension other than `short_dim`; sides are multiples of SIDE."""
    matrices, size, depth = len(u), u.shape[short_dim], u.shape[3 - short_dim]
    out = torch.empty(matrices, size, size, dtype=u.dtype, device=u.device)
    tile = tile or symmetric_tile(u.device, matrices, size)
    across = _count(size, tile.block_m)
    symmetric_kernel[(matrices * across * (across + 1) // 2,)](
        u,
        v,
        out,
        alpha,
        beta,
        gamma,
        size,
        depth,
        u.stride(short_dim),
        u.stride(3 - short_dim),
        ADD_U=beta != 0,
        ADD_V=gamma != 0,
        BLOCK=tile.block_m,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def apply(p: Tensor, x: Tensor, short_dim: int, scale: float, out: Tensor, tile: Tile | None = None) -> Tensor:
    """out = scale X + P X in x's orientation; out may be smaller than x, and takes its first rows and columns."""
    short, long = x.shape[short_dim], x.shape[3 - short_dim]
    tile = tile or apply_tile(x.device, len(x), short, long)
    apply_kernel[(len(x) * _count(short, tile.block_m) * _count(long, tile.block_n),)](
        p,
        x,
        out,
        scale,
        short,
        long,
        x.stride(short_dim),
        x.stride(3 - short_dim),
        out.shape[short_dim],
        out.shape[3 - short_dim],
        out.stride(short_dim),
        out.stride(3 - short_dim),
        CROP=out.shape != x.shape,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _polynomial(r: Tensor, block: tuple) -> tuple[float, Tensor]:
    """p and P such that the steps of `block` together are X <- (p I + P) X, from R = X X^T."""
    p, total = 1.0, None
    for index, (a, b, c) in enumerate(block):
        z = symmetric(r, r, 1, alpha=c, beta=b)
        total = z if total is None else symmetric(z, total, 1, alpha=1.0, beta=p, gamma=a)
        p *= a
        if index + 1 < len(block):
            t = symmetric(z, r, 1, alpha=1.0, gamma=a)
            r = symmetric(t, z, 1, alpha=1.0, beta=a)
    return p, total


@functools.cache
def fits_float16(blocks: tuple) -> bool:
    """Whether every intermediate stays far below float16's 65504, for all singular values in [0, 1]."""
    bound = 2.0**12
    for start in range(257):
        s = start / 256
        for block in blocks:
            p, total, r = 1.0, 1.0, s * s
            for a, b, c in block:
                z = b * r + c * r * r
                p, total, r = p * a, total * (a + z), r * (a + z) ** 2
                if not max(abs(z), abs(total - p), r) < bound:
                    return False
            s *= total
    return True


def blocks_and_format(m: int, n: int, coefficients: Steps, dtype: torch.dtype, plain: bool) -> tuple:
    """The blocks of steps for m x n matrices, and the 16-bit format that holds what they compute."""
    if plain:
        return single_steps(coefficients), dtype
    # The Gram form spends some of float16's extra bits, so a caller who wants float16 accuracy gets the standard form.
    gram_form = dtype == torch.bfloat16 and max(m, n) >= GRAM_FORM_RATIO * min(m, n)
    blocks = blocks_of(coefficients) if gram_form else single_steps(coefficients)
    return (blocks, torch.float16) if fits_float16(blocks) else (single_steps(coefficients), torch.bfloat16)


def forward(
    g: Tensor, coefficients: Steps, row_normalize: bool, eps: float, dtype: torch.dtype, plain: bool = False
) -> Tensor:
    """As reference.forward, for dtype bfloat16 or float16 and at least one step.

    plain: the standard form with every intermediate in `dtype`, the arithmetic of the published systems.
    """
    *_, m, n = g.shape
    blocks, inner = blocks_and_format(m, n, coefficients, dtype, plain)
    with torch.cuda.device_of(g):
        x = normalized(g.reshape(-1, m, n), row_normalize, eps, inner)
        short_dim = 1 if m <= n else 2
        result = torch.empty(len(x), m, n, dtype=dtype, device=g.device)
        for index, block in enumerate(blocks):
            p, total = _polynomial(symmetric(x, x, short_dim, alpha=1.0), block)
            x = apply(total, x, short_dim, p, result if index + 1 == len(blocks) else torch.empty_like(x))
    return result.view(g.shape)
