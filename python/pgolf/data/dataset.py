"""Open prepared data: shards, their tokenizer and exact byte counts, in our layout or the challenge's, unchanged.

Ours is one folder: fineweb_{train,val}_*.bin, tokenizer.model, manifest.json. The challenge's is
data/datasets/fineweb10B_sp1024/ with data/tokenizers/fineweb_1024_bpe.model beside it; the folder's name names the
tokenizer.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from .byte_counts import ByteCounts
from .shards import check_ids, count_tokens, find_shards, open_shard
from .tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.model"
MANIFEST_FILE = "manifest.json"
FORMAT = "pgolf-dataset-1"
HOW_TO_MAKE = "make one with `pgolf data stdlib --out DIR` or `pgolf data prepare PATH... --out DIR`"
# Opening looks at this many tokens of each shard for ids beyond the vocabulary; `verify` looks at all.
CHECKED_TOKENS = 1 << 16


@dataclass(frozen=True)
class Dataset:
    """Training and validation shards in reading order, and what turns their tokens back into bytes."""

    root: Path
    train_shards: list[Path]
    val_shards: list[Path]
    tokenizer: Tokenizer
    byte_counts: ByteCounts
    manifest: dict | None  # None: the challenge's own data

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @classmethod
    def open(
        cls, path: str | Path, tokenizer: str | Path | Tokenizer | None = None, vocab_size: int | None = None
    ) -> "Dataset":
        """Open a folder of shards.

        Args:
            path: the folder with the shards, or the challenge's `data` folder.
            tokenizer: a model file, where it does not lie where the layout says.
            vocab_size: what the model expects; also picks one of several sets in the challenge's `data` folder.

        Raises:
            InputError: nothing there, no tokenizer, or vocabularies that do not agree.
        """
        root = _find_root(Path(path), vocab_size)
        train, val = find_shards(root, "train"), find_shards(root, "val")
        if not train and not val:
            raise InputError(
                f"data {path}: must hold fineweb_train_*.bin and fineweb_val_*.bin, found none; {HOW_TO_MAKE}"
            )
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer(_find_tokenizer(root) if tokenizer is None else tokenizer)
        if vocab_size is not None and tokenizer.vocab_size != vocab_size:
            raise InputError(
                f"data {path}: vocab_size must be the tokenizer's {tokenizer.vocab_size}, got {vocab_size}; "
                f"use `--set vocab_size={tokenizer.vocab_size}` or other data"
            )
        manifest = _read_manifest(root)
        if manifest is not None:
            _check_manifest(root, manifest, tokenizer, {"train": train, "val": val})
        for shard in [*train, *val]:
            check_ids(shard, open_shard(shard)[:CHECKED_TOKENS], tokenizer.vocab_size)
        return cls(root, train, val, tokenizer, ByteCounts.from_tokenizer(tokenizer), manifest)

    def provenance(self) -> dict:
        """What a reader needs to know of the text: JSON values.

        Returns:
            {"name", "sha256", "tokenizer_sha256", "train_shards", "train_tokens", "val_shards", "val_tokens",
            "train_documents", "val_documents"}; documents are None without a manifest of ours. sha256 is of the shards'
            names, sizes and, from the manifest, digests: it costs no reading of them.
        """
        facts, shards = {}, {"train": self.train_shards, "val": self.val_shards}
        splits = (self.manifest or {}).get("splits", {})
        listing = [self.tokenizer.sha256]
        for split, paths in shards.items():
            digests = {s["file"]: s.get("sha256") for s in splits.get(split, {}).get("shards", [])}
            counts = {path.name: count_tokens(path) for path in paths}
            listing += [(split, name, tokens, digests.get(name)) for name, tokens in counts.items()]
            facts[f"{split}_shards"], facts[f"{split}_tokens"] = len(paths), sum(counts.values())
            facts[f"{split}_documents"] = splits.get(split, {}).get("documents")
        sha256 = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        return {"name": self.root.resolve().name, "sha256": sha256, "tokenizer_sha256": self.tokenizer.sha256, **facts}

    def val_tokens(self, multiple_of: int = 0) -> np.ndarray:
        """All validation tokens in order, uint16.

        Args:
            multiple_of: above 0, keep floor((n - 1) / multiple_of) * multiple_of targets (one token more than that),
                as the challenge does with its sequence length.

        Raises:
            InputError: there are no two tokens, or not multiple_of targets.
        """
        tokens = np.concatenate([open_shard(path) for path in self.val_shards] or [np.empty(0, dtype="<u2")])
        targets = len(tokens) - 1
        if multiple_of > 0:
            targets -= targets % multiple_of
        if targets < 1:
            raise InputError(
                f"data {self.root}: validation needs at least {max(multiple_of, 1) + 1} tokens, got {len(tokens)}; "
                "use more text, a larger --val-share, or a shorter eval_seq_len"
            )
        return tokens[: targets + 1]

    def documents(self, split: str) -> Iterator[np.ndarray]:
        """The documents of "train" or "val" in order, uint16 without BOS; one may span two shards."""
        pending: list[np.ndarray] = []
        for path in self.train_shards if split == "train" else self.val_shards:
            tokens = open_shard(path)
            starts = np.flatnonzero(tokens == self.tokenizer.bos_id).tolist()
            pending.append(tokens[: starts[0]] if starts else tokens)
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                if len(joined := np.concatenate(pending)):
                    yield joined[1:] if joined[0] == self.tokenizer.bos_id else joined
                pending = [tokens[start:end]]
        if len(joined := np.concatenate(pending or [np.empty(0, dtype="<u2")])):
            yield joined[1:] if joined[0] == self.tokenizer.bos_id else joined


def _find_root(path: Path, vocab_size: int | None) -> Path:
    if not path.is_dir():
        raise InputError(f"data {path}: no such folder; {HOW_TO_MAKE}")
    sets = sorted(p for p in (path / "datasets").glob("*_sp*") if p.is_dir())
    if not sets or find_shards(path, "train") or find_shards(path, "val"):
        return path
    if vocab_size is not None:
        sets = [p for p in sets if _named_vocab_size(p) == vocab_size]
    if len(sets) != 1:
        names = ", ".join(p.name for p in sorted((path / "datasets").glob("*_sp*")))
        wanted = "one set of shards" if vocab_size is None else f"one set of shards of vocabulary {vocab_size}"
        raise InputError(f"data {path}: must hold {wanted}, found {names}; name the folder itself")
    return sets[0]


def _named_vocab_size(root: Path) -> int | None:
    match = re.search(r"_sp(\d+)$", root.name)
    return int(match[1]) if match else None


def _find_tokenizer(root: Path) -> Path:
    tried = [root / TOKENIZER_FILE]
    root = root.resolve()
    if (named := _named_vocab_size(root)) is not None:
        tried.append(root.parent.parent / "tokenizers" / f"fineweb_{named}_bpe.model")
    for path in tried:
        if path.is_file():
            return path
    raise InputError(
        f"data {root}: no tokenizer at {' or '.join(map(str, tried))}; "
        "put the model file there or name it with --tokenizer"
    )


def _read_manifest(root: Path) -> dict | None:
    path = root / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path}: must be JSON, got {e}; prepare the data again") from None
    # The challenge's folders carry manifests of their own, which say nothing we need.
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def _check_manifest(root: Path, manifest: dict, tokenizer: Tokenizer, shards: dict[str, list[Path]]) -> None:
    """Names, sizes and the tokenizer are as the manifest says; contents are for `verify`, which reads them."""
    try:
        made_with = manifest["tokenizer"]["sha256"]
        promised = {split: {s["file"]: s["tokens"] for s in manifest["splits"][split]["shards"]} for split in shards}
    except (KeyError, TypeError) as e:
        raise InputError(f"{root / MANIFEST_FILE}: must be complete, lacks {e}; prepare the data again") from None
    if made_with != tokenizer.sha256:
        raise InputError(f"data {root}: the shards were made with another tokenizer than this one; use theirs")
    for split, paths in shards.items():
        found = {path.name: count_tokens(path) for path in paths}
        if found != promised[split]:
            raise InputError(
                f"data {root}: the manifest promises these {split} shards and tokens: {promised[split]}, got {found}; "
                "prepare the data again"
            )
