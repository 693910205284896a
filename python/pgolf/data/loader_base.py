"""What the three loaders share: every rank knows the whole batch and keeps its share, so the union is one rank's batch.

Micro-batches are for the caller to cut.
"""

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


class Loader:
    """What all loaders share: the shards, the shape of a batch and this rank's share of it.

    Args:
        shards: paths in reading order.
        seq_len: window length in tokens.
        batch_tokens: targets per batch over all ranks, a multiple of seq_len whose windows divide over the ranks.
        rank, world_size: this process's place.
        pin_memory: make batches in memory that a GPU copies from without waiting.

    Raises:
        InputError: the batch does not divide, or no shard holds a window.
    """

    kind: str

    def __init__(
        self,
        shards: list[Path],
        seq_len: int,
        batch_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
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


class WindowLoader(Loader):
    """Loaders whose batch is a list of windows anywhere in the shards; rank r of W takes windows r, r + W, ..."""

    next_windows: Callable[[], list[tuple[int, int]]]

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank, int64 [windows / world_size, seq_len] on the CPU."""
        local = self.next_windows()[self.rank :: self.world_size]
        windows = np.empty((len(local), self.seq_len + 1), dtype=np.uint16)
        for row, (shard, start) in enumerate(local):
            windows[row] = self.shards[shard][start : start + self.seq_len + 1]
        return self._split(windows)
