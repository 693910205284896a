"""Time candidate tiles of each product in newton_schulz: `python -m benchmarks.tune_newton_schulz`, on a GPU.

As benchmarks/tune.py, it prints what it finds and with --write leaves it in this machine's own table of tiles.
Candidates compile in parallel processes first (Triton's cache on disk hands them over). Times are medians of CUDA-graph
replays with a flushed L2. The megakernel's tiles come last: they are one choice for all products of a launch.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from pgolf_kernels import tiles
from pgolf_kernels.ops.newton_schulz import megakernel, op, triton_kernel
from pgolf_kernels.ops.newton_schulz.plan import Tiles
from pgolf_kernels.ops.newton_schulz.triton_kernel import NormTile, Tile

BANKS = [(22, 512, 512), (22, 256, 512), (11, 512, 1536), (11, 1536, 512)]
SHARDS = [(3, 512, 512), (3, 256, 512), (2, 512, 1536)]  # a rank's share of eight
LAUNCHES = {"all banks": BANKS, "share": [*SHARDS, (2, 1536, 512)]}
SQUARE = [(64, 64), (128, 128)]
OBLONG = [*SQUARE, (64, 128), (128, 64), (128, 256), (256, 128)]
DEPTHS, WARPS, STAGES = (64, 128), (4, 8), (2, 3, 4)
REGISTERS = 128 if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 else 255


def candidates(blocks: list[tuple[int, int]]) -> Iterator[Tile]:
    """Tiles whose stages fit a Hopper multiprocessor and whose accumulator fits the registers."""
    for (m, n), k, warps, stages in itertools.product(blocks, DEPTHS, WARPS, STAGES):
        fits = 2 * stages * k * (m + n) <= 227 * 1024 and m * n <= 4096 * warps
        if fits and not (m * n <= 4096 and warps == 8):
            yield Tile(m, n, k, warps, stages)


NORM_TILES = [NormTile(*t) for t in itertools.product((2, 4, 8), (256, 512, 1024), (4, 8))]


def normalization(shape: tuple[int, int, int]) -> Callable[[NormTile], object]:
    """call(tile) of the two kernels that divide a bank of this shape by its norms."""
    g = torch.randn(shape, device="cuda").bfloat16()
    return lambda tile: triton_kernel.normalized(g, True, 1e-7, torch.float16, tile)


def products(shape: tuple[int, int, int]) -> Iterator[tuple[str, list, Callable[[Tile | None], object]]]:
    """Name, candidate blocks and call(tile) of the four kinds of product that a bank of this shape needs."""
    _, m, n = shape
    short_dim = 1 if m <= n else 2
    x = torch.randn(shape, device="cuda").half() / (m * n) ** 0.5
    r = triton_kernel.symmetric(x, x, short_dim, 1.0)
    yield "gram", SQUARE, lambda tile: triton_kernel.symmetric(x, x, short_dim, 1.0, tile=tile)
    yield "square", SQUARE, lambda tile: triton_kernel.symmetric(r, r, 1, 2.0, -4.0, tile=tile)
    yield "commuting", SQUARE, lambda tile: triton_kernel.symmetric(r, r, 1, 1.0, 3.0, 2.0, tile=tile)
    yield "apply", OBLONG, lambda tile: triton_kernel.apply(r, x, short_dim, 3.0, torch.empty_like(x), tile=tile)


def launch_candidates() -> Iterator[Tiles]:
    """Tiles of the megakernel: small and large symmetric products with small, oblong and large applications of P."""
    for symmetric, (m, n) in itertools.product((64, 128), ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256))):
        for warps, stages in itertools.product(WARPS, STAGES):
            if 128 * stages * max(2 * symmetric, m + n) <= 227 * 1024 and m * n <= 4096 * warps:
                # Two programs of 8 warps on a multiprocessor of Hopper; elsewhere the cap would spill.
                yield Tiles(symmetric, m, n, 64, warps, stages, REGISTERS)


def launch(shapes: list[tuple[int, int, int]]) -> Callable[[Tiles | None], object]:
    banks = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
    steps = op.schedule("quintic", 5)
    return lambda tiles: megakernel.forward(banks, steps, False, 1e-7, torch.bfloat16, tiles=tiles)


def compile_launch(tiles: Tiles) -> None:
    """As compile_tile."""
    graph_ms(lambda: launch([(1, 256, 256)])(tiles), None, rounds=0)


def compile_tile(tile: Tile) -> None:
    """Fill the disk cache: the machine code depends on layout and divisibility, so small banks stand for large ones."""
    for shape in ((1, 256, 256), (1, 256, 512), (1, 512, 256)):
        for _, blocks, call in products(shape):
            if tile[:2] in blocks:
                graph_ms(lambda c=call: c(tile), None, rounds=0)


def graph_ms(call: Callable[[], object], flush: torch.Tensor | None, rounds: int = 12) -> float | None:
    """Median time of a replay; None if the tile cannot run here."""
    try:
        call()
    except Exception as error:  # too much shared memory or too many registers: a candidate less
        print(f"skipped: {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)
        return None
    if not rounds:
        return None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(rounds):
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def table_rows(
    products_ms: dict[tuple[str, int], dict[Tile, list[float]]],
    launches: dict[str, Tiles],
    norms_ms: dict[NormTile, list[float]],
) -> dict:
    """{kernel: rows} of a table of tiles.

    Args:
        products_ms: (kernel, short side) -> tile -> times in every bank and product of that size; the least sum wins.
        launches: a key of LAUNCHES -> the megakernel's best tiles.
        norms_ms: tile of the normalisation -> times in every bank.
    """
    rows: dict[str, list[dict]] = {"symmetric": [], "apply": [], "megakernel": [], "normalize": []}

    def fastest(timed: dict) -> NamedTuple:
        most = max(map(len, timed.values()))  # a candidate that could not run everywhere is none
        return min((tile for tile in timed if len(timed[tile]) == most), key=lambda tile: math.fsum(timed[tile]))

    for (kernel, size), timed in sorted(products_ms.items()):
        best = fastest(timed)
        sides = (best.block_m, best.block_n) if kernel == "apply" else (best.block_m,)
        rows[kernel].append({"max_size": size, "min_divisor": max(sides)} | best._asdict())
    for name, bound in (("all banks", {"min_programs": 264}), ("share", {})):
        if name in launches:
            rows["megakernel"].append(bound | {"min_divisor": 128} | launches[name]._asdict())
    if norms_ms:
        rows["normalize"].append(fastest(norms_ms)._asdict())
    return {kernel: found for kernel, found in rows.items() if found}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_newton_schulz", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--write", action="store_true", help="keep the fastest ones in this machine's own table")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA GPU")
    products_ms, launches, norms_ms = {}, {}, {}
    with ProcessPoolExecutor(min(12, os.cpu_count()), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_tile, set(candidates(OBLONG)), chunksize=1))
        list(pool.map(compile_launch, launch_candidates(), chunksize=1))
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    for shape in (*BANKS, *SHARDS):
        normalize = normalization(shape)
        for tile in NORM_TILES:
            if (ms := graph_ms(lambda c=normalize, t=tile: c(t), flush)) is not None:
                norms_ms.setdefault(tile, []).append(ms)
        for name, blocks, call in products(shape):
            timed = [(graph_ms(lambda c=call, t=tile: c(t), flush), tile) for tile in candidates(blocks)]
            timed = sorted((ms, tile) for ms, tile in timed if ms is not None)
            for ms, tile in timed:
                kernel = "apply" if name == "apply" else "symmetric"
                products_ms.setdefault((kernel, min(shape[1:])), {}).setdefault(tile, []).append(ms)
            best = "  ".join(f"{1e3 * ms:.1f} us {tuple(tile)}" for ms, tile in timed[:4])
            table = graph_ms(lambda c=call: c(None), flush)
            print(f"{'x'.join(map(str, shape)):12} {name:9} table {1e3 * table:.1f} us; best {best}", flush=True)
    for name, shapes in LAUNCHES.items():
        call = launch(shapes)
        timed = [(graph_ms(lambda c=call, t=tiles: c(t), flush), tiles) for tiles in launch_candidates()]
        timed = sorted((ms, tiles) for ms, tiles in timed if ms is not None)
        if timed:
            launches[name] = timed[0][1]
        best = "  ".join(f"{1e3 * ms:.1f} us {tuple(tiles)}" for ms, tiles in timed[:4])
        table = graph_ms(lambda c=call: c(None), flush)
        print(f"{name:12} {'launch':9} table {1e3 * table:.1f} us; best {best}", flush=True)
    if options.write:
        path = tiles.own_file(tiles.gpu(torch.device("cuda", 0)))
        before = tiles.read(path) if path.exists() else {}
        tiles.write(path, before | {"newton_schulz": table_rows(products_ms, launches, norms_ms)})
        print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    main()
