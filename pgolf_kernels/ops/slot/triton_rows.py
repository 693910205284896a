"""What SLOT's Triton kernels are launched with: the rows that take part, their base logits, and the tables' tiles."""

from typing import NamedTuple

import torch
import triton

from ... import tiles
from .cuda_kernel import products
from .problem import Fit, Score

SEGMENT = 32  # rows, the unit of every sum; no tile, for a window's bits depend on it
LARGEST_PLAIN_CAP = 60.0  # up to here sums of exp(l) over a vocabulary need no maximum in float32


class SweepTile(NamedTuple):
    """Of the sweep and the scores: logits of a program at a time, but at least a row; delta's elements at a time."""

    logits: int
    block_d: int
    num_warps: int


class RowsTile(NamedTuple):
    """Columns of the vocabulary that a program works on."""

    block_v: int
    num_warps: int


class DepthTile(NamedTuple):
    """Elements of delta that a program works on."""

    block_d: int
    num_warps: int


class WeightTile(NamedTuple):
    """Rows and columns of the weight that a program holds at a time."""

    block_v: int
    block_d: int
    num_warps: int


class _Tiles:
    """The tables' tiles on a GPU."""

    def __init__(self, device: torch.device, columns: int) -> None:
        on = tiles.gpu(device)
        self.sweep = tiles.tile(on, "slot", "sweep", SweepTile, columns=columns)
        self.project = tiles.tile(on, "slot", "project", WeightTile)
        self.reduce = tiles.tile(on, "slot", "reduce", RowsTile)
        self.add_rows = tiles.tile(on, "slot", "add_rows", DepthTile)
        self.descend = tiles.tile(on, "slot", "descend", WeightTile)


class Rows:
    """The rows that take part, gathered and multiplied with the head; tables of the layout on the device."""

    def __init__(self, p: Fit | Score) -> None:
        self.p, self.weight, device = p, p.weight.contiguous(), p.hidden.device
        B, T, D = p.hidden.shape
        V, scored = len(self.weight), isinstance(p, Score)
        self.columns = max(16, triton.next_power_of_2(V))
        self.tiles = _Tiles(device, self.columns)
        self.room = p.num_rows if p.told is None else p.told
        keep = p.rows if scored else p.weights > 0  # [B, T]
        self.found = keep.sum(1)
        wild = keep & ((p.targets < 0) | (p.targets >= V))
        if all(n == self.room[0] for n in self.room):  # no copy from the host: a graph may hold this
            room = torch.full((B,), self.room[0], device=device)
        else:
            room = torch.tensor(self.room).to(device, non_blocking=True)
        self.impossible = wild.any(1) | (self.found > room)
        if not scored:
            self.impossible |= ~((p.mask >= 0) & (p.mask < torch.inf)).all(1)
        num_segments = [-(-n // SEGMENT) for n in self.room]
        self.S = sum(num_segments)
        ends = (room + SEGMENT - 1).div(SEGMENT, rounding_mode="floor").cumsum(0)
        self.first_segment = torch.nn.functional.pad(ends, (1, 0))  # [B + 1]
        self.first_output = torch.nn.functional.pad(room.cumsum(0), (1, 0))
        segments = torch.arange(self.S, device=device)
        self.segment_window = torch.searchsorted(ends, segments, right=True)  # [S]

        rows = torch.arange(self.S * SEGMENT, device=device)
        window = self.segment_window.repeat_interleave(SEGMENT, output_size=len(rows))
        local = rows - self.first_segment[window] * SEGMENT
        order = keep.logical_not().sort(dim=1, stable=True).indices  # the rows that take part, then the others
        at = window * T + order[window, local.clamp(max=T - 1)]
        self.target = p.targets.flatten()[at].clamp(0, V - 1)
        self.row_weight = None if scored else p.weights.flatten()[at].where(local < self.found[window], 0.0)
        first_row = [0]
        for n in num_segments:
            first_row.append(first_row[-1] + n * SEGMENT)
        groups = products(first_row, V)
        size = max((first + count for _, _, first, count in groups), default=0)
        self.hidden = p.hidden.new_empty(size, D)
        torch.index_select(p.hidden.reshape(-1, D), 0, at, out=self.hidden[: len(at)])
        self.logits = p.hidden.new_empty(size, -(-V // 8) * 8)
        for _, _, first, count in groups:
            torch.mm(self.hidden[first : first + count], self.weight.T, out=self.logits[first : first + count, :V])

    def options(self) -> dict:
        """What the sweep and the scores share."""
        p, tile = self.p, self.tiles.sweep
        return {
            "BEFORE": p.norm == "before",
            "CAPPED": p.softcap is not None,
            "PLAIN": p.softcap is not None and p.softcap <= LARGEST_PLAIN_CAP,
            "SEGMENT": SEGMENT,
            "ROWS": max(1, min(SEGMENT, tile.logits // self.columns)),
            "BLOCK_V": self.columns,
            "BLOCK_D": tile.block_d,
            "num_warps": tile.num_warps,
        }
