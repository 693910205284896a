"""Tokenizers give text back exactly and are charged exactly its bytes; the challenge's own tables are met bit for bit.

Golden data: a SentencePiece model made with the challenge's options, its tables and byte counts as the published
evaluation computed them.
"""

import functools
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numerics import DEVICES

from pgolf.data.byte_counts import ByteCounts, check_against_text, check_document
from pgolf.data.corpus import stdlib_documents
from pgolf.data.tokenizer import PROBES, Tokenizer, train_tokenizer
from pgolf.errors import InputError

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "tokenizer.npz")
TRICKY = [
    "",
    " ",
    "   leading and trailing   ",
    "\tif x:\n\t\ty\n",
    "a\r\nb\rc\n",
    "\n\n\n",
    "smile \U0001f600 family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "cafe\u0301 caf\u00e9 \ufb01 \uff21",  # combining marks and compatibility characters
    "nul \0 inside",
    "\u2581 \u2581\u2581a \u2581",  # the character SentencePiece writes spaces as
    "\u2585\u2047 <s> </s> <unk> <0x41>",  # SentencePiece's reserved marks and spelled-out symbols
    "\u3000\xa0\u2028\u200b\ufeff",  # spaces that normalisation would change
]


@functools.cache
def sample_texts() -> list[str]:
    """About 150 kB of Python: enough for 512 pieces, small enough to train on in a fraction of a second."""
    texts = []
    for document in stdlib_documents():
        texts.append(document.text)
        if sum(map(len, texts)) > 150_000:
            return texts
    raise AssertionError("the standard library is smaller than the sample")


@pytest.fixture(scope="module")
def lossless() -> Tokenizer:
    return train_tokenizer(sample_texts(), 512)


@pytest.fixture(scope="module")
def normalising() -> Tokenizer:
    return train_tokenizer(sample_texts(), 512, "nmt_nfkc")


@pytest.fixture(scope="module")
def golden() -> Tokenizer:
    return Tokenizer(GOLDEN["spm_model_proto"].tobytes())


tables = functools.cache(ByteCounts.from_tokenizer)


def charged(tokenizer: Tokenizer, ids: list[int]) -> int:
    return tables(tokenizer).total_bytes(np.array([tokenizer.bos_id, *ids]))


def test_tables_of_the_challenge(golden):
    counts = ByteCounts.from_tokenizer(golden)
    assert counts.bytes.dtype == torch.int16
    np.testing.assert_array_equal(counts.bytes, GOLDEN["base_bytes"])
    np.testing.assert_array_equal(counts.leading_space, GOLDEN["has_leading_space"])
    np.testing.assert_array_equal(counts.boundary, GOLDEN["is_boundary"])
    assert golden.normalised
    assert not golden.lossless
    assert not golden.keeps_leading_space


@pytest.mark.parametrize("device", DEVICES)
def test_bytes_per_target_of_the_challenge(golden, device):
    tokens = torch.from_numpy(GOLDEN["val_tokens"].astype(np.int64)).to(device)
    counted = ByteCounts.from_tokenizer(golden).to(device).count_bytes(tokens[1:], tokens[:-1])
    assert counted.dtype == torch.int64
    np.testing.assert_array_equal(counted.cpu(), GOLDEN["bytes_per_target"])
    total = ByteCounts.from_tokenizer(golden).total_bytes(GOLDEN["val_tokens"], chunk=100)  # BOS first: 0 bytes
    assert total == GOLDEN["bytes_per_target"].sum()


@pytest.mark.parametrize("text", TRICKY, ids=ascii)
def test_lossless_on_tricky_documents(lossless, text):
    ids = lossless.encode(text)
    assert lossless.decode(ids) == text
    assert charged(lossless, ids) == len(text.encode())


@hypothesis.given(text=st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\u2581a"))))
@hypothesis.settings(
    max_examples=100, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_text(lossless, normalising, text):
    ids = lossless.encode(text)
    assert lossless.decode(ids) == text
    assert charged(lossless, ids) == len(text.encode())
    ids = normalising.encode(text)  # charged the bytes of what comes back, which is not `text`
    assert charged(normalising, ids) == len(normalising.decode(ids).encode())


def test_what_the_tokenizers_say_of_themselves(lossless, normalising):
    assert lossless.lossless
    assert lossless.keeps_leading_space
    assert not lossless.normalised
    assert normalising.normalised
    assert not normalising.lossless
    assert not normalising.keeps_leading_space
    assert [lossless.decode(lossless.encode(text)) for text in PROBES] == list(PROBES)
    for tokenizer in (lossless, normalising):
        sp = tokenizer.processor
        assert [sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()] == [0, 1, 2, 3]
        assert sp.piece_to_id("\u2581") != sp.unk_id()  # the challenge's scripts insist on it


def test_leading_space_after_bos(lossless, normalising):
    for tokenizer, kept in ((lossless, 1), (normalising, 0)):
        space = tokenizer.processor.piece_to_id("\u2581")
        assert charged(tokenizer, [space]) == kept
        letter = tokenizer.processor.piece_to_id("a")
        assert charged(tokenizer, [letter, space, letter]) == 3


def test_runs_of_spaces_are_one_piece_and_count_each_space(lossless):
    ids = lossless.encode("x" + 8 * " ")
    assert len(ids) == 2
    assert charged(lossless, ids) == 9


def test_ids_beyond_the_tokenizer_count_as_control(lossless):
    counts = ByteCounts.from_tokenizer(lossless, vocab_size=600)
    assert len(counts.bytes) == 600
    assert counts.boundary[512:].all()
    assert not counts.bytes[512:].any()


def test_a_stream_is_checked_document_by_document(lossless):
    counts = ByteCounts.from_tokenizer(lossless)
    documents = [lossless.encode(text) for text in TRICKY]
    stream = np.concatenate([[lossless.bos_id, *ids] for ids in documents])
    assert check_against_text(stream, lossless, counts) == sum(len(text.encode()) for text in TRICKY)
    half_a_character = np.array(lossless.encode("\U0001f600")[:2])
    with pytest.raises(InputError, match=r"must be charged its \d+ bytes, got \d+"):
        check_document(half_a_character, lossless, counts)


def test_training_is_deterministic_and_threads_do_not_matter(lossless):
    assert train_tokenizer(sample_texts(), 512).model == lossless.model
    texts = sample_texts()[:20] + TRICKY
    assert lossless.encode_batch(texts, num_threads=4) == [lossless.encode(text) for text in texts]
    assert lossless.decode_batch(lossless.encode_batch(texts)) == texts


def test_lossless_options_compress_best(lossless, normalising):
    """Pieces cross spaces and line ends: unchanged text takes hardly more tokens than text without its indentation."""
    texts = sample_texts()
    raw = sum(len(text.encode()) for text in texts)
    tokens = sum(map(len, lossless.encode_batch(texts)))
    assert raw / tokens > 1.7
    assert tokens < 1.1 * sum(map(len, normalising.encode_batch(texts)))


def test_errors_say_what_and_why(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Tokenizer(tmp_path / "absent.model")
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(InputError, match="must be a SentencePiece model"):
        Tokenizer(tmp_path / "text.model")
    with pytest.raises(InputError, match=r"vocab_size must lie in 261\.\.65536"):
        train_tokenizer(["text"], 256)
    with pytest.raises(InputError, match=r"fills 2\d\d of 4096 pieces; use more text or --vocab-size 2\d\d"):
        train_tokenizer(["some text"], 4096)
    with pytest.raises(InputError, match="characters need at least 350 pieces, got vocab_size 300"):
        train_tokenizer([chr(0x4E00 + i) for i in range(90)] * 9, 300)
    with pytest.raises(InputError, match="must not be empty"):
        train_tokenizer(["", ""], 512)
    with pytest.raises(InputError, match="normalization must be one of"):
        train_tokenizer(["text"], 512, "nfd")
