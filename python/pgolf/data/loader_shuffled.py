"""Windows in random order, each drawn by chance; a pass is kept as the generator's state, not as millions of places."""

import bisect
import itertools
import math

import numpy as np

from .loader_base import REFERENCE_RANKS, WindowLoader


class ShuffledLoader(WindowLoader):
    """Windows in random order: each is drawn from a shard with a chance in proportion to the windows it has left.

    The shards are dealt to slices, slice r of S owns r, r + S, ... and draws by a generator of its own; window i of a
    batch is the next one of slice i mod S, so that on S ranks each reads its own shards alone, as published. A shard's
    windows are shuffled from a random phase on; once a slice has none left, all its shards begin a new pass. Arguments
    are those of Loader.

    Source: `ShuffledSequenceLoader` of openai/parameter-golf #1394.
    """

    kind = "shuffled"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        sizes = [len(tokens) for tokens in self.shards]
        # As many as the published runs had ranks, or the most of which each owns a shard long enough.
        most = math.gcd(self.num_windows, REFERENCE_RANKS)
        slices = next(
            n
            for n in range(most, 0, -1)
            if most % n == 0 and all(max(sizes[r::n], default=0) > self.seq_len for r in range(n))
        )
        self.slices = [_Shuffle(r, sizes[r::slices], self.seq_len) for r in range(slices)]

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
