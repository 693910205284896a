"""Device functions of the Triton Newton-Schulz kernels: one tile of each product, and the sums of the normalisation.

The kernels that launch once per product and the one that launches once for all banks call the same functions, so equal
tiles give equal bits. CACHE is the modifier of their loads: "" where inputs come from an earlier launch, ".cg" (the
second-level cache only) where another program of the same launch has just written them.
"""

import triton
import triton.language as tl


@triton.jit
def row_squares(g_at, row, rows, cols, stride_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """|g[row]|^2 in float32, [ROWS]. g_at: pointers to g's first COLS columns, [ROWS, COLS]."""
    col = tl.arange(0, COLS).to(tl.int64)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, cols, COLS):
        inside = (row[:, None] < rows) & (start + col[None, :] < cols)
        g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
        total += g * g
        g_at += COLS * stride_col
    return tl.sum(total, axis=1)


@triton.jit
def frobenius_scale(sums_ptr, rows, eps, ROW_NORMALIZE: tl.constexpr, COLS: tl.constexpr):
    """1 / (|g|_F + eps) from the sums of squares of its rows; of the divided rows if these are normalised."""
    every = tl.arange(0, COLS)
    total = tl.zeros((COLS,), tl.float32)
    for start in range(0, rows, COLS):
        squares = tl.load(sums_ptr + start + every, mask=start + every < rows, other=0.0)
        if ROW_NORMALIZE:
            norms = tl.sqrt(squares)
            ratio = norms / tl.maximum(norms, eps)
            squares = ratio * ratio
        total += squares
    return 1.0 / (tl.sqrt(tl.sum(total, axis=0)) + eps)


@triton.jit
def lower_tile(index):
    """Row and column (<= row) of a tile, counted row by row through the lower triangle."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)  # the root may round across an integer
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit
def symmetric_product(
    u_ptr,
    v_ptr,
    out_ptr,
    tile,
    alpha,
    beta,
    gamma,
    size,
    depth,
    stride_row,
    stride_col,
    add_u,
    add_v,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CACHE: tl.constexpr,
):
    """A tile on or below the diagonal, and its mirror image, of out = alpha U V^T + beta U + gamma V.

    U, V: one matrix, [size, depth] with the strides given; out: [size, size], contiguous.
    """
    tile_row, tile_col = lower_tile(tile)
    first_row, first_col = tile_row.to(tl.int64) * BLOCK, tile_col.to(tl.int64) * BLOCK
    i, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    u_at = u_ptr + first_row * stride_row + i[:, None] * stride_row + k[None, :] * stride_col  # [BLOCK, BLOCK_K]
    v_at = v_ptr + first_col * stride_row + i[None, :] * stride_row + k[:, None] * stride_col  # [BLOCK_K, BLOCK]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(0, depth, BLOCK_K):
        acc = tl.dot(tl.load(u_at, cache_modifier=CACHE), tl.load(v_at, cache_modifier=CACHE), acc)
        u_at += BLOCK_K * stride_col
        v_at += BLOCK_K * stride_col
    acc *= alpha
    at = first_row * stride_row + first_col * stride_col + i[:, None] * stride_row + i[None, :] * stride_col
    if add_u:
        acc += beta * tl.load(u_ptr + at, cache_modifier=CACHE).to(tl.float32)
    if add_v:
        acc += gamma * tl.load(v_ptr + at, cache_modifier=CACHE).to(tl.float32)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first_row * size + first_col + i[:, None] * size + i[None, :], out)
    if tile_row != tile_col:
        tl.store(out_ptr + first_col * size + first_row + i[None, :] * size + i[:, None], out)


@triton.jit
def apply_product(
    p_ptr,
    x_ptr,
    first_m,
    first_n,
    scale,
    short,
    stride_short,
    stride_long,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CACHE: tl.constexpr,
):
    """The tile at (first_m, first_n) of scale X + P X in float32. P: [short, short], contiguous; X: [short, long]."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    p_ptr += first_m * short
    x_ptr += first_n * stride_long
    p_at = p_ptr + m[:, None] * short + k[None, :]  # [BLOCK_M, BLOCK_K]
    x_at = x_ptr + k[:, None] * stride_short + n[None, :] * stride_long  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, short, BLOCK_K):
        acc = tl.dot(tl.load(p_at, cache_modifier=CACHE), tl.load(x_at, cache_modifier=CACHE), acc)
        p_at += BLOCK_K
        x_at += BLOCK_K * stride_short
    x_ptr += first_m * stride_short
    x = tl.load(x_ptr + m[:, None] * stride_short + n[None, :] * stride_long, cache_modifier=CACHE)
    return acc + scale * x.to(tl.float32)
