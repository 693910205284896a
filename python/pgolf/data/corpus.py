"""Documents: the standard library's own sources, text files, folders, and .jsonl files with a "text" field.

A corpus is read several times and never held whole. Which split a document belongs to follows from a digest of its text
alone, so equal texts are one document and no text is on both sides, in whatever order or corpus it comes.
"""

import hashlib
import json
import platform
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError

# Tests are left out because they repeat the code under test; build configuration because it names this machine's paths.
NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
BINARY_PROBE_BYTES = 8192


class Document(NamedTuple):
    """A text and where it came from, for messages."""

    name: str
    text: str


@dataclass
class Corpus:
    """Documents that can be read again and again. `source` describes them without naming folders of this machine."""

    source: dict
    read: Callable[[], Iterator[Document]]

    def __iter__(self) -> Iterator[Document]:
        return self.read()


def digest(text: str) -> bytes:
    """16 bytes that stand for a text: equal for equal texts, uniform over different ones."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def stdlib_documents() -> Corpus:
    """The .py files of the running Python's standard library (12 MB), by relative path, decoded as Python does.

    Raises:
        InputError: this Python carries no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    files = sorted(path.as_posix() for path in found if _is_source(path))
    if not files:
        raise InputError(f"corpus: there must be .py files in {root}, found none; name text files instead")
    source = {"kind": "stdlib", "python": platform.python_version(), "files": len(files)}

    def read() -> Iterator[Document]:
        skipped = 0
        for name in files:
            try:
                with tokenize.open(root / name) as file:
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                skipped += 1
                continue
            yield Document(name, text)
        source["skipped_files"] = skipped

    return Corpus(source, read)


def _is_source(path: Path) -> bool:
    return not (NOT_SOURCES & set(path.parts) or path.parts[0].startswith("config-") or "_sysconfigdata" in path.name)


def path_documents(paths: list[str | Path]) -> Corpus:
    """Text files, .jsonl files and folders of both, as UTF-8.

    A folder is read recursively in the order of its paths, without hidden files; files in it that are not UTF-8 text
    are skipped and counted in `source["skipped_files"]`. Each line of a .jsonl file is an object with a string "text".

    Raises:
        InputError: a path is missing, a named file is not text, or a .jsonl line is not as above (with its number).
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.exists():
            raise InputError(f"corpus: {path}: no such file or folder")
    source = {"kind": "files", "names": [path.resolve().name for path in paths], "skipped_files": 0}

    def read() -> Iterator[Document]:
        source["skipped_files"] = 0
        for path in paths:
            files = [path] if path.is_file() else _files_below(path)
            for file in files:
                name = path.resolve().name if file is path else file.relative_to(path).as_posix()
                if file.suffix == ".jsonl":
                    yield from _jsonl_documents(file, name)
                elif (text := _read_text(file)) is not None:
                    yield Document(name, text)
                elif file is path:
                    raise InputError(f"corpus: {path}: must be UTF-8 text, got bytes that are not; convert it first")
                else:
                    source["skipped_files"] += 1

    return Corpus(source, read)


def _files_below(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    visible = (path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())


def _read_text(path: Path) -> str | None:
    """The text of a file exactly as stored (line ends included), or None if it is not UTF-8 text."""
    data = path.read_bytes()
    if b"\0" in data[:BINARY_PROBE_BYTES]:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _jsonl_documents(path: Path, name: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"corpus: {path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as e:
                raise InputError(f"{where}: must be one JSON object, got {line[:60]!r} ({e})") from None
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise InputError(f'{where}: must be an object with a string field "text", got {line[:60]!r}')
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise InputError(f"{where}: the text must be valid Unicode, got half a surrogate pair ({e})") from None
            yield Document(f"{name}:{number}", text)


def cut_documents(documents: Corpus, max_chars: int) -> Corpus:
    """The same text in pieces of at most max_chars characters, cut at line ends where there are any."""

    def read() -> Iterator[Document]:
        for document in documents:
            for index, piece in enumerate(cut_text(document.text, max_chars)):
                yield Document(f"{document.name}#{index}", piece)

    return Corpus(documents.source, read)


def cut_text(text: str, max_chars: int) -> Iterator[str]:
    """Pieces of at most max_chars characters that join to `text`, cut after a newline, else a space, else hard."""
    start = 0
    while len(text) - start > max_chars:
        end = start + max_chars
        for separator in ("\n", " "):
            if (found := text.rfind(separator, start, end)) >= 0:
                end = found + 1
                break
        yield text[start:end]
        start = end
    yield text[start:]
