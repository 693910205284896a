"""Batches from shards, bit for bit those of the published systems; the order is fixed by the data, not by a seed.

SequentialLoader reads the shards as one endless stream. CoprimeLoader visits each shard's blocks in a stride coprime to
their number and mixes several shards in a batch. ShuffledLoader draws every window by chance from its slice of the
shards. All know only whole batches: every rank draws the same one and keeps its share, so the union over ranks is the
one-rank batch, and micro-batches are for the caller to cut.
"""

import bisect
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .shards import open_shard

# The published runs used eight ranks. The coprime loader's mixing width and the slices of the other two depend on that
# number; keeping it at eight makes the batches of 1, 2, 4 and 8 ranks the same.
REFERENCE_RANKS = 8
MIXING_BATCHES = 1800  # batches over which the coprime loader widens its mix
MASK64 = (1 << 64) - 1


def seed_path(shard: Path) -> str:
    """The name under which the challenge's scripts open a shard; it does not change when the data is moved."""
    shard = Path(os.path.normpath(Path(shard).absolute()))  # links stay: the name the user sees counts
    return f"data/datasets/{shard.parent.name}/{shard.name}"


def coprime_seed(paths: list[str]) -> int:
    """The generator's seed: a 64-bit FNV-like fold over the bytes of the shards' path strings."""
    seed = 0
    for byte in "".join(paths).encode():
        seed = ((seed ^ byte) * 1099511628211) & MASK64
    return seed


class _Loader:
    """What all loaders share: the shards, the shape of a batch and this rank's share of it."""

    kind: str

    def __init__(
        self, shards: list[Path], seq_len: int, batch_tokens: int, rank: int, world_size: int, pin_memory: bool
    ) -> None:
        if not shards:
            raise InputError("loader: at least one training shard is needed, got none")
        if seq_len < 1 or batch_tokens < 1 or batch_tokens % seq_len:
            raise InputError(f"loader: batch_tokens {batch_tokens} must be a positive multiple of seq_len {seq_len}")
        windows = batch_tokens // seq_len
        if not 0 <= rank < world_size or windows % world_size:
            raise InputError(
                f"loader: a batch of {windows} windows must divide evenly over the ranks, got {rank=} of {world_size}"
            )
        self.shards = [open_shard(path) for path in shards]
        self.seq_len, self.num_windows = seq_len, windows
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        if not any(len(tokens) > seq_len for tokens in self.shards):
            raise InputError(
                f"loader: a shard must hold at least seq_len + 1 = {seq_len + 1} tokens, "
                f"got at most {max(map(len, self.shards))}; use more text or a smaller train_seq_len"
            )

    def _split(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint16 [local windows, seq_len + 1] -> inputs and targets, int64 [local windows, seq_len]."""
        shape = (len(windows), self.seq_len)
        x, y = (torch.empty(shape, dtype=torch.int64, pin_memory=self.pin_memory) for _ in range(2))
        x.numpy()[:] = windows[:, :-1]
        y.numpy()[:] = windows[:, 1:]
        return x, y

    def _shape(self) -> dict:
        """What a saved state must agree on. Ranks are not in it: a run may be resumed on another number of them."""
        return {
            "kind": self.kind,
            "seq_len": self.seq_len,
            "num_windows": self.num_windows,
            "shard_tokens": [len(tokens) for tokens in self.shards],
        }

    def _check(self, state: dict) -> None:
        for name, value in self._shape().items():
            if state.get(name) != value:
                raise InputError(
                    f"loader: cannot resume, {name} must be as saved, {state.get(name)!r}, got {value!r}; "
                    "resume with the same data, loader, train_seq_len and train_batch_tokens"
                )


class SequentialLoader(_Loader):
    """One stream over all shards, wrapping at the end.

    A batch is cut into slices of n + 1 consecutive tokens (n inputs, and each one's successor as target); rank r of W
    takes slices r, r + W, ... Each slice's first token is therefore never a target, as in the published systems.

    Args:
        shards: paths in reading order.
        seq_len: window length in tokens.
        batch_tokens: targets per batch over all ranks.
        slices: slices per batch, a multiple of world_size. Default: 8 where ranks and windows allow, so that the
            batches do not depend on the number of ranks; otherwise one per rank.
    """

    kind = "sequential"

    def __init__(
        self,
        shards: list[Path],
        seq_len: int,
        batch_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        slices: int | None = None,
    ) -> None:
        super().__init__(shards, seq_len, batch_tokens, rank, world_size, pin_memory)
        if slices is None:
            slices = math.gcd(self.num_windows, REFERENCE_RANKS)
            slices = slices if slices % world_size == 0 else world_size
        if slices < 1 or slices % world_size or self.num_windows % slices:
            raise InputError(
                f"loader: slices must be a multiple of {world_size} ranks and divide {self.num_windows} windows, "
                f"got {slices}"
            )
        self.slices = slices
        self.starts = np.concatenate([[0], np.cumsum([len(tokens) for tokens in self.shards])])
        self.position = 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank, int64 [windows / world_size, seq_len] on the CPU."""
        per_slice = self.num_windows // self.slices
        length = per_slice * self.seq_len + 1
        rows = []
        for index in range(self.rank, self.slices, self.world_size):
            tokens = self._read(self.position + index * length, length)
            rows.append(np.lib.stride_tricks.sliding_window_view(tokens, self.seq_len + 1)[:: self.seq_len])
        self.position = (self.position + self.slices * length) % int(self.starts[-1])
        return self._split(np.concatenate(rows))

    def _read(self, position: int, length: int) -> np.ndarray:
        out = np.empty(length, dtype=np.uint16)
        done = 0
        while done < length:
            at = (position + done) % int(self.starts[-1])
            shard = int(np.searchsorted(self.starts, at, side="right")) - 1
            offset = at - int(self.starts[shard])
            piece = self.shards[shard][offset : offset + length - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def state_dict(self) -> dict:
        """Everything a later run needs to continue with the next batch; JSON-serialisable."""
        return self._shape() | {"slices": self.slices, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self._check(state)
        if state["slices"] % self.world_size:
            raise InputError(
                f"loader: cannot resume on {self.world_size} ranks, the saved batches are cut into {state['slices']} "
                "slices; resume on a number of ranks that divides it"
            )
        self.slices, self.position = state["slices"], state["position"]


class _WindowLoader(_Loader):
    """Loaders whose batch is a list of windows anywhere in the shards; rank r of W takes windows r, r + W, ..."""

    next_windows: Callable[[], list[tuple[int, int]]]

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank, int64 [windows / world_size, seq_len] on the CPU."""
        local = self.next_windows()[self.rank :: self.world_size]
        windows = np.empty((len(local), self.seq_len + 1), dtype=np.uint16)
        for row, (shard, start) in enumerate(local):
            windows[row] = self.shards[shard][start : start + self.seq_len + 1]
        return self._split(windows)


class CoprimeLoader(_WindowLoader):
    """Windows from several shards per batch, each shard's blocks visited in a stride coprime to their number.

    Every rank runs the same generator over the whole batch and takes windows r, r + W, ... The first batches mix 8
    shards; over 1800 batches this grows to 64 while the preference for shards with many unread blocks weakens.
    Shards too short for one window are left out, as in the published systems.

    Args:
        shards: paths in reading order.
        seq_len: window length in tokens.
        batch_tokens: targets per batch over all ranks.
        seed_paths: the strings that seed the generator, one per shard. Default: `seed_path` of each.
    """

    kind = "coprime"

    def __init__(
        self,
        shards: list[Path],
        seq_len: int,
        batch_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        seed_paths: list[str] | None = None,
    ) -> None:
        super().__init__(shards, seq_len, batch_tokens, rank, world_size, pin_memory)
        self.seed_paths = [seed_path(path) for path in shards] if seed_paths is None else list(seed_paths)
        self.rng = np.random.Generator(np.random.PCG64(coprime_seed(self.seed_paths)))
        self.eligible = [i for i, tokens in enumerate(self.shards) if len(tokens) > seq_len]
        self.cursors: list[_Cursor | None] = [None] * len(shards)
        self.batches = 0

    def next_windows(self) -> list[tuple[int, int]]:
        """The whole batch as (shard, first token), over all ranks. The order of random calls is the published one."""
        progress = min(self.batches / MIXING_BATCHES, 1.0)
        weights = np.power([self._remaining(i) for i in self.eligible], 0.9 - 0.4 * progress)
        probabilities = weights / weights.sum()
        most = min(len(self.eligible), self.num_windows)
        low, high = min(REFERENCE_RANKS, most), min(8 * REFERENCE_RANKS, most)
        mix = max(1, min(round(low + progress * (high - low)), most))

        picks = self.rng.choice(len(self.eligible), size=mix, replace=False, p=probabilities)
        counts = np.ones(mix, dtype=np.int64)
        if self.num_windows > mix:
            shares = probabilities[picks] / probabilities[picks].sum()
            counts += self.rng.multinomial(self.num_windows - mix, shares)
        order = self.rng.permutation(mix)
        buckets = [self._take(self.eligible[picks[i]], int(counts[i])) for i in order]
        self.batches += 1
        return self._interleave(buckets)

    def _remaining(self, shard: int) -> float:
        """Unread blocks of a shard's current pass, at least 1."""
        cursor = self.cursors[shard]
        if cursor is None:
            return float((len(self.shards[shard]) - 1) // self.seq_len)
        return float(max(cursor.blocks - cursor.used, 1))

    def _take(self, shard: int, count: int) -> list[tuple[int, int]]:
        """The next `count` windows of a shard, in random order."""
        windows = []
        while len(windows) < count:
            cursor = self.cursors[shard]
            if cursor is None or cursor.used >= cursor.blocks:
                cursor = self.cursors[shard] = self._draw_cursor(len(self.shards[shard]))
            for _ in range(min(count - len(windows), cursor.blocks - cursor.used)):
                block = (cursor.start + cursor.used * cursor.stride) % cursor.blocks
                windows.append((shard, cursor.phase + block * self.seq_len))
                cursor.used += 1
        return [windows[k] for k in self.rng.permutation(count).tolist()]

    def _draw_cursor(self, num_tokens: int) -> "_Cursor":
        max_phase = min(self.seq_len - 1, num_tokens - self.seq_len - 1)
        phase = int(self.rng.integers(max_phase + 1)) if max_phase > 0 else 0
        blocks = (num_tokens - 1 - phase) // self.seq_len
        start = int(self.rng.integers(blocks)) if blocks > 1 else 0
        stride = 1
        if blocks > 1:  # 1 is coprime to everything, so this ends
            stride = int(self.rng.integers(1, blocks))
            while math.gcd(stride, blocks) != 1:
                stride = int(self.rng.integers(1, blocks))
        return _Cursor(phase, blocks, start, stride)

    def _interleave(self, buckets: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
        """Rounds over the shards in random order, one window of each per round."""
        windows = []
        active = buckets
        while active:
            visited = [active[k] for k in self.rng.permutation(len(active)).tolist()]
            windows += [bucket.pop() for bucket in visited]
            active = [bucket for bucket in visited if bucket]
        return windows

    def state_dict(self) -> dict:
        """Everything a later run needs to continue with the next batch; JSON-serialisable."""
        cursors = [cursor and [*vars(cursor).values()] for cursor in self.cursors]
        return self._shape() | {"batches": self.batches, "cursors": cursors, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        self._check(state)
        self.batches = state["batches"]
        self.cursors = [cursor and _Cursor(*cursor) for cursor in state["cursors"]]
        self.rng.bit_generator.state = state["rng"]


class _Cursor:
    """One pass over a shard: block k of the pass starts at token phase + ((start + k * stride) % blocks) * seq_len."""

    def __init__(self, phase: int, blocks: int, start: int, stride: int, used: int = 0) -> None:
        self.phase, self.blocks, self.start, self.stride, self.used = phase, blocks, start, stride, used


class ShuffledLoader(_WindowLoader):
    """Windows in random order: each is drawn from a shard with a chance in proportion to the windows it has left.

    The shards are dealt to slices, slice r of S owns r, r + S, ... and draws by a generator of its own; window i of a
    batch is the next one of slice i mod S, so that on S ranks each reads its own shards alone, as published. A shard's
    windows are shuffled from a random phase on; once a slice has none left, all its shards begin a new pass.

    Args:
        shards: paths in reading order.
        seq_len: window length in tokens.
        batch_tokens: targets per batch over all ranks.

    Source: `ShuffledSequenceLoader` of openai/parameter-golf #1394.
    """

    kind = "shuffled"

    def __init__(
        self,
        shards: list[Path],
        seq_len: int,
        batch_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(shards, seq_len, batch_tokens, rank, world_size, pin_memory)
        sizes = [len(tokens) for tokens in self.shards]
        # As many as the published runs had ranks, or the most of which each owns a shard long enough.
        most = math.gcd(self.num_windows, REFERENCE_RANKS)
        slices = next(
            n
            for n in range(most, 0, -1)
            if most % n == 0 and all(max(sizes[r::n], default=0) > seq_len for r in range(n))
        )
        self.slices = [_Shuffle(r, sizes[r::slices], seq_len) for r in range(slices)]

    def next_windows(self) -> list[tuple[int, int]]:
        """The whole batch as (shard, first token), over all ranks. The order of random calls is the published one."""
        count = len(self.slices)
        drawn = [shuffle.draw(self.num_windows // count) for shuffle in self.slices]
        return [(shard * count + r, start) for row in zip(*drawn, strict=True) for r, (shard, start) in enumerate(row)]

    def state_dict(self) -> dict:
        """Everything a later run needs to continue with the next batch; JSON-serialisable."""
        return self._shape() | {"slices": [shuffle.state() for shuffle in self.slices]}

    def load_state_dict(self, state: dict) -> None:
        self._check(state)
        for shuffle, saved in zip(self.slices, state["slices"], strict=True):
            shuffle.load(saved)


class _Shuffle:
    """One slice of the shuffled loader: `order[s]` are the first tokens of shard s's windows, read from the end."""

    def __init__(self, seed: int, sizes: list[int], seq_len: int) -> None:
        self.sizes, self.seq_len = sizes, seq_len
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self._begin_pass()

    def _begin_pass(self) -> None:
        self.pass_state = self.rng.bit_generator.state  # kept instead of millions of positions: they follow from it
        self.order = [self._shuffled(size) for size in self.sizes]
        self.left = [len(order) for order in self.order]

    def _shuffled(self, num_tokens: int) -> np.ndarray:
        max_phase = min(self.seq_len - 1, max(0, num_tokens - self.seq_len - 1))
        phase = int(self.rng.integers(max_phase + 1)) if max_phase > 0 else 0
        return phase + self.rng.permutation(max(num_tokens - 1 - phase, 0) // self.seq_len) * self.seq_len

    def draw(self, count: int) -> list[tuple[int, int]]:
        """The next `count` windows as (shard of this slice, first token)."""
        windows = []
        for _ in range(count):
            if not any(self.left):
                self._begin_pass()
            # What rng.choice(len(left), p=left / sum(left)) computes, without its checks: 384 of them a batch add up.
            total = sum(self.left)
            cumulated = list(itertools.accumulate(n / total for n in self.left))
            shard = bisect.bisect_right([c / cumulated[-1] for c in cumulated], self.rng.random())
            self.left[shard] -= 1
            windows.append((shard, int(self.order[shard][self.left[shard]])))
        return windows

    def state(self) -> dict:
        return {"pass_state": self.pass_state, "left": list(self.left), "rng": self.rng.bit_generator.state}

    def load(self, state: dict) -> None:
        self.rng.bit_generator.state = state["pass_state"]
        self._begin_pass()
        self.left = list(state["left"])
        self.rng.bit_generator.state = state["rng"]


LOADERS = {loader.kind: loader for loader in (SequentialLoader, CoprimeLoader, ShuffledLoader)}


def make_loader(
    kind: str,
    shards: list[Path],
    seq_len: int,
    batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> SequentialLoader | CoprimeLoader | ShuffledLoader:
    """The loader called `kind` ("sequential", "coprime" or "shuffled") at the start of its data."""
    if kind not in LOADERS:
        raise InputError(f"loader: kind must be one of {sorted(LOADERS)}, got {kind!r}")
    return LOADERS[kind](shards, seq_len, batch_tokens, rank, world_size, pin_memory)
