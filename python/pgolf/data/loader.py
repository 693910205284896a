"""Batches from shards, bit for bit those of the published systems; the order is fixed by the data, not by a seed.

SequentialLoader reads the shards as one endless stream. CoprimeLoader visits each shard's blocks in a stride coprime to
their number and mixes several shards in a batch. ShuffledLoader draws every window by chance from its slice of the
shards. A file for each: loader_sequential.py, loader_coprime.py, loader_shuffled.py; loader_base.py is what they share.
"""

from pathlib import Path

from ..errors import InputError
from .loader_base import Loader
from .loader_coprime import CoprimeLoader
from .loader_sequential import SequentialLoader
from .loader_shuffled import ShuffledLoader

LOADERS = {"sequential": SequentialLoader, "coprime": CoprimeLoader, "shuffled": ShuffledLoader}


def make_loader(
    kind: str,
    shards: list[Path],
    seq_len: int,
    batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Loader:
    """The loader called `kind` ("sequential", "coprime" or "shuffled") at the start of its data; else as `Loader`."""
    if kind not in LOADERS:
        raise InputError(f"loader: kind must be one of {sorted(LOADERS)}, got {kind!r}")
    return LOADERS[kind](shards, seq_len, batch_tokens, rank, world_size, pin_memory)
