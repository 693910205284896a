"""The shards as one endless stream, cut into a slice of consecutive tokens for each rank of the published runs."""

import math

import numpy as np
from torch import Tensor

from ..errors import InputError
from .loader_base import REFERENCE_RANKS, Loader


class SequentialLoader(Loader):
    """One stream over all shards, wrapping at the end.

    A batch is cut into slices of n + 1 consecutive tokens (n inputs, and each one's successor as target); rank r of W
    takes slices r, r + W, ... Each slice's first token is therefore never a target, as in the published systems.

    Args: those of Loader, and
        slices: slices per batch, a multiple of world_size. Default: 8 where ranks and windows allow, so that the
            batches do not depend on the number of ranks; otherwise one per rank.
    """

    kind = "sequential"

    def __init__(self, *args, slices: int | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        world_size = self.world_size
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
