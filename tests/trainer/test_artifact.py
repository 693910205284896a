"""The artifact: the originals' codes, exact round trips, the same bytes twice, and a reader that survives any file.

The tensors of `small_tensors` are the least of each role: a scalar and an empty tensor, one row, one column, three
dimensions; `weights` has real roles, because those depend on size (matrices above 65,536 values).
"""

import dataclasses
import functools
import hashlib
import json
import lzma
import math
import os
import struct
import tracemalloc
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pgolf.artifact import container, pack, planes
from pgolf.artifact.header import Header, TensorEntry
from pgolf.artifact.inspect import inspect, table
from pgolf.artifact.quantise import CodedTensor, int6_clip, quantise_int8, quantise_state, tensor_role
from pgolf.config import Config
from pgolf.errors import InputError
from pgolf.model import GPT

GOLDEN = np.load(Path(__file__).parent.parent / "golden/int6.npz")
GOLDEN_STATE = np.load(Path(__file__).parent.parent / "golden/int6_state.npz")
TOKENIZER = hashlib.sha256(b"a tokenizer").hexdigest()
FUZZ = settings(max_examples=200, deadline=None)


def coded(role: str, *shape: int) -> CodedTensor:
    if role == "float16":
        return CodedTensor(role, shape, torch.randn(shape).half())
    largest = {"int6": 31, "int8": 127}[role]
    rows, columns = shape[0], math.prod(shape[1:])
    codes = (torch.randn(rows, columns) * torch.rand(rows, 1) * torch.rand(columns) * largest).round()
    codes = codes.clamp(-largest, largest).to(torch.int8)
    return CodedTensor(role, shape, codes, torch.rand(rows).add(0.01).half())


def small_tensors() -> dict[str, CodedTensor]:
    return {
        "blocks.0.attn.c_q.weight": coded("int6", 5, 7),
        "bigram.scale": coded("float16"),
        "tok_emb.weight": coded("int8", 6, 4),
        "blocks.0.mlp.fc.weight": coded("int6", 1, 9),
        "nothing": coded("float16", 0, 3),
        "blocks.0.mlp.proj.weight": coded("int6", 8, 1),
        "skip_weights": coded("float16", 2, 3),
        "experts": coded("int8", 2, 3, 5),
    }


def small_content(**config: object) -> container.Content:
    return pack.make_content(Config().replace(**config), small_tensors(), TOKENIZER, {"note": ["any", {"json": 1.5}]})


@functools.cache
def seeded_content() -> container.Content:
    """The same in every process, so that hypothesis can replay a failure."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return small_content()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "tok_emb.weight": (300, 256),
        "blocks.0.attn.c_q.weight": (264, 256),
        "blocks.0.mlp.fc.weight": (264, 256),
        "blocks.0.attn_scale": (256,),
        "bigram.scale": (),
    }
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_same(a: dict[str, CodedTensor], b: dict[str, CodedTensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        x, y = a[name], b[name]
        assert (x.role, tuple(x.shape)) == (y.role, tuple(y.shape))
        assert x.values.equal(y.values)
        assert (x.scale is None and y.scale is None) or x.scale.equal(y.scale)


# --- which tensor becomes what, and the numbers in it ---


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The export of #1217 at full size."""
    shapes = {"tok_emb.weight": (1024, 512), "bigram.embed.weight": (2816, 112), "bigram.proj.weight": (512, 112)}
    shapes |= {"ve_shared.embed.weight": (1024, 128), "ve_shared.proj.weight": (256, 128), "smear.gate": (512,)}
    shapes |= {"bigram.scale": (), "ve_shared.scale": (), "ve_layer_scales.0": (1,), "ve_layer_scales.1": (1,)}
    shapes |= {"skip_weights": (5, 512), "skip_gates": (5, 512)}
    for i in range(11):
        block = {"attn.c_q.weight": (512, 512), "attn.c_k.weight": (256, 512), "attn.c_v.weight": (256, 512)}
        block |= {"attn.proj.weight": (512, 512), "mlp.fc.weight": (1536, 512), "mlp.proj.weight": (512, 1536)}
        block |= {"attn_scale": (512,), "mlp_scale": (512,), "resid_mix": (2, 512), "attn.q_gain": (8,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def test_roles_add_up_to_the_published_counts():
    values, rows = dict.fromkeys(("int6", "int8", "float16"), 0), dict.fromkeys(("int6", "int8", "float16"), 0)
    for name, shape in published_shapes().items():
        role = tensor_role(name, shape)
        values[role] += math.prod(shape)
        rows[role] += shape[0] if shape else 1
    assert values == {"int6": 25_952_256, "int8": 970_752, "float16": 118_364}
    assert (rows["int6"], rows["int8"]) == (39_424, 4_864)


def test_roles_at_the_boundary():
    assert tensor_role("blocks.0.attn.c_q.weight", (256, 256)) == "float16"
    assert tensor_role("blocks.0.attn.c_q.weight", (257, 256)) == "int6"
    assert tensor_role("bigram.proj.weight", (512, 129)) == "int6"
    assert tensor_role("lm_head.weight", (257, 256)) == "int8"
    assert tensor_role("gates", (100_000,)) == "float16"  # a vector has no rows to scale


@pytest.mark.parametrize("name", [n.removesuffix("_int8_q") for n in GOLDEN.files if n.endswith("_int8_q")])
def test_int8_codes_and_scales_of_the_originals(name):
    codes, scale = quantise_int8(torch.from_numpy(GOLDEN[f"{name}_W"]), floor=1 / 127)
    np.testing.assert_array_equal(codes.numpy(), GOLDEN[f"{name}_int8_q"])
    np.testing.assert_array_equal(scale.numpy(), GOLDEN[f"{name}_int8_scale"])


def test_scales_and_small_tensors_of_the_originals():
    rows = torch.from_numpy(GOLDEN_STATE["w_rows"]).repeat(20, 1)  # 480 x 192, as large as a matrix that is coded
    tensor = quantise_state(Config(), {"blocks.1.mlp.fc.weight": rows})["blocks.1.mlp.fc.weight"]
    assert tensor.role == "int6"
    np.testing.assert_array_equal(tensor.scale[:24].numpy(), GOLDEN_STATE["scale_rows"])
    for name in ("skip_weights", "blocks.0.attn_scale", "bigram.scale"):
        (tensor,) = quantise_state(Config(), {name: torch.from_numpy(GOLDEN_STATE[f"passthrough_{name}"])}).values()
        np.testing.assert_array_equal(tensor.dequantize().numpy(), GOLDEN_STATE[f"restored_{name}"])


def test_floors_follow_the_config(weights):
    def scales(**config):
        state = quantise_state(Config().replace(**config), {n: 0.01 * w for n, w in weights.items()})
        return state["blocks.0.mlp.fc.weight"].scale, state["tok_emb.weight"].scale

    def spread(scale):
        return scale.unique().tolist()

    int6, int8 = scales()
    assert spread(int6) == [torch.tensor(1 / 31).half().item()]
    assert spread(int8) == [torch.tensor(1 / 127).half().item()]
    int6, int8 = scales(int6_floor=1 / 620)
    assert spread(int6) == [torch.tensor(1 / 620).half().item()]
    assert spread(int8) == [torch.tensor(1 / 620 * 31 / 127).half().item()]
    assert scales(int6_floor=0.0)[0].max() < 1 / 620
    row = 0.01 * weights["blocks.0.mlp.fc.weight"]
    torch.testing.assert_close(scales(int6_clip="12.85")[0], (12.85 * row.std(1) / 31).half(), rtol=0, atol=0)


def test_a_row_of_zeros_stays_zero_without_a_floor():
    config = Config().replace(int6_floor=0.0)
    state = {"blocks.0.mlp.fc.weight": torch.zeros(300, 300), "tok_emb.weight": torch.zeros(300, 300)}
    for tensor in quantise_state(config, state).values():
        assert not tensor.dequantize().any()


@pytest.mark.parametrize("text", ["mean", "0", "-3", "nan", "inf", ""])
def test_int6_clip_is_refused(text):
    with pytest.raises(InputError, match="int6_clip must be 'search', 'max' or a positive number"):
        int6_clip(Config().replace(int6_clip=text))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([1.0, math.nan]), "pack: w must be finite, got NaN or infinity"),
        (torch.tensor([1, 2]), "pack: w must be a floating-point tensor, got torch.int64"),
        (torch.tensor([1e5]), "pack: w must fit float16 .at most 65504., got 100000"),
    ],
)
def test_tensors_that_cannot_be_stored_are_named(tensor, message):
    with pytest.raises(InputError, match=message):
        quantise_state(Config(), {"w": tensor})


# --- planes ---


@pytest.mark.parametrize("shapes", [[], [(1, 1)], [(1, 9), (9, 1)], [(40, 70), (3, 5), (128, 64)]], ids=str)
def test_planes_round_trip(shapes):
    matrices = [coded("int8", *shape).values.numpy() for shape in shapes]
    matrices += [np.zeros_like(m) for m in matrices]
    levels = [planes.spread_levels(m) for m in matrices]
    plane = planes.gather_codes(matrices, levels)
    assert sorted(plane) == sorted(b"".join(m.tobytes() for m in matrices))
    for got, expected in zip(planes.scatter_codes(plane, levels), matrices, strict=True):
        np.testing.assert_array_equal(got, expected)


@given(st.data())
@FUZZ
def test_any_levels_are_an_order(data):
    """A file may hold any levels; they must never break the reader, and they say where each code goes."""
    level = st.integers(-128, 127)
    levels = []
    for _ in range(data.draw(st.integers(0, 3))):
        lines = [data.draw(st.lists(level, min_size=1, max_size=6)) for _ in range(2)]
        levels.append(tuple(np.array(line, dtype=np.int8) for line in lines))
    plane = bytes(data.draw(st.binary(min_size=(n := sum(r.size * c.size for r, c in levels)), max_size=n)))
    assert planes.gather_codes(planes.scatter_codes(plane, levels), levels) == plane


def test_shuffle_puts_low_bytes_first():
    values = np.array([1.0, -2.0, 0.1], dtype=np.float16)
    low, high = [b & 255 for b in values.view(np.uint16)], [int(b) >> 8 for b in values.view(np.uint16)]
    assert list(planes.shuffle(values)) == low + high
    np.testing.assert_array_equal(planes.unshuffle(planes.shuffle(values)), values)


def test_buckets_beat_row_order():
    """The reason for planes.py: hidden neurons of different size, on the rows of one matrix, the columns of another."""
    generator = np.random.default_rng(0)
    spread = np.exp(0.7 * generator.standard_normal(256))
    matrix = generator.standard_normal((256, 128)) * spread[:, None]
    matrices = [np.clip(np.rint(5 * m), -31, 31).astype(np.int8) for m in (matrix, np.ascontiguousarray(matrix.T))]
    levels = [planes.spread_levels(m) for m in matrices]
    rows = sum(map(len, container.compress(b"".join(m.tobytes() for m in matrices), "brotli")))
    side = b"".join(part.tobytes() for pair in levels for part in pair)
    buckets = sum(map(len, container.compress(planes.gather_codes(matrices, levels) + side, "brotli")))
    assert buckets < 0.97 * rows


# --- the file ---


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
        (build(GOOD_HEADER | {"config": {"num_heads": 0}}), "config: impossible values"),
        (build(GOOD_HEADER | {"config": {"num_heads": True}}), "config: num_heads must be of type int, got bool"),
        (build(GOOD_HEADER | {"config": {"num_head": 1}}), "unknown field 'num_head'; did you mean 'num_heads'"),
        (build(GOOD_HEADER | {"config": {"compressor": "lzma"}}), "compressed by brotli, but its config says lzma"),
        (build(GOOD_HEADER | {"tensors": [["a", "int4", [1]]]}), "every row of the table must be"),
        (build(GOOD_HEADER | {"tensors": [["a", "int6", [0, 4]]]}), "codes not empty"),
        (build(GOOD_HEADER | {"tensors": [["a", "int6", [2**62, 2**62]]]}), "the table adds up to"),
        (build(GOOD_HEADER | {"tensors": [["a", "float16", [10**4000, 10**4000]]]}), "every row of the table must be"),
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
        (45, "<Q", 2**62, "the content must be at most 1,073,741,824 bytes"),
        (45, "<Q", 2**30, "512 pieces are announced, but the file ends before their sizes"),
        (45, "<Q", 5, "piece 0 is not 5 bytes of brotli .it holds .* or more"),
        (53, "<I", 3, "but their sizes add up to 3"),
    ):
        changed = bytearray(data)
        struct.pack_into(format_, changed, offset, value)
        with pytest.raises(InputError, match=message):
            container.decode(resign(bytes(changed)))
    (size,) = struct.unpack_from("<Q", data, 45)
    longer = data[:45] + struct.pack("<Q", size + 1) + data[53:]
    with pytest.raises(InputError, match=f"piece 0 is not {size + 1:,} bytes of brotli .it ends after {size:,}"):
        container.decode(resign(longer))


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


# --- packing, unpacking, looking inside ---


def test_pack_load_unpack_repack(weights, tmp_path):
    config = Config().replace(preset="tiny", num_layers=1, int6_clip="max")
    path = tmp_path / "runs/one/artifact.pgolf"
    report = pack.pack_state(config, weights, TOKENIZER, path, extra={"step": 7})
    assert report.artifact_bytes == path.stat().st_size
    assert report.parameters == sum(w.numel() for w in weights.values())
    assert report.total_bytes == report.artifact_bytes + pack.code_bytes()
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads(json.dumps(report.as_dict()))["headroom_bytes"] == 16_000_000 - report.total_bytes

    artifact = pack.load_artifact(path)
    assert artifact.config == config
    assert artifact.header["tokenizer_sha256"] == TOKENIZER
    assert artifact.header["extra"] == {"step": 7}
    expected = quantise_state(config, weights)
    assert {name: t.role for name, t in expected.items()} == {
        "tok_emb.weight": "int8",
        "blocks.0.attn.c_q.weight": "int6",
        "blocks.0.mlp.fc.weight": "int6",
        "blocks.0.attn_scale": "float16",
        "bigram.scale": "float16",
    }
    for name, value in artifact.state.items():
        assert value.dtype == torch.float32
        assert value.equal(expected[name].dequantize())
        step = 0.0 if expected[name].scale is None else expected[name].scale.max().item() / 2
        assert (value - weights[name]).abs().max() <= step * 1.01 + weights[name].abs().max() / 1000

    pack.unpack(path, tmp_path / "unpacked")
    again = pack.repack(tmp_path / "unpacked", tmp_path / "again.pgolf")
    assert (tmp_path / "again.pgolf").read_bytes() == path.read_bytes()
    assert dataclasses.replace(again, path=report.path) == report


def test_a_model_survives_its_artifact(tmp_path):
    """Names and shapes of the export are the reader's, too; at this size every tensor is float16, except the MLP's."""
    config = Config(num_layers=2, model_dim=192, num_heads=4, num_kv_heads=2, vocab_size=64, bigram_vocab_size=32)
    model, again = GPT(config), GPT(config)
    pack.pack_state(config, model.export_state(), TOKENIZER, tmp_path / "a.pgolf")
    artifact = pack.load_artifact(tmp_path / "a.pgolf")
    again.load_export(artifact.state)
    roles = {name: tensor_role(name, tuple(value.shape)) for name, value in artifact.state.items()}
    assert {name for name, role in roles.items() if role == "int6"} == {
        f"blocks.{i}.mlp.{kind}.weight" for i in range(2) for kind in ("fc", "proj")
    }
    for name, value in again.export_state().items():
        assert value.equal(artifact.state[name])
        torch.testing.assert_close(value, model.export_state()[name], rtol=1e-3, atol=0.5 / 31 + 1e-6)


def test_repack_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "a.pgolf"
    path.write_bytes(container.encode(small_content()))
    for name, change, message in (
        ("header.json", lambda d: d["tensors"].pop(), "must name the same tensors"),
        (
            "codes.safetensors",
            lambda d: d["tensors"][0].__setitem__(2, [7, 5]),
            r"c_q.weight: codes must be int8 \(7, 5\)",
        ),
        ("header.json", lambda d: d.pop("extra"), "the header must be an object"),
        ("codes.safetensors", None, "not a safetensors file"),
    ):
        paths = pack.unpack(path, tmp_path / "x")
        if change is None:
            paths["codes"].write_bytes(b"\xff" * 50)
        else:
            header = json.loads(paths["header"].read_text())
            change(header)
            paths["header"].write_text(json.dumps(header))
        with pytest.raises(InputError, match=message) as caught:
            pack.repack(tmp_path / "x", tmp_path / "b.pgolf")
        assert str(caught.value).startswith(str(tmp_path / "x"))
        assert name in str(caught.value)
    assert not (tmp_path / "b.pgolf").exists()


def test_oversize_is_refused_with_both_numbers(weights, tmp_path, monkeypatch):
    path = tmp_path / "artifact.pgolf"
    path.write_bytes(b"what was there")
    monkeypatch.setattr(pack, "LIMIT_BYTES", 1000)
    with pytest.raises(InputError, match=r"may take 1,000 bytes together, got ([\d,]+) \+ ([\d,]+) = ") as caught:
        pack.pack_state(Config(), weights, TOKENIZER, path)
    assert f"{pack.code_bytes():,}" in str(caught.value)
    assert path.read_bytes() == b"what was there"
    report = pack.pack_state(Config(), weights, TOKENIZER, path, allow_oversize=True)
    assert report.headroom_bytes == 1000 - path.stat().st_size - pack.code_bytes() < 0


def test_a_full_disk_leaves_the_previous_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "artifact.pgolf"
    path.write_bytes(b"what was there")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        pack.pack_tensors(Config(), small_tensors(), TOKENIZER, path)
    assert [p.name for p in tmp_path.iterdir()] == ["artifact.pgolf"]
    assert path.read_bytes() == b"what was there"


def test_header_refuses_what_json_cannot_hold(tmp_path):
    for extra in ({"x": math.nan}, {"x": torch.ones(1)}):
        with pytest.raises(InputError, match="must hold JSON values only"):
            pack.pack_tensors(Config(), {}, TOKENIZER, tmp_path / "a", extra=extra)
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        pack.pack_tensors(Config(), {}, "abc", tmp_path / "a")


@pytest.mark.parametrize("what", ["missing", "directory"])
def test_unreadable_paths(what, tmp_path):
    path = tmp_path if what == "directory" else tmp_path / "missing.pgolf"
    with pytest.raises(InputError, match="cannot be read"):
        pack.load_artifact(path)


@pytest.mark.parametrize("compressor", container.COMPRESSORS)
@pytest.mark.parametrize("piece", [container.PIECE_BYTES, 64], ids=lambda n: f"{n} byte pieces")
def test_inspect_accounts_for_every_byte(compressor, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(container, "PIECE_BYTES", piece)
    path = tmp_path / "a.pgolf"
    report = pack.pack_tensors(Config().replace(compressor=compressor), small_tensors(), TOKENIZER, path)
    found = inspect(path)
    assert json.loads(json.dumps(found)) == found
    assert sum(kind["stored_bytes"] for kind in found["kinds"]) == report.artifact_bytes == path.stat().st_size
    assert all(kind["stored_bytes"] >= 0 for kind in found["kinds"])
    assert {k["kind"]: k["parameters"] for k in found["kinds"] if k["parameters"]} == {
        "int6": 35 + 9 + 8,
        "int8": 24 + 30,
        "float16": 1 + 6,
    }
    for key in ("artifact_bytes", "code_bytes", "headroom_bytes", "parameters", "bits_per_parameter", "sha256"):
        assert found[key] == report.as_dict()[key]
    assert found["tensors"][7] == {"name": "experts", "role": "int8", "dtype": "int8", "shape": [2, 3, 5]}
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(found))
    text = capture.get()
    assert f"{report.artifact_bytes:,}" in text
    assert "left of 16,000,000" in text


def test_table_entries_count_rows_and_columns():
    assert (TensorEntry("a", "int8", (4, 3, 5)).num_rows, TensorEntry("a", "int8", (4, 3, 5)).num_columns) == (4, 15)
    assert TensorEntry("a", "float16", ()).num_values == 1
