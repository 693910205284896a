"""Corpora read what they say in a fixed order, refuse the rest with its line, and split without leaks."""

import json
import random

import pytest

from pgolf.data.corpus import Corpus, Document, cut_text, digest, path_documents, stdlib_documents
from pgolf.data.split import FEW_DOCUMENTS, SplitCorpus
from pgolf.errors import InputError


def corpus_of(texts: list[str]) -> Corpus:
    return Corpus({"kind": "test"}, lambda: (Document(str(i), text) for i, text in enumerate(texts)))


def test_standard_library():
    corpus = stdlib_documents()
    documents = list(corpus)
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert not any("test" in name.split("/")[:-1] or "sysconfigdata" in name for name in names)
    assert sum(len(document.text.encode()) for document in documents) > 8_000_000
    assert corpus.source["files"] == len(documents) + corpus.source["skipped_files"]


def test_files_and_folders(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "b" / "z.txt").write_bytes(b"line\r\nends \xe2\x9c\x93")
    (tmp_path / "b" / "a.md").write_text("first")
    (tmp_path / "b" / "image.bin").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "b" / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "nul \\u0000"}\n')
    corpus = path_documents([tmp_path])
    for _ in range(2):  # a corpus is read more than once
        assert list(corpus) == [
            ("a.jsonl:1", "one"),
            ("a.jsonl:3", "nul \0"),
            ("b/a.md", "first"),
            ("b/z.txt", "line\r\nends \u2713"),
        ]
        assert corpus.source == {"kind": "files", "names": [tmp_path.name], "skipped_files": 2}


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(InputError, match="absent.txt: no such file or folder"):
        path_documents([tmp_path / "absent.txt"])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="latin.txt: must be UTF-8 text"):
        list(path_documents([tmp_path / "latin.txt"]))


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "cut', "must be one JSON object"),
        (b"\xff\xfe{}", "must be one JSON object"),
        (b'["text"]', 'must be an object with a string field "text"'),
        (b'{"body": "x"}', 'must be an object with a string field "text"'),
        (b'{"text": 7}', 'must be an object with a string field "text"'),
        (b'{"text": "half \\ud800"}', "half a surrogate pair"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"a\.jsonl, line 3: .*{reason}"):
        list(path_documents([tmp_path / "a.jsonl"]))


@pytest.mark.parametrize(
    "text", ["", "short", "x" * 100, "a b " * 40, "one\ntwo\n" * 20, "\n" * 50, "word " * 3 + "y" * 60]
)
def test_cuts_join_to_the_text(text):
    pieces = list(cut_text(text, 16))
    assert "".join(pieces) == text
    assert all(len(piece) <= 16 for piece in pieces)
    assert all(pieces) or not text


def test_cuts_prefer_line_ends():
    assert list(cut_text("one two\nthree four five six", 12)) == ["one two\n", "three four ", "five six"]


def test_split_is_by_text_alone():
    texts = [f"document number {i}" for i in range(1000)]
    split = SplitCorpus(corpus_of(texts), 0.1)
    val = {document.text for _, document in split.read("val")}
    train = {document.text for _, document in split.read("train")}
    assert val.isdisjoint(train)
    assert val | train == set(texts)
    assert 60 <= len(val) <= 140  # binomial(1000, 0.1): four standard deviations are 38
    assert split.num_documents == {"train": len(train), "val": len(val)}
    assert split.text_bytes["val"] == sum(len(text.encode()) for text in val)

    shuffled = texts + texts[:300] + [f"another {i}" for i in range(500)]
    random.shuffle(shuffled)
    other = SplitCorpus(corpus_of(shuffled), 0.1)
    assert other.duplicates == 300
    assert val == {document.text for _, document in other.read("val")} & set(texts)
    assert len(list(other.read("val"))) + len(list(other.read("train"))) == 1500  # each text once


def test_sample_is_a_fixed_part():
    split = SplitCorpus(corpus_of([f"{i:099d}\n" for i in range(2000)]), 0.05)
    sample = list(split.sample("train", 50_000))
    assert sample == list(split.sample("train", 50_000))
    assert 35_000 < sum(map(len, sample)) < 65_000  # 500 of 100 bytes each expected, seven standard deviations
    assert len(list(split.sample("train", 10**9))) == split.num_documents["train"]


def test_few_documents_are_cut():
    text = "".join(f"line {i} of a single long file\n" for i in range(10_000))
    split = SplitCorpus(corpus_of([text]), 0.05)
    pieces = {name: [d.text for _, d in split.read(name)] for name in ("train", "val")}
    assert split.cut_at_chars == len(text) // 256
    assert len(pieces["val"]) >= 1
    assert sum(map(len, pieces["val"] + pieces["train"])) == len(text)
    whole = SplitCorpus(corpus_of([f"{i} {text}" for i in range(FEW_DOCUMENTS)]), 0.05)
    assert whole.cut_at_chars is None


def test_some_document_is_always_for_validation():
    split = SplitCorpus(corpus_of([f"document number {i}" for i in range(FEW_DOCUMENTS)]), 1e-9)
    assert split.num_documents["val"] == 1
    ((key, _),) = split.read("val")
    assert key[:8] == min(digest(f"document number {i}")[:8] for i in range(FEW_DOCUMENTS))


def test_small_corpora_are_refused():
    for texts in ([], [""], ["a short text"]):
        with pytest.raises(InputError, match="at least two different documents"):
            SplitCorpus(corpus_of(texts), 0.05)
    with pytest.raises(InputError, match=r"val_share 0.9999999 leaves no document for training"):
        SplitCorpus(corpus_of([f"document {i}" for i in range(100)]), 0.9999999)


def test_json_of_the_source(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert str(tmp_path.parent) not in json.dumps(path_documents([tmp_path, tmp_path / "a.txt"]).source)
