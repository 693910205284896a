"""How many bytes of text each token stands for: the denominator of bits per byte, exact for any tokenizer.

A piece that begins with a space owns that space only if the previous token is no control symbol (the challenge's rule:
its tokenizers drop a document's leading space). A tokenizer that keeps leading spaces is charged for them everywhere.
Control symbols, BOS included, are worth 0 bytes, so the tokens of a document add up to the UTF-8 bytes of its text.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .tokenizer import Tokenizer

SPACE = "\u2581"  # SentencePiece writes a space as this character


@dataclass(frozen=True)
class ByteCounts:
    """Tables over token ids: `bytes` int16 without a leading space, `leading_space` bool, `boundary` bool (control)."""

    bytes: Tensor
    leading_space: Tensor
    boundary: Tensor

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, vocab_size: int = 0) -> "ByteCounts":
        """Tables of size max(tokenizer.vocab_size, vocab_size); ids beyond the tokenizer's count as control symbols."""
        sp = tokenizer.processor
        size = max(tokenizer.vocab_size, vocab_size)
        counts = torch.zeros(size, dtype=torch.int16)
        leading = torch.zeros(size, dtype=torch.bool)
        boundary = torch.ones(size, dtype=torch.bool)
        for i in range(tokenizer.vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            boundary[i] = False
            if sp.is_byte(i):
                counts[i] = 1
                continue
            piece = sp.id_to_piece(i)
            if piece.startswith(SPACE) and not tokenizer.keeps_leading_space:
                leading[i], piece = True, piece[1:]
            counts[i] = len(piece.replace(SPACE, " ").encode())
        return cls(counts, leading, boundary)

    def to(self, device: torch.device | str) -> "ByteCounts":
        return ByteCounts(self.bytes.to(device), self.leading_space.to(device), self.boundary.to(device))

    def count_bytes(self, targets: Tensor, previous: Tensor) -> Tensor:
        """Bytes of each target given the token before it (the model's input): int64, the shape of `targets`."""
        space = self.leading_space[targets] & ~self.boundary[previous]
        return self.bytes[targets].to(torch.int64) + space

    def total_bytes(self, tokens: np.ndarray, chunk: int = 1 << 22) -> int:
        """Bytes of a whole stream; its first token has no predecessor and is charged as after a control symbol."""
        if not len(tokens):
            return 0
        total = int(self.bytes[int(tokens[0])])
        for start in range(0, len(tokens) - 1, chunk):
            part = torch.from_numpy(tokens[start : start + chunk + 1].astype(np.int64))
            total += int(self.count_bytes(part[1:], part[:-1]).sum())
        return total


def check_document(document: np.ndarray, tokenizer: Tokenizer, byte_counts: ByteCounts) -> int:
    """Bytes charged for a document's tokens (without BOS), checked against its decoded text.

    Raises:
        InputError: they differ: the document was cut inside a character, or is not this tokenizer's.
    """
    charged = byte_counts.total_bytes(np.concatenate([[tokenizer.bos_id], document]))
    text = tokenizer.decode(document)
    if charged != len(text.encode()):
        raise InputError(
            f"byte counts: a document must be charged its {len(text.encode())} bytes, got {charged}; "
            f"it begins {text[:60]!r}"
        )
    return charged


def check_against_text(tokens: np.ndarray, tokenizer: Tokenizer, byte_counts: ByteCounts) -> int:
    """The bytes of a stream that begins with BOS, each document checked by `check_document`."""
    starts = np.flatnonzero(np.asarray(tokens) == tokenizer.bos_id)
    ends = [*starts[1:], len(tokens)]
    return sum(
        check_document(tokens[start + 1 : end], tokenizer, byte_counts) for start, end in zip(starts, ends, strict=True)
    )
