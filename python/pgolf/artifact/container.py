"""The artifact file: a config, the tokenizer's hash and coded tensors, compressed and checked; none of it is ever run.

    offset  0  magic b"pgolfart"
            8  uint32 version = 1
           12  SHA-256 of everything from offset 44 to the end
           44  uint8 compressor (0 brotli, 1 lzma), uint64 size of the content, then a uint32 size for each piece
            .  the pieces: PIECE_BYTES of the content each (the last one less), compressed on their own

    content:  uint32 size of the header, header (see header.py), levels, codes of 5 to 8 bits, scales, float16 tensors

Integers are little-endian. Offsets of tensors follow from the table, so they cost nothing and cannot lie; the order
inside the planes is in planes.py. Pieces exist so that threads can compress them; the bytes do not depend on how many.
The surprise: the reader feeds brotli in small steps, because a kilobyte of it can unfold to a gigabyte.
"""

import hashlib
import lzma
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise

import brotli
import numpy as np
import torch

from ..errors import InputError
from . import planes
from .header import Header, TensorEntry
from .quantise import CODE_MAX, CodedTensor

MAGIC, VERSION = b"pgolfart", 1
PIECE_BYTES = 2**21  # costs 0.00 % against 2**23 and keeps four times as many threads busy
MAX_CONTENT_BYTES = 2**28  # 16 times the challenge's limit; bounds what a malicious file makes the reader allocate
COMPRESSORS = ("brotli", "lzma")
# Codes hold no repetitions worth a match: a dictionary of 4 KiB is 1.5 % smaller and ten times faster than preset 9's.
LZMA_FILTER = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 4096, "nice_len": 273, "lc": 0, "lp": 0, "pb": 0}
_START = struct.Struct("<8sI32s")
_PREAMBLE = struct.Struct("<BQ")


@dataclass(frozen=True, eq=False)
class Content:
    """What an artifact holds; `tensors` has the names and the order of header.tensors."""

    header: Header
    tensors: dict[str, CodedTensor]


def encode(content: Content) -> bytes:
    """The bytes of the file. The same content gives the same bytes.

    Raises:
        InputError: extra holds what JSON cannot, or the content is larger than MAX_CONTENT_BYTES.
    """
    header, compressor = content.header.to_json(), content.header.config.compressor
    raw = struct.pack("<I", len(header)) + header + b"".join(tensor_planes(content.tensors).values())
    if len(raw) > MAX_CONTENT_BYTES:
        raise InputError(f"the content of an artifact must be at most {MAX_CONTENT_BYTES:,} bytes, got {len(raw):,}")
    pieces = compress(raw, compressor)
    body = _PREAMBLE.pack(COMPRESSORS.index(compressor), len(raw))
    body += struct.pack(f"<{len(pieces)}I", *map(len, pieces)) + b"".join(pieces)
    return _START.pack(MAGIC, VERSION, hashlib.sha256(body).digest()) + body


def tensor_planes(tensors: dict[str, CodedTensor]) -> dict[str, bytes]:
    """What the content holds after the header, in this order: "levels", "int5" to "int8", "scales", "float16"."""
    result: dict[str, bytes] = {"levels": b""}
    for role in CODE_MAX:
        codes = [t.values.numpy() for t in tensors.values() if t.role == role]
        levels = [planes.spread_levels(c) for c in codes]
        result["levels"] += b"".join(part.tobytes() for pair in levels for part in pair)
        result[role] = planes.gather_codes(codes, levels)
    scales = [t.scale for t in tensors.values() if t.role in CODE_MAX]
    values = [t.values.flatten() for t in tensors.values() if t.role == "float16"]
    for plane, parts in (("scales", scales), ("float16", values)):
        result[plane] = planes.shuffle(torch.cat(parts).numpy()) if parts else b""
    return result


def compress(raw: bytes, compressor: str) -> list[bytes]:
    """Cut raw into pieces and compress each on its own, in threads: both libraries release the interpreter lock."""
    cut = [raw[i : i + PIECE_BYTES] for i in range(0, len(raw), PIECE_BYTES)]
    with ThreadPoolExecutor(max_workers=max(1, min(len(cut), os.cpu_count() or 1))) as pool:
        return list(pool.map(_fold_lzma if compressor == "lzma" else _fold_brotli, cut))


def decode(data: bytes) -> Content:
    """Read what `encode` wrote.

    Raises:
        InputError: the data is no artifact, damaged, newer than this program, or contradicts itself.
    """
    compressor, raw, _ = unfold(data)
    return parse(compressor, raw)


def parse(compressor: str, raw: bytes) -> Content:
    """The second half of `decode`: what a decompressed content holds."""
    header, where = locate(raw)
    if header.config.compressor != compressor:
        raise InputError(f"compressed by {compressor}, but its config says {header.config.compressor}")
    return Content(header, _read_tensors(header.tensors, {key: raw[part] for key, part in where.items()}))


def unfold(data: bytes) -> tuple[str, bytes, tuple[int, ...]]:
    """Check a file and decompress it: the compressor, the content, the size of each compressed piece.

    No more is unfolded than the preamble announces, whatever the pieces hold. Raises InputError.
    """
    smallest = _START.size + _PREAMBLE.size
    if len(data) < smallest:
        raise InputError(f"not an artifact: it must have at least {smallest} bytes, got {len(data)}")
    magic, version, digest = _START.unpack_from(data)
    if magic != MAGIC:
        raise InputError(f"not an artifact: it must begin with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise InputError(f"artifact version must be {VERSION}, got {version}; a newer pgolf may read it")
    body = memoryview(data)[_START.size :]
    if hashlib.sha256(body).digest() != digest:
        raise InputError("its SHA-256 does not match its content: the file is cut or damaged; copy or pack it again")
    kind, size = _PREAMBLE.unpack_from(body)
    if kind >= len(COMPRESSORS):
        raise InputError(f"the compressor must be one of {dict(enumerate(COMPRESSORS))}, got {kind}")
    if size > MAX_CONTENT_BYTES:
        raise InputError(f"the content must be at most {MAX_CONTENT_BYTES:,} bytes, got {size:,}")
    num_pieces = -(-size // PIECE_BYTES)
    start = _PREAMBLE.size + 4 * num_pieces
    if start > len(body):
        raise InputError(f"{num_pieces} pieces are announced, but the file ends before their sizes")
    sizes = struct.unpack_from(f"<{num_pieces}I", body, _PREAMBLE.size)
    if start + sum(sizes) != len(body):
        raise InputError(f"{len(body) - start:,} bytes of pieces follow, but their sizes add up to {sum(sizes):,}")
    unfold_piece = (_unfold_brotli, _unfold_lzma)[kind]
    parts = []
    for i, (begin, end) in enumerate(pairwise(accumulate(sizes, initial=start))):
        expected = min(PIECE_BYTES, size - i * PIECE_BYTES)
        try:
            parts.append(unfold_piece(bytes(body[begin:end]), expected))
        except (brotli.error, lzma.LZMAError, EOFError) as error:
            raise InputError(f"piece {i} is not {expected:,} bytes of {COMPRESSORS[kind]} ({error})") from error
    return COMPRESSORS[kind], b"".join(parts), sizes


def locate(raw: bytes) -> tuple[Header, dict[str, slice]]:
    """The header of a content and where its planes are; together they cover it exactly, or InputError is raised."""
    start = 4 + int.from_bytes(raw[:4], "little")
    if start > len(raw):
        raise InputError(f"the header must end within {len(raw):,} bytes, got {start:,}")
    header = Header.from_json(raw[4:start])
    coded = [e for e in header.tensors if e.role in CODE_MAX]
    sizes = {
        "levels": sum(e.num_rows + e.num_columns for e in coded),
        **{role: sum(e.num_values for e in coded if e.role == role) for role in CODE_MAX},
        "scales": 2 * sum(e.num_rows for e in coded),
        "float16": 2 * sum(e.num_values for e in header.tensors if e.role == "float16"),
    }
    *starts, end = accumulate(sizes.values(), initial=start)
    if end != len(raw):
        raise InputError(f"{len(raw) - start:,} bytes of tensors follow, but the table adds up to {end - start:,}")
    return header, {key: slice(begin, begin + sizes[key]) for key, begin in zip(sizes, starts, strict=True)}


def _fold_brotli(piece: bytes) -> bytes:
    return brotli.compress(piece, quality=11, lgwin=24)


def _unfold_brotli(piece: bytes, expected: int) -> bytes:
    decoder, parts, size = brotli.Decompressor(), [], 0
    for i in range(0, len(piece), 64):  # 64 bytes unfold to 84 MB at most
        parts.append(decoder.process(piece[i : i + 64]))
        size += len(parts[-1])
        if size > expected:
            break
    if size != expected or not decoder.is_finished():
        raise EOFError(f"it holds {size:,} or more" if size > expected else f"it ends after {size:,}")
    return b"".join(parts)


def _fold_lzma(piece: bytes) -> bytes:
    return lzma.compress(piece, format=lzma.FORMAT_RAW, filters=[LZMA_FILTER])


def _unfold_lzma(piece: bytes, expected: int) -> bytes:
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=[LZMA_FILTER])
    part = decoder.decompress(piece, max_length=expected + 1)
    if len(part) != expected or not decoder.eof or decoder.unused_data:
        raise EOFError(f"it holds {len(part):,} or more" if len(part) > expected else f"it ends after {len(part):,}")
    return part


def _read_tensors(entries: tuple[TensorEntry, ...], plane: dict[str, bytes]) -> dict[str, CodedTensor]:
    """The inverse of tensor_planes."""
    by_role = {role: [e for e in entries if e.role == role] for role in CODE_MAX}
    lines = [size for role in CODE_MAX for e in by_role[role] for size in (e.num_rows, e.num_columns)]
    levels = _split(np.frombuffer(plane["levels"], dtype=np.int8), lines)
    codes = {
        role: iter(planes.scatter_codes(plane[role], [(next(levels), next(levels)) for _ in by_role[role]]))
        for role in CODE_MAX
    }
    scales = _split(planes.unshuffle(plane["scales"]), [e.num_rows for e in entries if e.role in CODE_MAX])
    values = _split(planes.unshuffle(plane["float16"]), [e.num_values for e in entries if e.role == "float16"])
    tensors = {}
    for e in entries:
        try:
            if e.role == "float16":
                tensors[e.name] = CodedTensor(e.role, e.shape, torch.from_numpy(next(values).reshape(e.shape)))
            else:
                parts = torch.from_numpy(next(codes[e.role])), torch.from_numpy(next(scales))
                tensors[e.name] = CodedTensor(e.role, e.shape, *parts)
        except InputError as error:
            raise InputError(f"{e.name}: {error}") from error
    return tensors


def _split(values: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    return iter(np.split(values, np.cumsum(sizes)[:-1]) if sizes else [])
