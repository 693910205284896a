"""SentencePiece BPE with byte fallback, lossless unless told otherwise: decode(encode(text)) == text for every string.

SentencePiece writes spaces as U+2581, so a U+2581 of the text itself would come back as a space. A lossless Tokenizer
therefore encodes that character through its three byte pieces.
"""

import hashlib
import io
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from ..errors import InputError
from .corpus import cut_text

# Strings that a tokenizer which normalises, trims or has no byte fallback does not give back.
PROBES = (
    " a",
    "a ",
    "a  b",
    "a\tb",
    "a\n\n b\n",
    "a\r\nb",
    "\ufb01 \uff21 \u00bd",
    "e\u0301 \u00e9",
    "\U0001f600\u4e2d",
    "a\0b",
)
RESERVED = "\u2581"
RESERVED_BYTES = [f"<0x{byte:02X}>" for byte in RESERVED.encode()]

# Training sees sentences of this length; SentencePiece's BPE addresses at most 65,535 characters of one.
SENTENCE_CHARS = 2000
# Enough for stable merges: memory is about 40 bytes per byte of text and time 0.2 s per million.
TRAINING_BYTES = 16 << 20
NORMALIZATIONS = ("identity", "nmt_nfkc")
SYMBOLS = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}

# Each option is a measured choice on the standard library at 1024 pieces, in bytes per token: the challenge's options
# without normalisation 1.77; runs of spaces as pieces 2.50; merges across scripts 2.57 and across digits 2.61; merges
# across spaces 2.74; fewer rare characters in favour of merges 2.76.
LOSSLESS_OPTIONS = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_by_unicode_script": False,
    "split_by_number": False,
    "split_by_whitespace": False,
    "character_coverage": 0.995,
    "max_sentencepiece_length": 32,
}
CHALLENGE_OPTIONS = {"normalization_rule_name": "nmt_nfkc", "split_digits": True, "character_coverage": 0.999}


class Tokenizer:
    """A SentencePiece model. ids are below `vocab_size`; documents in a stream are preceded by `bos_id`.

    Attributes:
        lossless: every text comes back exactly.
        normalised: the model changes text before it cuts it (spaces, compatibility characters).
        keeps_leading_space: a document's leading space survives, so it is charged as a byte.
        model: the model file's bytes; `sha256`: their digest.
    """

    def __init__(self, model: str | Path | bytes) -> None:
        if not isinstance(model, bytes):
            path = Path(model)
            if not path.is_file():
                raise InputError(f"tokenizer {path}: no such file")
            model = path.read_bytes()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise InputError(
                f"tokenizer: must be a SentencePiece model, got {len(model)} bytes that are not one"
            ) from e
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self.processor.vocab_size()
        self.bos_id = self.processor.bos_id()
        if self.bos_id < 0:
            raise InputError("tokenizer: must have a BOS symbol, got a model without one")
        self._reserved_ids = [self.processor.piece_to_id(piece) for piece in RESERVED_BYTES]
        intact = [self.processor.decode(self.processor.encode(text)) == text for text in PROBES]
        self.lossless = all(intact)
        self.normalised = self.processor.decode(self.processor.encode("a\n\n b\n")) != "a\n\n b\n"
        self.keeps_leading_space = intact[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, without BOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        """Token ids of several documents; the result does not depend on num_threads."""
        if not self.lossless or not any(RESERVED in text for text in texts):
            return self.processor.encode(texts, num_threads=num_threads)
        parts = [text.split(RESERVED) for text in texts]
        encoded = iter(self.processor.encode([part for row in parts for part in row], num_threads=num_threads))
        return [self._join([next(encoded) for _ in row]) for row in parts]

    def _join(self, parts: list[list[int]]) -> list[int]:
        ids = list(parts[0])
        for part in parts[1:]:
            ids += self._reserved_ids + part
        return ids

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """The text of one document's tokens; control symbols such as BOS decode to nothing."""
        return self.processor.decode(np.asarray(ids, dtype=np.int64).tolist())

    def decode_batch(self, documents: list[list[int]]) -> list[str]:
        return self.processor.decode(documents)


def train_tokenizer(texts: Iterable[str], vocab_size: int, normalization: str = "identity") -> Tokenizer:
    """Train BPE on texts (at most TRAINING_BYTES of them are useful); equal texts give equal bytes.

    Args:
        texts: documents, in a fixed order.
        vocab_size: pieces, of which 4 are symbols and 256 bytes.
        normalization: "identity" (lossless) or "nmt_nfkc" (the challenge's: text is normalised before it is cut).

    Raises:
        InputError: an unknown normalization, or a vocabulary that this text cannot fill.
    """
    if normalization not in NORMALIZATIONS:
        raise InputError(f"tokenizer: normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
    if not len(SYMBOLS) + 256 < vocab_size <= 1 << 16:
        raise InputError(f"tokenizer: vocab_size must lie in 261..65536 (260 are symbols and bytes), got {vocab_size}")
    sentences = (piece for text in texts for piece in cut_text(text, SENTENCE_CHARS))
    if normalization == "nmt_nfkc":
        sentences = (piece.replace("\0", " ").strip() for piece in sentences)
    model = io.BytesIO()
    sentences = (piece for piece in sentences if piece)
    first = next(sentences, None)
    if first is None:
        raise InputError("tokenizer: the training text must not be empty; use more text")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            max_sentence_length=4 * SENTENCE_CHARS,
            num_threads=2,  # does not change the pieces, but the model file records it
            minloglevel=2,
            **SYMBOLS,
            **(LOSSLESS_OPTIONS if normalization == "identity" else CHALLENGE_OPTIONS),
        )
    except RuntimeError as e:
        raise InputError(_why_not_trained(str(e), vocab_size)) from e
    tokenizer = Tokenizer(model.getvalue())
    if tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"tokenizer: this text fills {tokenizer.vocab_size} of {vocab_size} pieces; "
            f"use more text or --vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer


def _why_not_trained(error: str, vocab_size: int) -> str:
    if few := re.search(r"required_chars\. \d+ vs (\d+)", error):
        needed = int(few[1])
        return (
            f"tokenizer: this text's frequent characters need at least {needed} pieces, got vocab_size {vocab_size}; "
            f"use --vocab-size {needed} or more"
        )
    return f"tokenizer: SentencePiece must find {vocab_size} pieces in this text, got: {error}; use more text"
