"""Where an artifact's bytes go: by plane of the file, and by kind of tensor.

Both are estimates in one respect. A compressed piece that several planes share is divided in proportion to what zlib
makes of their parts (the artifact's own compressor would take a quarter of the time that packing does); a plane that
several kinds of tensor share, in proportion to the entropy of their codes. What belongs to one alone is exact, and the
parts add up to the file.
"""

import math
import zlib
from itertools import accumulate

import numpy as np

from ..config import Config
from . import container
from .quantise import CODE_MAX, KINDS, CodedTensor, tensor_kind


def plane_bytes(data: bytes) -> dict[str, int]:
    """Stored bytes of "header", "levels", the codes' roles, "scales" and "float16" of an artifact file."""
    _, raw, piece_sizes = container.unfold(data)
    _, where = container.locate(raw)
    where = {"header": slice(0, where["levels"].start), **where}
    stored = dict.fromkeys(where, 0)
    for i, size in enumerate(piece_sizes):
        begin, end = i * container.PIECE_BYTES, (i + 1) * container.PIECE_BYTES
        parts = {plane: raw[max(begin, part.start) : min(end, part.stop)] for plane, part in where.items()}
        _divide(size, {plane: len(zlib.compress(part)) for plane, part in parts.items() if part}, stored)
    stored["header"] += len(data) - sum(piece_sizes)  # magic, hash and sizes of the pieces
    return stored


def kind_bytes(config: Config, tensors: dict[str, CodedTensor], planes: dict[str, int]) -> dict[str, int]:
    """Stored bytes of the tensors of each kind, and of the "header". planes: of `plane_bytes`."""
    stored = {"header": planes["header"], **dict.fromkeys(KINDS, 0)}
    kinds = {name: tensor_kind(config, name, tuple(t.shape)) for name, t in tensors.items()}
    lines, rows = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for role in CODE_MAX:
        bits = dict.fromkeys(KINDS, 0.0)
        for name, t in tensors.items():
            if t.role == role:
                bits[kinds[name]] += entropy_bits(t.values.numpy())
                lines[kinds[name]] += sum(t.values.shape)
                rows[kinds[name]] += len(t.values)
        _divide(planes[role], bits, stored)
    _divide(planes["levels"], lines, stored)
    _divide(planes["scales"], rows, stored)
    stored["float16"] += planes["float16"]
    return {kind: size for kind, size in stored.items() if size}


def entropy_bits(codes: np.ndarray) -> float:
    """Bits that an ideal coder which knows the histogram needs for int8 codes."""
    counts = np.bincount(codes.ravel().view(np.uint8), minlength=256)
    counts = counts[counts > 0]
    return float((counts * (math.log2(codes.size) - np.log2(counts))).sum())


def _divide(size: int, weights: dict[str, float], stored: dict[str, int]) -> None:
    """Add size to stored in proportion to weights, whole bytes each, nothing lost."""
    total = sum(weights.values())
    if not total:
        weights, total = dict.fromkeys(weights, 1), len(weights)
    marks = [int(size * share / total) for share in accumulate(weights.values())]
    marks[-1] = size
    for name, begin, end in zip(weights, [0, *marks], marks, strict=False):
        stored[name] += end - begin
