"""The work of the persistent Newton-Schulz kernel as one list of items, each a tile of one product of one matrix.

The products of a matrix form phases, each of which needs all of the one before. So one counter per matrix, of finished
items, is all the bookkeeping: an item may start once the counter has reached `need`, the number of items in the
phases before its own. Items are listed by how many phases follow theirs, longest first: every matrix then advances at
the pace that makes all end together, and between two phases of one matrix stand the tiles of all others, which hides
that its programs wait for each other. An item depends only on items that precede it in the list.
"""

import functools
import math
from typing import NamedTuple

import torch

from ... import tiles
from ...multi_tensor import to_device_once
from .schedule import Steps

NORMALIZE, SYMMETRIC, APPLY, FINAL = range(4)
COLUMNS = 11  # of `products`: kind, first matrix, left, right, out, short, long, rows, cols, tall, bank
NORM_ROWS_PER_WARP = 8


class Tiles(NamedTuple):
    """Sides of the tiles: symmetric products are square; warps, pipeline stages and the registers of a thread."""

    symmetric: int
    apply_m: int
    apply_n: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int


class Bank(NamedTuple):
    """`matrices` of rows x cols, and the blocks of steps that they take."""

    matrices: int
    rows: int
    cols: int
    blocks: tuple[Steps, ...]


class Plan(NamedTuple):
    """What the kernels read, on the device, and how much memory they need.

    items: int32 [num_items, 4]: product, matrix (counted through all banks), tile, need.
    products: int64 [num_products, COLUMNS]; offsets count elements of the workspace, `right` of NORMALIZE sums.
    scalars: float32 [num_products, 3]: alpha, beta, gamma.
    rows: int64 [4, num_banks]: rows of all its matrices, first block of rows, columns, first sum.
    """

    items: torch.Tensor
    products: torch.Tensor
    scalars: torch.Tensor
    rows: torch.Tensor
    num_matrices: int
    num_sums: int
    num_elements: int


def _padded(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def choose_tiles(on: tiles.Gpu, banks: tuple[Bank, ...]) -> Tiles:
    """The table's: 128-wide tiles, which load half as much, where they occupy a large GPU and need no more padding.

    programs: 128-wide symmetric tiles of all matrices; divisor: the power of 2 (to 256) in all sides padded to 64.
    """
    sides = [_padded(side, 64) for bank in banks for side in (bank.rows, bank.cols)]
    across = [_padded(min(bank.rows, bank.cols), 128) // 128 for bank in banks]
    programs = sum(bank.matrices * n * (n + 1) // 2 for bank, n in zip(banks, across, strict=True))
    return tiles.tile(on, "newton_schulz", "megakernel", Tiles, programs=programs, divisor=math.gcd(*sides, 256))


class _Layout:
    """Offsets of a bank's buffers in the workspace, by name, made as they are first used."""

    def __init__(self, bank: Bank, start: int, tiles: Tiles):
        self.bank, self.end = bank, start
        self.short = _padded(min(bank.rows, bank.cols), max(tiles.symmetric, tiles.apply_m, tiles.block_k))
        self.long = _padded(max(bank.rows, bank.cols), max(tiles.apply_n, tiles.block_k))
        self.offsets: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        if name not in self.offsets:
            self.offsets[name] = self.end
            self.end += self.bank.matrices * self.short * (self.long if name.startswith("X") else self.short)
        return self.offsets[name]


def _phases(at: _Layout, blocks: tuple[Steps, ...]) -> list[list[tuple]]:
    """Products (kind, left, right, out, depth, alpha, beta, gamma) of one matrix, in phases: those of triton_kernel.

    A phase may overwrite what only earlier phases read, as r and z do. The first z of a block is its first sum, so the
    second z takes another buffer, and the sums take turns.
    """
    short, long = at.short, at.long
    phases, x = [], "X0"
    for index, block in enumerate(blocks):
        phases.append([(SYMMETRIC, at[x], at[x], at["R"], long, 1.0, 0.0, 0.0)])
        p, total = 1.0, None
        for step, (a, b, c) in enumerate(block):
            z = "P0" if total is None else "Z"
            phases.append([(SYMMETRIC, at["R"], at["R"], at[z], short, c, b, 0.0)])
            beside = []
            if total is None:
                total = z
            else:
                summed = "P1" if total == "P0" else "P0"
                beside.append((SYMMETRIC, at[z], at[total], at[summed], short, 1.0, p, a))
                total = summed
            p *= a
            if step + 1 < len(block):
                beside.append((SYMMETRIC, at[z], at["R"], at["T"], short, 1.0, 0.0, a))
                phases += [beside, [(SYMMETRIC, at["T"], at[z], at["R"], short, 1.0, a, 0.0)]]
            elif beside:
                phases.append(beside)
        last = index + 1 == len(blocks)
        following = "X1" if x == "X0" else "X0"
        phases.append([(FINAL if last else APPLY, at[total], at[x], 0 if last else at[following], long, p, 0.0, 0.0)])
        x = following
    return phases


def _num_tiles(kind: int, at: _Layout, tiles: Tiles) -> int:
    if kind == NORMALIZE:
        return (at.short if at.bank.rows <= at.bank.cols else at.long) // (NORM_ROWS_PER_WARP * tiles.num_warps)
    if kind == SYMMETRIC:
        across = at.short // tiles.symmetric
        return across * (across + 1) // 2
    return (at.short // tiles.apply_m) * (at.long // tiles.apply_n)


@functools.cache
def make(banks: tuple[Bank, ...], tiles: Tiles, norm_rows: int, device: torch.device) -> Plan:
    """The plan for these banks on `device`; norm_rows: how many rows a program of the first kernel sums."""
    products, scalars, rows, groups = [], [], [], []
    end = matrices = sums = row_blocks = 0
    for index, bank in enumerate(banks):
        at = _Layout(bank, end, tiles)
        phases = [[(NORMALIZE, 0, sums, at["X0"], at.long, 0.0, 0.0, 0.0)], *_phases(at, bank.blocks)]
        need = 0
        for number, phase in enumerate(phases):
            finished = 0
            for kind, left, right, out, depth, *factors in phase:
                count = _num_tiles(kind, at, tiles)
                groups.append((len(phases) - number, depth, len(products), matrices, bank.matrices, count, need))
                shape = (at.short, depth, bank.rows, bank.cols, int(bank.rows > bank.cols), index)
                products.append((kind, matrices, left, right, out, *shape))
                scalars.append(factors)
                finished += count
            need += finished
        rows.append((bank.matrices * bank.rows, row_blocks, bank.cols, sums))
        row_blocks += -(-bank.matrices * bank.rows // norm_rows)
        sums += bank.matrices * bank.rows
        matrices += bank.matrices
        end = at.end
    items = []
    for _, _, product, first, num_matrices, count, need in sorted(groups, key=lambda group: (-group[0], -group[1])):
        tile = torch.arange(num_matrices * count)
        columns = (torch.full_like(tile, product), first + tile // count, tile % count, torch.full_like(tile, need))
        items.append(torch.stack(columns, dim=1))
    return Plan(
        to_device_once(torch.cat(items), torch.int32, device),
        to_device_once(products, torch.int64, device),
        to_device_once(scalars, torch.float32, device),
        to_device_once(list(zip(*rows, strict=True)), torch.int64, device),
        matrices,
        sums,
        end,
    )
