"""Token shards in the challenge's format: a header of 256 int32 (magic, version, count), then the tokens as uint16.

Files are called fineweb_{train,val}_%06d.bin whatever text they hold: the challenge's scripts look for that name.
A document is BOS followed by its tokens; there is no EOS and documents may continue into the next shard.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import InputError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MAX_SHARD_TOKENS = 100_000_000


def shard_name(split: str, index: int) -> str:
    return f"fineweb_{split}_{index:06d}.bin"


def find_shards(directory: Path, split: str) -> list[Path]:
    """The shards of a split ("train" or "val") in the order they are read: by name."""
    return sorted(Path(directory).glob(f"fineweb_{split}_*.bin"))


def count_tokens(path: Path) -> int:
    """Number of tokens of a shard, after checking its header against its size.

    Raises:
        InputError: the file is missing, is no shard, or is shorter or longer than its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"shard {path}: no such file")
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=3)
    if size < HEADER_BYTES:
        raise InputError(f"shard {path}: must hold a header of {HEADER_BYTES} bytes, got a file of {size} bytes")
    magic, version, count = header.tolist()
    if magic != MAGIC:
        raise InputError(f"shard {path}: must start with the number {MAGIC}, got {magic}; this is not a token shard")
    if version != VERSION:
        raise InputError(f"shard {path}: format version must be {VERSION}, got {version}")
    expected = HEADER_BYTES + 2 * count
    if count < 0 or size != expected:
        raise InputError(
            f"shard {path}: {count} tokens must make {expected} bytes, got {size}; "
            "the file was cut or damaged: copy or make it again"
        )
    return count


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only uint16 array that is mapped, not read."""
    count = count_tokens(path)
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype="<u2")
    return np.memmap(path, mode="r", dtype="<u2", offset=HEADER_BYTES, shape=(count,))


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write one shard; the file appears under its name only when it is complete and on disk."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or len(tokens) > MAX_SHARD_TOKENS:
        raise InputError(f"shard {path}: must hold at most {MAX_SHARD_TOKENS} tokens in a row, got {tokens.shape}")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 1 << 16:
        raise InputError(f"shard {path}: token ids must lie in 0..65535, got {tokens.min()}..{tokens.max()}")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_shards(
    directory: Path, split: str, chunks: Iterable[np.ndarray], max_tokens: int = MAX_SHARD_TOKENS
) -> list[Path]:
    """Write a stream of token arrays as shards of `max_tokens` (the last one holds the rest); at least one file."""
    paths: list[Path] = []
    buffer = np.empty(0, dtype="<u2")
    pending: list[np.ndarray] = []
    held = 0

    def flush(everything: bool) -> None:
        nonlocal buffer, held
        buffer = np.concatenate([buffer, *pending])
        pending.clear()
        while len(buffer) >= max_tokens or (everything and (len(buffer) or not paths)):
            paths.append(Path(directory) / shard_name(split, len(paths)))
            write_shard(paths[-1], buffer[:max_tokens])
            buffer = buffer[max_tokens:]
        held = len(buffer)

    for chunk in chunks:
        pending.append(chunk.astype("<u2"))
        held += len(chunk)
        if held >= max_tokens:
            flush(everything=False)
    flush(everything=True)
    return paths


def check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Raise InputError if an id of `tokens` (of the shard at `path`) is not below vocab_size."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise InputError(
            f"shard {path}: token ids must be below vocab_size {vocab_size}, got {int(tokens[at])} at token {at}; "
            "the shards and the tokenizer do not belong together"
        )
