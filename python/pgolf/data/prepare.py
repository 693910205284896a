"""Text to a dataset folder: split, tokenizer, shards, and a manifest that says what is in it; and the check of one.

The folder appears under its name only when it is complete: everything is written to a hidden folder beside it, which is
then renamed. Documents are shuffled by their digest within blocks of one shard, so the first tokens of a split are a
fair sample of it, and a manifest holds no time and no path: the same text gives the same folder.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

from ..errors import InputError
from .byte_counts import ByteCounts, check_document
from .corpus import Corpus, Document
from .dataset import FORMAT, MANIFEST_FILE, TOKENIZER_FILE, Dataset
from .shards import MAX_SHARD_TOKENS, check_ids, count_tokens, open_shard, write_shards
from .split import SplitCorpus
from .tokenizer import TRAINING_BYTES, Tokenizer, train_tokenizer

# 5 % of the standard library is about 400 kB in some 30 files: enough files for a score that is not one file's, little
# enough to score in minutes on a laptop.
VAL_SHARE = 0.05
BATCH_CHARS = 1 << 21
SPLITS = ("train", "val")

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all (0: not known yet)


def _silent(stage: str, done: int, total: int) -> None:
    """No progress is shown."""


def prepare(
    documents: Corpus,
    out_dir: str | Path,
    vocab_size: int = 1024,
    normalization: str = "identity",
    val_share: float = VAL_SHARE,
    strict: bool = False,
    progress: Progress = _silent,
    max_shard_tokens: int = MAX_SHARD_TOKENS,
) -> dict:
    """Make a dataset folder and return its manifest.

    Args:
        documents: what to read; it is read four times.
        out_dir: a folder that does not exist, is empty, or is an earlier dataset, which is then replaced.
        vocab_size: pieces of the tokenizer, which is trained on the training split alone.
        normalization: "identity" (lossless) or "nmt_nfkc" (the challenge's: scores then count normalised bytes).
        val_share: expected share of the documents in the validation split.
        strict: refuse a document that the tokenizer does not give back, instead of counting it.
        progress: called as progress(stage, bytes_done, bytes_in_all) with stage "read", "tokenizer" or "encode".
        max_shard_tokens: tokens per file.

    Raises:
        InputError: out_dir holds something else, the corpus is too small for the split or the vocabulary, or strict
            found a document.
    """
    if not 0 < val_share < 1:
        raise InputError(f"prepare: val_share must lie between 0 and 1, got {val_share}")
    out_dir = Path(os.path.normpath(Path(out_dir).absolute()))
    _check_replaceable(out_dir)
    work = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        corpus = SplitCorpus(documents, val_share, lambda done: progress("read", done, 0))
        progress("tokenizer", 0, corpus.text_bytes["train"])
        tokenizer = train_tokenizer(corpus.sample("train", TRAINING_BYTES), vocab_size, normalization)
        (work / TOKENIZER_FILE).write_bytes(tokenizer.model)
        encoder = _Encoder(corpus, tokenizer, strict, progress)
        splits = {split: encoder.write(work, split, max_shard_tokens) for split in SPLITS}
        manifest = {
            "format": FORMAT,
            "source": documents.source | {"cut_at_chars": corpus.cut_at_chars},
            "duplicates_dropped": corpus.duplicates,
            "val_share": val_share,
            "normalization": normalization,
            "bytes_counted": "text" if tokenizer.lossless else "normalised text",
            "documents_changed": {"count": encoder.num_changed, "example": encoder.changed_example},
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": {"file": TOKENIZER_FILE, "sha256": tokenizer.sha256},
            "splits": splits,
            "versions": {"python": platform.python_version(), "sentencepiece": metadata.version("sentencepiece")},
        }
        (work / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _publish(work, out_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def _check_replaceable(out_dir: Path) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"prepare: {out_dir} must be a folder, got a file")
    manifest = out_dir / MANIFEST_FILE
    ours = manifest.is_file() and FORMAT in manifest.read_text(encoding="utf-8", errors="replace")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not ours:
        raise InputError(f"prepare: {out_dir} must be empty or a dataset to replace, got a folder of other files")


def _publish(work: Path, out_dir: Path) -> None:
    """Put the finished folder in place. A crash in between leaves the old dataset or none, never a mixture."""
    old = out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    work.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)


class _Encoder:
    """Writes splits as shards and counts the documents that do not come back from their tokens."""

    def __init__(self, corpus: SplitCorpus, tokenizer: Tokenizer, strict: bool, progress: Progress) -> None:
        self.corpus, self.tokenizer, self.strict, self.progress = corpus, tokenizer, strict, progress
        self.byte_counts = ByteCounts.from_tokenizer(tokenizer)
        self.num_changed = 0
        self.changed_example: str | None = None
        self.charged_bytes = dict.fromkeys(SPLITS, 0)
        self.done_bytes = 0

    def write(self, directory: Path, split: str, max_shard_tokens: int) -> dict:
        """Write a split's shards and return its part of the manifest."""
        paths = write_shards(directory, split, self._blocks(split, max_shard_tokens), max_shard_tokens)
        shards = [{"file": p.name, "tokens": count_tokens(p), "sha256": _sha256(p)} for p in paths]
        return {
            "documents": self.corpus.num_documents[split],
            "tokens": sum(shard["tokens"] for shard in shards),
            "text_bytes": self.corpus.text_bytes[split],  # as read
            "bytes": self.charged_bytes[split],  # as scored: what the tokens decode to
            "shards": shards,
        }

    def _blocks(self, split: str, block_tokens: int) -> Iterator[np.ndarray]:
        """The split as blocks of whole documents, BOS first, shuffled by digest within a block."""
        block: list[tuple[bytes, np.ndarray]] = []
        held = 0
        for key, tokens in self._encoded(split):
            block.append((key, tokens))
            held += len(tokens)
            if held >= block_tokens:
                yield self._shuffled(split, block)
                block, held = [], 0
        if block:
            yield self._shuffled(split, block)

    def _shuffled(self, split: str, block: list[tuple[bytes, np.ndarray]]) -> np.ndarray:
        # By the digest's tail: its head decided the split, and a sample by either must stay independent of the order.
        tokens = np.concatenate([tokens for _, tokens in sorted(block, key=lambda item: item[0][::-1])])
        self.charged_bytes[split] += self.byte_counts.total_bytes(tokens)
        return tokens

    def _encoded(self, split: str) -> Iterator[tuple[bytes, np.ndarray]]:
        for batch in _batches(self.corpus.read(split)):
            texts = [document.text for _, document in batch]
            encoded = self.tokenizer.encode_batch(texts, num_threads=os.cpu_count() or 1)
            decoded = self.tokenizer.decode_batch(encoded)
            for (key, document), ids, back in zip(batch, encoded, decoded, strict=True):
                if back != document.text:
                    self._count_changed(document.name)
                yield key, np.array([self.tokenizer.bos_id, *ids], dtype=np.uint16)
            self.done_bytes += sum(len(text.encode()) for text in texts)
            self.progress("encode", self.done_bytes, sum(self.corpus.text_bytes.values()))

    def _count_changed(self, name: str) -> None:
        if self.strict:
            raise InputError(
                f"prepare: the tokenizer does not give {name} back exactly; "
                "normalise it yourself, use --normalization identity, or do without --strict"
            )
        self.num_changed += 1
        self.changed_example = self.changed_example or name


def _batches(documents: Iterator[tuple[bytes, Document]]) -> Iterator[list[tuple[bytes, Document]]]:
    batch, chars = [], 0
    for item in documents:
        batch.append(item)
        chars += len(item[1].text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: str | Path, progress: Progress = _silent) -> dict:
    """Check a dataset in full and return its counts per split: {"documents", "tokens", "bytes"}.

    Checks sizes, ids, that the bytes charged for each document are those of its text, that no document is in both
    splits and, where there is a manifest (the challenge's data has none), every digest and count in it.

    Raises:
        InputError: the first thing that does not hold.
    """
    dataset = Dataset.open(path)
    promised = (dataset.manifest or {}).get("splits", {})
    shards = {"val": dataset.val_shards, "train": dataset.train_shards}
    total = sum(count_tokens(p) for paths in shards.values() for p in paths)
    val_keys: set[bytes] = set()
    counts, done = {}, 0
    for split, paths in shards.items():
        if split in promised:
            _check_digests(promised[split]["shards"], dataset.root)
        for p in paths:
            check_ids(p, open_shard(p), dataset.vocab_size)
        found = counts[split] = {"documents": 0, "tokens": sum(map(count_tokens, paths)), "bytes": 0}
        for document in dataset.documents(split):
            key = hashlib.blake2b(document.tobytes(), digest_size=16).digest()
            if split == "val":
                val_keys.add(key)
            elif key in val_keys:
                text = dataset.tokenizer.decode(document)
                raise InputError(f"data {path}: a document is in both splits; it begins {text[:60]!r}")
            found["documents"] += 1
            found["bytes"] += check_document(document, dataset.tokenizer, dataset.byte_counts)
            done += len(document) + 1
            progress("verify", done, total)
        for name, value in found.items():
            if split in promised and promised[split][name] != value:
                raise InputError(f"data {path}: {split} must hold {promised[split][name]} {name}, got {value}")
    return counts


def _check_digests(promised: list[dict], root: Path) -> None:
    for shard in promised:
        path = root / shard["file"]
        if _sha256(path) != shard["sha256"]:
            raise InputError(f"shard {path}: must have the sha256 of the manifest, has another; prepare the data again")
