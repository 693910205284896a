"""A corpus without repeated texts, divided into training and validation by a digest of each text.

The digest alone decides, so a document keeps its side when the corpus around it changes, and no text is on both sides.
"""

from collections.abc import Callable, Iterator

from ..errors import InputError
from .corpus import Corpus, Document, cut_documents, digest

# A corpus of fewer documents is cut into about this many pieces, so that the digests find something for both sides.
FEW_DOCUMENTS = 64
PIECES_OF_FEW = 256
MIN_PIECE_CHARS = 1024


class SplitCorpus:
    """Distinct documents of a corpus by split. Reading takes one pass over the corpus per call.

    Attributes:
        num_documents, text_bytes: per split ("train", "val"); bytes are UTF-8.
        duplicates: documents left out because their text came before.
        cut_at_chars: longest piece where a corpus of few documents was cut, else None.
    """

    def __init__(self, corpus: Corpus, val_share: float, progress: Callable[[int], None] = lambda done: None) -> None:
        self.corpus, self.cut_at_chars = corpus, None
        lengths = self._scan(progress)
        if 0 < len(lengths) < FEW_DOCUMENTS:
            self.cut_at_chars = max(MIN_PIECE_CHARS, sum(lengths.values()) // PIECES_OF_FEW)
            self.corpus = cut_documents(corpus, self.cut_at_chars)
            lengths = self._scan(progress)
        if len(lengths) < 2:
            raise InputError(
                f"corpus: must hold at least two different documents or {2 * MIN_PIECE_CHARS} characters, "
                f"got {sum(lengths.values())} bytes of text; name more files"
            )
        # At least one document is for validation: the one with the smallest digest.
        self._val_below = max(int(val_share * 2**64), min(map(_position, lengths)) + 1)
        self.num_documents = {"train": 0, "val": 0}
        self.text_bytes = {"train": 0, "val": 0}
        for key, length in lengths.items():
            self.num_documents[self.split_of(key)] += 1
            self.text_bytes[self.split_of(key)] += length
        if not self.num_documents["train"]:
            raise InputError(f"corpus: val_share {val_share} leaves no document for training; use a smaller one")

    def split_of(self, key: bytes) -> str:
        return "val" if _position(key) < self._val_below else "train"

    def read(self, split: str) -> Iterator[tuple[bytes, Document]]:
        """The documents of a split with their digests, in the order of the corpus, each text once."""
        seen = set()
        for document in self.corpus:
            key = digest(document.text)
            if key not in seen and self.split_of(key) == split:
                seen.add(key)
                yield key, document

    def sample(self, split: str, max_bytes: int) -> Iterator[str]:
        """Texts of a split, about max_bytes of them: those whose digest ends low enough."""
        below = max_bytes / self.text_bytes[split] if self.text_bytes[split] else 1.0
        for key, document in self.read(split):
            if int.from_bytes(key[8:]) < below * 2**64:
                yield document.text

    def _scan(self, progress: Callable[[int], None]) -> dict[bytes, int]:
        lengths: dict[bytes, int] = {}
        self.duplicates = done = 0
        for document in self.corpus:
            key = digest(document.text)
            self.duplicates += key in lengths
            lengths[key] = len(document.text.encode())
            progress(done := done + lengths[key])
        return lengths


def _position(key: bytes) -> int:
    """Where a digest lies in 0..2**64 - 1."""
    return int.from_bytes(key[:8])
