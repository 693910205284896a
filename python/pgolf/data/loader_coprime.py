"""Windows of several shards in a batch, each shard read in a stride coprime to its number of blocks.

The order follows from the names of the shards, which seed the generator: bit for bit that of #1217 and #1333.
"""

import math
import os
from pathlib import Path

import numpy as np

from .loader_base import REFERENCE_RANKS, WindowLoader

MIXING_BATCHES = 1800  # batches over which the mix widens
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


class CoprimeLoader(WindowLoader):
    """Windows from several shards per batch, each shard's blocks visited in a stride coprime to their number.

    Every rank runs the same generator over the whole batch and takes windows r, r + W, ... The first batches mix 8
    shards; over 1800 batches this grows to 64 while the preference for shards with many unread blocks weakens.
    Shards too short for one window are left out, as in the published systems.

    Args: those of Loader, and
        seed_paths: the strings that seed the generator, one per shard. Default: `seed_path` of each.
    """

    kind = "coprime"

    def __init__(self, shards: list[Path], *args, seed_paths: list[str] | None = None, **kwargs) -> None:
        super().__init__(shards, *args, **kwargs)
        self.seed_paths = [seed_path(path) for path in shards] if seed_paths is None else list(seed_paths)
        self.rng = np.random.Generator(np.random.PCG64(coprime_seed(self.seed_paths)))
        self.eligible = [i for i, tokens in enumerate(self.shards) if len(tokens) > self.seq_len]
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
