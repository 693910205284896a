"""From text to a dataset and back: every byte is accounted for, a crash leaves nothing half made, damage is found."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pgolf.data.corpus import Corpus, Document, digest, stdlib_documents
from pgolf.data.dataset import Dataset
from pgolf.data.prepare import prepare, verify
from pgolf.data.shards import open_shard, shard_name, write_shard
from pgolf.data.tokenizer import Tokenizer
from pgolf.errors import InputError

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "tokenizer.npz")
TRICKY = ["", " leading", "tab\tend\r\n", "\n\n", "\U0001f600 e\u0301", "nul \0", "\u2581 and \u2581"]


@functools.cache
def texts() -> list[str]:
    """About 100 kB in over 64 documents, the tricky ones among them, one twice."""
    found = [*TRICKY, TRICKY[1]]
    for document in stdlib_documents():
        if len(document.text) < 3000:
            found.append(document.text)
        if sum(map(len, found)) > 100_000:
            return found
    raise AssertionError("the standard library is smaller than the sample")


def corpus() -> Corpus:
    return Corpus({"kind": "test"}, lambda: (Document(f"number {i}", text) for i, text in enumerate(texts())))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "set"
    prepare(corpus(), out, 400, val_share=0.2, max_shard_tokens=10_000)
    return out


def test_every_document_comes_back(made):
    dataset = Dataset.open(made)
    back = {s: [dataset.tokenizer.decode(ids) for ids in dataset.documents(s)] for s in ("train", "val")}
    assert sorted(back["train"] + back["val"]) == sorted(set(texts()))
    assert len(back["val"]) >= 5
    assert len(dataset.train_shards) >= 3  # documents continue from one shard into the next
    manifest = dataset.manifest
    assert manifest["duplicates_dropped"] == len(texts()) - len(set(texts()))
    assert manifest["documents_changed"] == {"count": 0, "example": None}
    for split, found in back.items():
        size = sum(len(text.encode()) for text in found)
        assert manifest["splits"][split]["bytes"] == manifest["splits"][split]["text_bytes"] == size
        assert manifest["splits"][split]["documents"] == len(found)


def test_verify_counts(made):
    seen = []
    counts = verify(made, progress=lambda *args: seen.append(args))
    splits = json.loads((made / "manifest.json").read_text())["splits"]
    for split, found in counts.items():
        assert found == {name: splits[split][name] for name in ("documents", "tokens", "bytes")}
    total = sum(found["tokens"] for found in counts.values())
    assert seen[-1] == ("verify", total, total)


def test_bytes_of_the_stream_are_the_bytes_of_the_text(made):
    dataset = Dataset.open(made)
    tokens = dataset.val_tokens()
    assert tokens[0] == dataset.tokenizer.bos_id
    assert dataset.byte_counts.total_bytes(tokens) == dataset.manifest["splits"]["val"]["bytes"]


def test_same_text_gives_the_same_folder(made, tmp_path):
    stages = []
    prepare(
        corpus(), tmp_path / "again", 400, val_share=0.2, max_shard_tokens=10_000, progress=lambda *a: stages.append(a)
    )
    files = sorted(path.name for path in made.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes(), name
    assert [stage for stage, _, _ in stages][0] == "read"
    assert stages[-1][0] == "encode"
    assert stages[-1][1] == stages[-1][2] == sum(len(text.encode()) for text in set(texts()))
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_documents_are_shuffled(tmp_path):
    listed = [f"document {i} of a list that is in order\n" * 3 for i in range(200)]
    source = Corpus({}, lambda: (Document(text, text) for text in listed))
    prepare(source, tmp_path / "set", 300)
    dataset = Dataset.open(tmp_path / "set")
    order = [listed.index(dataset.tokenizer.decode(ids)) for ids in dataset.documents("train")]
    assert len(order) > 150
    assert order == sorted(order, key=lambda i: digest(listed[i])[::-1])
    assert order != sorted(order)


def test_normalising_counts_normalised_bytes(tmp_path):
    manifest = prepare(corpus(), tmp_path / "set", 400, "nmt_nfkc", val_share=0.2)
    dataset = Dataset.open(tmp_path / "set")
    assert manifest["bytes_counted"] == "normalised text"
    assert manifest["documents_changed"]["count"] > 0
    for split in ("train", "val"):
        back = [dataset.tokenizer.decode(ids) for ids in dataset.documents(split)]
        assert manifest["splits"][split]["bytes"] == sum(len(text.encode()) for text in back)
        assert manifest["splits"][split]["bytes"] < manifest["splits"][split]["text_bytes"]
    verify(tmp_path / "set")


def test_strict_refuses_what_does_not_come_back(tmp_path):
    with pytest.raises(InputError, match=r"does not give number \d+ back exactly"):
        prepare(corpus(), tmp_path / "set", 400, "nmt_nfkc", strict=True)
    assert not list(tmp_path.iterdir())  # nothing is left behind
    prepare(corpus(), tmp_path / "set", 400, strict=True)


def test_a_crash_keeps_the_old_dataset(made, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(made, out)
    (tmp_path / ".set.partial").mkdir()  # what a killed run leaves
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def crash(stage: str, done: int, total: int) -> None:
        if stage == "encode":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus(), out, 360, progress=crash)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    prepare(corpus(), out, 360)  # and a later run replaces it
    assert Dataset.open(out).vocab_size == 360
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_other_folders_are_never_replaced(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="must be empty or a dataset to replace"):
        prepare(corpus(), tmp_path / "set", 400)
    with pytest.raises(InputError, match="must be a folder, got a file"):
        prepare(corpus(), tmp_path / "set" / "thesis.txt", 400)
    with pytest.raises(InputError, match="val_share must lie between 0 and 1"):
        prepare(corpus(), tmp_path / "other", 400, val_share=1.5)
    assert (tmp_path / "set" / "thesis.txt").read_text() == "years of work"


@pytest.fixture
def copy(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "set")
    return tmp_path / "set"


def test_damage_is_found(copy, made):
    train = copy / shard_name("train", 1)
    tokens = np.array(open_shard(train))
    write_shard(train, tokens[::-1])
    with pytest.raises(InputError, match="must have the sha256 of the manifest"):
        verify(copy)
    write_shard(train, tokens[:-1])
    with pytest.raises(InputError, match="the manifest promises these train shards"):
        Dataset.open(copy)
    train.unlink()
    with pytest.raises(InputError, match="the manifest promises these train shards"):
        Dataset.open(copy)
    shutil.copy(made / train.name, train)
    (copy / "tokenizer.model").write_bytes(GOLDEN["spm_model_proto"].tobytes())
    with pytest.raises(InputError, match="made with another tokenizer"):
        Dataset.open(copy)
    (copy / "manifest.json").write_text('{"format": "pgolf-dataset-1"}')
    with pytest.raises(InputError, match=r"must be complete, lacks 'tokenizer'"):
        Dataset.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="must be JSON"):
        Dataset.open(copy)


def test_a_document_in_both_splits_is_found(copy):
    (copy / "manifest.json").unlink()  # the digests would notice first
    for shard in Dataset.open(copy).val_shards[1:]:
        shard.unlink()
    dataset = Dataset.open(copy)
    stolen = next(ids for ids in dataset.documents("train") if len(ids) > 100)
    write_shard(dataset.val_shards[0], np.array([dataset.tokenizer.bos_id, *stolen]))
    with pytest.raises(InputError, match="a document is in both splits"):
        verify(copy)


def challenge_layout(root: Path) -> Path:
    """The challenge's `data` folder, with its tokenizer and one shard per split."""
    shards = root / "data" / "datasets" / "fineweb10B_sp420"
    shards.mkdir(parents=True)
    (root / "data" / "tokenizers").mkdir()
    (root / "data" / "tokenizers" / "fineweb_420_bpe.model").write_bytes(GOLDEN["spm_model_proto"].tobytes())
    (shards / "fineweb_val_000000.bin").write_bytes(GOLDEN["shard_bytes"].tobytes())
    write_shard(shards / "fineweb_train_000000.bin", GOLDEN["val_tokens"][::-1])
    return root / "data"


def test_layout_of_the_challenge(tmp_path):
    data = challenge_layout(tmp_path)
    (data / "manifest.json").write_text('["the challenge has a file of this name too"]')
    (data / "datasets" / "fineweb10B_sp420" / "manifest.json").write_text('{"files": 1}')
    for path in (data, data / "datasets" / "fineweb10B_sp420"):
        dataset = Dataset.open(path, vocab_size=420)
        assert dataset.vocab_size == 420
        assert dataset.manifest is None
        assert dataset.root == data / "datasets" / "fineweb10B_sp420"
        np.testing.assert_array_equal(dataset.val_tokens(64), GOLDEN["val_tokens"])
        assert len(dataset.val_tokens()) == 1500
    (data / "datasets" / "fineweb10B_sp1024").mkdir()
    assert Dataset.open(data, vocab_size=420).vocab_size == 420
    with pytest.raises(InputError, match="must hold one set of shards, found fineweb10B_sp1024, fineweb10B_sp420"):
        Dataset.open(data)
    model = (data / "tokenizers" / "fineweb_420_bpe.model").rename(tmp_path / "moved.model")
    with pytest.raises(InputError, match=r"no tokenizer at .*fineweb_420_bpe\.model"):
        Dataset.open(data, vocab_size=420)
    for tokenizer in (model, Tokenizer(model)):
        assert Dataset.open(data / "datasets" / "fineweb10B_sp420", tokenizer=tokenizer).vocab_size == 420


def test_errors_say_what_and_why(made, tmp_path):
    with pytest.raises(InputError, match=r"no such folder; make one with `pgolf data stdlib --out DIR`"):
        Dataset.open(tmp_path / "absent")
    with pytest.raises(InputError, match=r"found none; make one with `pgolf data stdlib --out DIR`"):
        Dataset.open(tmp_path)
    with pytest.raises(InputError, match="must be the tokenizer's 400, got 1024; use `--set vocab_size=400`"):
        Dataset.open(made, vocab_size=1024)
    with pytest.raises(InputError, match="validation needs at least 1000001 tokens"):
        Dataset.open(made).val_tokens(1_000_000)
    (tmp_path / "x").mkdir()
    shutil.copy(made / "tokenizer.model", tmp_path / "x")
    write_shard(tmp_path / "x" / shard_name("val", 0), np.array([1, 5, 400]))
    with pytest.raises(InputError, match="below vocab_size 400, got 400 at token 2"):
        Dataset.open(tmp_path / "x")
