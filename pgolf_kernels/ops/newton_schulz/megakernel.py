"""Triton Newton-Schulz for several banks of different shapes in two launches, however many steps and matrices.

Launched product by product (triton_kernel.py) a bank takes 17 to 20 launches, which cost more than its arithmetic.
Here the first launch sums the squares of all rows and clears the counters; the second has a program for each item of
plan.py: a tile of one product. A program draws a ticket, an index into the list of items, from an atomic counter, waits
until its item's inputs are complete, and ends with its item.

Nobody waits for ever, whatever number of programs fits the GPU and in whatever order it starts them: tickets are drawn
in order, and an item depends on earlier ones only, which are finished or held by programs that already run. A loop over
tickets in fewer programs works too and was tried: LLVM moves the index arithmetic of all kinds of items in front of
such a loop, and twice the registers mean half the programs on a multiprocessor.

How a tile written by one multiprocessor reaches another one. The writer: all threads store, a barrier orders these
stores before thread 0's atomic addition, which is a release at the scope of the GPU (MEMBAR.ALL.GPU, then RED). The
reader: thread 0 reads the counter with acquire until it suffices (LDG.STRONG.GPU, then CCTL.IVALL, which empties the
first-level cache), and a barrier, by which the value reaches all threads, orders their loads after it. Those loads go
to the second-level cache, where the stores are: cp.async.cg in the products, ld.cg elsewhere, never ld.nc, and no TMA,
whose loads would need a fence between the proxies. The plan, the sums and the cleared counters come from earlier
launches and need none of this. Counters belong to one call, so calls on different streams cannot meet.

X is stored short x long, transposed where the matrices are tall, so one loop per kind of product serves all banks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...multi_tensor import TL_DTYPES, address_table, aligned, pointer
from ...tiles import gpu
from . import plan, triton_kernel
from .plan import COLUMNS, Bank, Tiles
from .products import apply_product, frobenius_scale, row_squares, symmetric_product

MAX_SHORT = 2048  # larger matrices gain nothing: there 20 launches are under a twentieth of a bank's arithmetic
COUNTER_STRIDE = 32  # int32 from one counter to the next: a cache line each
_COLUMNS = tl.constexpr(COLUMNS)
_NORMALIZE, _SYMMETRIC, _APPLY = (tl.constexpr(kind) for kind in (plan.NORMALIZE, plan.SYMMETRIC, plan.APPLY))
_ROWS_PER_WARP = tl.constexpr(plan.NORM_ROWS_PER_WARP)
_COUNTER_STRIDE = tl.constexpr(COUNTER_STRIDE)


@triton.jit
def bank_row_squares_kernel(
    addresses_ptr,
    sums_ptr,
    counters_ptr,
    num_counters,
    rows_ptr,
    num_banks,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """sums = squared norms of the rows of all banks, [all rows] in float32; counters = 0. rows: see plan.Plan."""
    block = tl.program_id(0)
    if block == 0:
        for start in range(0, num_counters, COLS):
            at = start + tl.arange(0, COLS)
            tl.store(counters_ptr + at, tl.zeros((COLS,), tl.int32), mask=at < num_counters)
    every = tl.arange(0, PADDED)
    starts = tl.load(rows_ptr + num_banks + every, mask=every < num_banks, other=9223372036854775807)
    bank = tl.sum((starts <= block).to(tl.int32), axis=0) - 1
    rows, cols = tl.load(rows_ptr + bank), tl.load(rows_ptr + 2 * num_banks + bank)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
    row = (block - tl.load(rows_ptr + num_banks + bank)) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS).to(tl.int64)
    g_at = pointer(addresses_ptr, bank, G_DTYPE, ALIGNED) + row[:, None] * cols + col[None, :]
    sums = row_squares(g_at, row, rows, cols, 1, ROWS, COLS)
    tl.store(sums_ptr + tl.load(rows_ptr + 3 * num_banks + bank) + row, sums, mask=row < rows)


@triton.jit
def _normalize(
    g_ptr,
    sums_ptr,
    x_ptr,
    first_row,
    rows,
    cols,
    padded_cols,
    long,
    tall,
    eps,
    ROW_NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SUM_COLS: tl.constexpr,
):
    """ROWS rows of g, divided as the normalisation asks, to X, whose lines are `long` apart; its padding is zero."""
    scale = frobenius_scale(sums_ptr, rows, eps, ROW_NORMALIZE, SUM_COLS)
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    exists = row < rows - first_row
    scales = tl.zeros((ROWS,), tl.float32) + scale
    if ROW_NORMALIZE:
        squares = tl.load(sums_ptr + first_row + row, mask=exists, other=1.0)
        scales = scales / tl.maximum(tl.sqrt(squares), eps)
    g_ptr += first_row.to(tl.int64) * cols
    x_ptr += tl.where(tall, first_row.to(tl.int64), first_row.to(tl.int64) * long)
    for start in range(0, padded_cols, COLS):
        inside = exists[:, None] & (col < cols - start)[None, :]
        g = tl.load(g_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
        x = (g * scales[:, None]).to(x_ptr.dtype.element_ty)
        stored = (col < padded_cols - start)[None, :]
        if tall:
            tl.store(x_ptr + col[None, :] * long + row[:, None], x, mask=stored)
            x_ptr += COLS * long
        else:
            tl.store(x_ptr + row[:, None] * long + col[None, :], x, mask=stored)
            x_ptr += COLS
        g_ptr += COLS


@triton.jit
def mega_kernel(
    addresses_ptr,
    sums_ptr,
    work_ptr,
    counters_ptr,
    items_ptr,
    products_ptr,
    scalars_ptr,
    num_banks,
    eps,
    ROW_NORMALIZE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    BLOCK: tl.constexpr,
    APPLY_M: tl.constexpr,
    APPLY_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM_COLS: tl.constexpr,
):
    """One item of the plan. addresses: of the banks, then of their results.

    counters: the next ticket, then the number of finished items of each matrix, COUNTER_STRIDE apart.
    """
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu").to(tl.int64)
    item_ptr = items_ptr + ticket * 4
    product, matrix, tile = tl.load(item_ptr), tl.load(item_ptr + 1).to(tl.int64), tl.load(item_ptr + 2)
    need = tl.load(item_ptr + 3)
    done_ptr = counters_ptr + (1 + matrix) * _COUNTER_STRIDE
    product_ptr = products_ptr + product * _COLUMNS
    kind = tl.load(product_ptr)
    matrix -= tl.load(product_ptr + 1)
    left, right, out = tl.load(product_ptr + 2), tl.load(product_ptr + 3), tl.load(product_ptr + 4)
    short = tl.multiple_of(tl.load(product_ptr + 5).to(tl.int32), 64)
    long = tl.multiple_of(tl.load(product_ptr + 6).to(tl.int32), 64)
    alpha = tl.load(scalars_ptr + product * 3)
    if need > 0:
        done = tl.atomic_add(done_ptr, 0, sem="acquire", scope="gpu")
        while done < need:
            done = tl.atomic_add(done_ptr, 0, sem="acquire", scope="gpu")

    if kind == _SYMMETRIC:
        beta, gamma = tl.load(scalars_ptr + product * 3 + 1), tl.load(scalars_ptr + product * 3 + 2)
        symmetric_product(
            work_ptr + tl.multiple_of(left + matrix * short * long, 64),
            work_ptr + tl.multiple_of(right + matrix * short * long, 64),
            work_ptr + tl.multiple_of(out + matrix * short * short, 64),
            tile,
            alpha,
            beta,
            gamma,
            short,
            long,
            long,
            1,
            beta != 0,
            gamma != 0,
            BLOCK,
            BLOCK_K,
            CACHE=".cg",
        )
    else:
        rows, cols = tl.load(product_ptr + 7).to(tl.int32), tl.load(product_ptr + 8).to(tl.int32)
        tall, bank = tl.load(product_ptr + 9) != 0, tl.load(product_ptr + 10)
        if ALIGNED:
            cols = tl.multiple_of(cols, 16)
        at_bank = tl.multiple_of(matrix * rows * cols, 16) if ALIGNED else matrix * rows * cols
        if kind == _NORMALIZE:
            _normalize(
                pointer(addresses_ptr, bank, G_DTYPE, ALIGNED) + at_bank,
                sums_ptr + right + matrix * rows,
                work_ptr + tl.multiple_of(out + matrix * short * long, 64),
                tile * NUM_WARPS * _ROWS_PER_WARP,
                rows,
                cols,
                tl.where(tall, short, long),
                long,
                tall,
                eps,
                ROW_NORMALIZE,
                NUM_WARPS * _ROWS_PER_WARP,
                128,
                SUM_COLS,
            )
        else:
            down = short // APPLY_M
            first_m, first_n = (tile % down).to(tl.int64) * APPLY_M, (tile // down).to(tl.int64) * APPLY_N
            acc = apply_product(
                work_ptr + tl.multiple_of(left + matrix * short * short, 64),
                work_ptr + tl.multiple_of(right + matrix * short * long, 64),
                first_m,
                first_n,
                alpha,
                short,
                long,
                1,
                APPLY_M,
                APPLY_N,
                BLOCK_K,
                CACHE=".cg",
            )
            m, n = tl.arange(0, APPLY_M), tl.arange(0, APPLY_N)
            if kind == _APPLY:
                out_ptr = work_ptr + tl.multiple_of(out + matrix * short * long + first_m * long + first_n, 64)
                tl.store(out_ptr + m[:, None] * long + n[None, :], acc.to(work_ptr.dtype.element_ty))
            else:
                result_ptr = pointer(addresses_ptr, num_banks + bank, OUT_DTYPE, ALIGNED) + at_bank
                result = acc.to(OUT_DTYPE)
                if tall:
                    inside = (m < cols - first_m)[:, None] & (n < rows - first_n)[None, :]
                    tl.store(result_ptr + first_n * cols + first_m + n[None, :] * cols + m[:, None], result, inside)
                else:
                    inside = (m < rows - first_m)[:, None] & (n < cols - first_n)[None, :]
                    tl.store(result_ptr + first_m * cols + first_n + m[:, None] * cols + n[None, :], result, inside)

    tl.debug_barrier()  # every thread has stored before thread 0 says so
    tl.atomic_add(done_ptr, 1, sem="release", scope="gpu")


def _launch(
    banks: list[Tensor],
    results: list[Tensor],
    shapes: tuple[Bank, ...],
    row_normalize: bool,
    eps: float,
    inner: torch.dtype,
    tiles: Tiles | None,
) -> None:
    """results[i] = Newton-Schulz of banks[i], all contiguous, [matrices, rows, cols], of one dtype each."""
    device = banks[0].device
    tiles = tiles or plan.choose_tiles(gpu(device), shapes)
    norm = triton_kernel.norm_tile(device)
    made = plan.make(shapes, tiles, norm.rows, device)
    sums = torch.empty(made.num_sums, dtype=torch.float32, device=device)
    work = torch.empty(made.num_elements, dtype=inner, device=device)
    counters = torch.empty((1 + made.num_matrices) * COUNTER_STRIDE, dtype=torch.int32, device=device)
    addresses = [t.data_ptr() for t in (*banks, *results)]
    even = aligned(addresses) and aligned([bank.cols for bank in shapes])
    table = address_table(addresses, device)
    row_blocks = sum(-(-bank.matrices * bank.rows // norm.rows) for bank in shapes)
    bank_row_squares_kernel[(row_blocks,)](
        table,
        sums,
        counters,
        counters.numel(),
        made.rows,
        len(banks),
        G_DTYPE=TL_DTYPES[banks[0].dtype],
        ALIGNED=even,
        PADDED=triton.next_power_of_2(len(banks)),
        ROWS=norm.rows,
        COLS=norm.cols,
        num_warps=norm.num_warps,
    )
    mega_kernel[(len(made.items),)](
        table,
        sums,
        work,
        counters,
        made.items,
        made.products,
        made.scalars,
        len(banks),
        eps,
        ROW_NORMALIZE=row_normalize,
        G_DTYPE=TL_DTYPES[banks[0].dtype],
        OUT_DTYPE=TL_DTYPES[results[0].dtype],
        ALIGNED=even,
        NUM_WARPS=tiles.num_warps,
        BLOCK=tiles.symmetric,
        APPLY_M=tiles.apply_m,
        APPLY_N=tiles.apply_n,
        BLOCK_K=tiles.block_k,
        SUM_COLS=norm.cols,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.registers,
    )


def forward(
    banks: list[Tensor],
    coefficients: tuple[tuple[float, float, float], ...],
    row_normalize: bool,
    eps: float,
    dtype: torch.dtype,
    plain: bool = False,
    tiles: Tiles | None = None,
) -> list[Tensor]:
    """As triton_kernel.forward of each bank; banks: non-empty, of one dtype and on one device.

    A bank whose smaller side exceeds MAX_SHORT is left to triton_kernel, which is launched for each of its products.
    """
    results, together = [], {}
    for g in banks:
        *_, m, n = g.shape
        if min(m, n) > MAX_SHORT:
            results.append(triton_kernel.forward(g, coefficients, row_normalize, eps, dtype, plain))
            continue
        blocks, inner = triton_kernel.blocks_and_format(m, n, coefficients, dtype, plain)
        bank = g.reshape(-1, m, n).contiguous()
        results.append(torch.empty(g.shape, dtype=dtype, device=g.device))
        together.setdefault(inner, []).append((bank, results[-1], Bank(len(bank), m, n, blocks)))
    with torch.cuda.device_of(banks[0]):
        for inner, group in together.items():
            some_banks, some_results, shapes = zip(*group, strict=True)
            _launch(list(some_banks), list(some_results), shapes, row_normalize, eps, inner, tiles)
    return results
