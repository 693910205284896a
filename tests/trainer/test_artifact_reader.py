"""The artifact file: exact round trips, the same bytes twice, and a reader that survives any file."""

import hashlib
import json
import lzma
import os
import struct
import tracemalloc

import brotli
import pytest
from artifact_samples import TOKENIZER, assert_same, seeded_content, small_content
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.artifact import container, pack
from pgolf.artifact.header import Header
from pgolf.artifact.inspect import inspect
from pgolf.config import Config
from pgolf.errors import InputError

FUZZ = settings(max_examples=200, deadline=None)


@pytest.mark.parametrize("compressor", container.COMPRESSORS)
@pytest.mark.parametrize("piece", [container.PIECE_BYTES, 100, 1], ids=lambda n: f"{n} byte pieces")
def test_file_round_trip(compressor, piece, monkeypatch):
    monkeypatch.setattr(container, "PIECE_BYTES", piece)
    content = small_content(compressor=compressor, ve_layers=(9, 10))
    data = container.encode(content)
    read = container.decode(data)
    assert_same(read.tensors, content.tensors)
    assert read.header == content.header
    assert read.header.config.ve_layers == (9, 10)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert container.encode(read) == data  # the same bytes, whatever the number of threads


def test_empty_artifact():
    content = pack.make_content(Config(), {}, TOKENIZER)
    assert container.decode(container.encode(content)).tensors == {}


def resign(data: bytes) -> bytes:
    """Give changed data the hash it should have."""
    return data[:12] + hashlib.sha256(data[44:]).digest() + data[44:]


def build(header: object, tensors: bytes = b"", compressor: int = 0) -> bytes:
    """A file that is well signed and says anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = struct.pack("<I", len(text)) + text + tensors
    piece = brotli.compress(raw, quality=1)
    return sign(compressor, len(raw), piece)


def sign(compressor: int, size: int, piece: bytes) -> bytes:
    """A file of one piece that says it holds `size` bytes."""
    return resign(b"pgolfart" + struct.pack("<I32sBQI", 1, b"", compressor, size, len(piece)) + piece)


def test_every_changed_or_missing_byte_is_refused():
    data = container.encode(small_content())
    for i in range(len(data)):
        with pytest.raises(InputError):
            container.decode(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        with pytest.raises(InputError):
            container.decode(data[:i])


@given(st.data())
@FUZZ
def test_damage_under_a_right_hash_is_refused_or_read(data):
    """Overwrite, cut or insert bytes behind the hash and sign again: the reader may refuse, but never crash."""
    read_or_refuse(resign(damage(data, container.encode(seeded_content()), start=44)))


@given(st.data())
@FUZZ
def test_damaged_content_is_refused_or_read(data):
    """The same behind the compressor, where damage reaches the header and the planes."""
    content = seeded_content()
    text, tensors = content.header.to_json(), b"".join(container.tensor_planes(content.tensors).values())
    raw = damage(data, struct.pack("<I", len(text)) + text + tensors, start=0)
    read_or_refuse(sign(0, len(raw), brotli.compress(raw, quality=1)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.data())
@FUZZ
def test_lying_headers_are_refused_or_read(data):
    header, tensors = seeded_content().header.as_dict(), seeded_content().tensors
    where = data.draw(st.sampled_from(["config", "tensors", "shape", "top"]))
    if where == "config":
        header["config"][data.draw(st.sampled_from(sorted(header["config"])))] = data.draw(JSON)
    elif where == "tensors":
        header["tensors"][data.draw(st.integers(0, 7))] = data.draw(JSON)
    elif where == "shape":
        header["tensors"][data.draw(st.integers(0, 7))][2] = data.draw(st.lists(st.integers(-2, 2**70), max_size=4))
    else:
        header[data.draw(st.sampled_from(sorted(header)))] = data.draw(JSON)
    read_or_refuse(build(header, b"".join(container.tensor_planes(tensors).values())))


def damage(data: st.DataObject, original: bytes, start: int) -> bytes:
    """Overwrite, cut out or insert up to 40 bytes somewhere from `start` on."""
    at, insert = data.draw(st.integers(start, len(original))), data.draw(st.binary(max_size=40))
    cut = data.draw(st.just(len(insert)) | st.integers(0, 40))
    return original[:at] + insert + original[at + cut :]


def read_or_refuse(data: bytes) -> None:
    try:
        content = container.decode(data)
    except InputError:
        return
    assert all(t.dequantize().isfinite().all() for t in content.tensors.values())


GOOD_HEADER = Header(Config(), TOKENIZER, (), {}).as_dict()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must have at least 53 bytes, got 0"),
        (b"x" * 100, "must begin with b'pgolfart', got b'xxxxxxxx'"),
        (b"pgolfart" + struct.pack("<I", 2) + bytes(100), "version must be 1, got 2; a newer pgolf may read it"),
        (b"pgolfart" + struct.pack("<I", 1) + bytes(100), "SHA-256 does not match"),
        (build(GOOD_HEADER, compressor=7), "the compressor must be one of .*, got 7"),
        (build(GOOD_HEADER, compressor=1), "piece 0 is not .* of lzma"),
        (build(GOOD_HEADER | {"more": 1}), "the header must be an object of exactly config, tokenizer_sha256"),
        (build(b"{"), "the header is not valid JSON"),
        (build(b"[" * 100_000), "the header is not valid JSON"),
        (build(b'{"config": NaN}'), "NaN is not a number"),
        (build(GOOD_HEADER, b"x"), "1 bytes of tensors follow, but the table adds up to 0"),
        (build(GOOD_HEADER | {"tokenizer_sha256": "A" * 64}), "tokenizer_sha256 must be 64 hexadecimal digits"),
        (build(GOOD_HEADER | {"config": {"num_heads": 0}}), "config: num_heads must be at least 1, got 0"),
        (build(GOOD_HEADER | {"config": {"num_heads": True}}), "config: num_heads must be of type int, got bool"),
        (build(GOOD_HEADER | {"config": {"num_head": 1}}), "unknown field 'num_head'; did you mean 'num_heads'"),
        (build(GOOD_HEADER | {"config": {"compressor": "lzma"}}), "compressed by brotli, but its config says lzma"),
        (build(GOOD_HEADER | {"tensors": [["a", "int4", [1]]]}), "every row of the table must be"),
        (build(GOOD_HEADER | {"tensors": [["a", "int6", [0, 4]]]}), "codes not empty"),
        (build(GOOD_HEADER | {"tensors": [["a", "int6", [2**20, 2**19]]]}), "the table adds up to"),
        (build(GOOD_HEADER | {"tensors": [["a", "float16", [10**4000, 10**4000]]]}), "every row of the table must be"),
        (build(GOOD_HEADER | {"tensors": [["a", "float16", [0, 2**62]]]}), "every row of the table must be"),
        (build(GOOD_HEADER | {"tensors": [["a", "float16", [1] * 9]]}), "every row of the table must be"),
        (build(GOOD_HEADER | {"tensors": [[str(i), "float16", [0]] for i in range(10_001)]}), "at most 10,000 tensors"),
        (build(GOOD_HEADER | {"extra": {"x": "y" * 2**20}}), "the header may take 1,048,576 bytes, got 1,05"),
        (build(GOOD_HEADER | {"tensors": [["a", "float16", [0]]] * 2}), "two tensors of the table have the same name"),
        (build(GOOD_HEADER | {"tensors": [["a", "float16", [1]]]}, b"\0\x7c"), "a: values must be finite"),
        (
            build(GOOD_HEADER | {"tensors": [["a", "int6", [1, 1]]]}, b"\0\0\x20\0\x3c"),
            "a: int6 codes must lie within 31",
        ),
        (
            build(GOOD_HEADER | {"tensors": [["a", "int6", [1, 1]]]}, b"\0\0\x1f\0\0"),
            "a: every scale must be .* above 0",
        ),
    ],
)
def test_reader_says_what_is_wrong(data, message, tmp_path):
    path = tmp_path / "model.pgolf"
    path.write_bytes(data)
    for read in (pack.load_artifact, inspect):
        with pytest.raises(InputError, match=f"model.pgolf: .*{message}"):
            read(path)


def test_sizes_that_do_not_fit_are_refused():
    data = container.encode(small_content())
    for offset, format_, value, message in (
        (45, "<Q", 2**62, "the content must be at most 268,435,456 bytes"),
        (45, "<Q", 5, "piece 0 is not 5 bytes of brotli .it holds .* or more"),
        (53, "<I", 3, "but their sizes add up to 3"),
    ):
        changed = bytearray(data)
        struct.pack_into(format_, changed, offset, value)
        with pytest.raises(InputError, match=message):
            container.decode(resign(bytes(changed)))
    with pytest.raises(InputError, match="128 pieces are announced, but the file ends before their sizes"):
        container.decode(sign(0, 2**28, b"x"))
    (size,) = struct.unpack_from("<Q", data, 45)
    longer = data[:45] + struct.pack("<Q", size + 1) + data[53:]
    with pytest.raises(InputError, match=f"piece 0 is not {size + 1:,} bytes of brotli .it ends after {size:,}"):
        container.decode(resign(longer))


def test_streams_without_an_end_or_with_more_behind_it_are_refused():
    text = json.dumps(GOOD_HEADER).encode()
    raw = struct.pack("<I", len(text)) + text
    brotli_stream = brotli.Compressor()
    endless = brotli_stream.process(raw) + brotli_stream.flush()
    (whole,) = container.compress(raw, "brotli")
    (whole_lzma,) = container.compress(raw, "lzma")
    for kind, piece in ((0, endless), (0, whole + b"x"), (1, whole_lzma[:-1]), (1, whole_lzma + b"x")):
        with pytest.raises(InputError, match="piece 0 is not"):
            container.decode(sign(kind, len(raw), piece))
    assert container.decode(sign(0, len(raw), whole)).tensors == {}


@pytest.mark.parametrize("compressor", container.COMPRESSORS)
def test_a_small_file_cannot_unfold_into_memory(compressor):
    if compressor == "brotli":  # 64 bytes of it reach 84 MB
        bomb, allowed = brotli.compress(bytes(2**28), quality=5, lgwin=24), 2**27
    else:
        bomb, allowed = lzma.compress(bytes(2**24), lzma.FORMAT_RAW, filters=[container.LZMA_FILTER]), 2**20
    data = sign(container.COMPRESSORS.index(compressor), 1000, bomb)
    assert len(data) < allowed / 100
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="it holds .* or more"):
            container.decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < allowed
