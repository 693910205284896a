"""The artifact: what becomes of each tensor, the originals' codes, the order of the planes, packing and looking inside.

`weights` has the least matrices that are coded (above 65,536 values), `small_tensors` smaller ones of every kind.
"""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from artifact_samples import TOKENIZER, assert_same, coded, small_content, small_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pgolf import run
from pgolf.artifact import container, pack, planes, unpack
from pgolf.artifact.header import TensorEntry
from pgolf.artifact.inspect import inspect, table
from pgolf.artifact.quantise import CODE_MAX, Rounding, quantise_at_quantile, quantise_state, tensor_role
from pgolf.config import Config
from pgolf.errors import InputError
from pgolf.model import GPT

GOLDEN = np.load(Path(__file__).parent.parent / "golden/int6.npz")
GOLDEN_STATE = np.load(Path(__file__).parent.parent / "golden/int6_state.npz")
FUZZ = settings(max_examples=200, deadline=None)


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
        role = tensor_role(Config(), name, shape)
        values[role] += math.prod(shape)
        rows[role] += shape[0] if shape else 1
    assert values == {"int6": 25_952_256, "int8": 970_752, "float16": 118_364}
    assert (rows["int6"], rows["int8"]) == (39_424, 4_864)


def test_roles_at_the_boundary():
    assert tensor_role(Config(), "blocks.0.attn.c_q.weight", (256, 256)) == "float16"
    assert tensor_role(Config(), "blocks.0.attn.c_q.weight", (257, 256)) == "int6"
    assert tensor_role(Config(), "bigram.proj.weight", (512, 129)) == "int6"
    assert tensor_role(Config(), "lm_head.weight", (257, 256)) == "int8"
    assert tensor_role(Config(), "gates", (100_000,)) == "float16"  # a vector has no rows to scale


@pytest.mark.parametrize("name", [n.removesuffix("_int8_q") for n in GOLDEN.files if n.endswith("_int8_q")])
def test_int8_codes_and_scales_of_the_originals(name):
    codes, scale = quantise_at_quantile(torch.from_numpy(GOLDEN[f"{name}_W"]), 1 / 127, 127)
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


@pytest.mark.parametrize("name", ["int6_clip", "mlp_clip", "embed_clip"])
@pytest.mark.parametrize("text", ["mean", "0", "-3", "nan", "inf", ""])
def test_clips_are_refused_by_the_config(name, text):
    if (name, text) == ("mlp_clip", ""):  # as int6_clip
        assert Rounding.of(Config(int6_clip="3", mlp_clip=""), "mlp").clip == 3.0
        return
    expected = f"config: {name} must be one of search, max, quantile or a positive number of standard deviations, got"
    with pytest.raises(InputError, match=expected):
        Config().replace(**{name: text})


@pytest.mark.parametrize("bits", [4, 9])
@pytest.mark.parametrize("kind", ["attn", "mlp", "embed"])
def test_bits_are_refused_by_the_config(kind, bits):
    with pytest.raises(InputError, match=rf"config: {kind}_bits must lie in 5..8, got {bits}"):
        Config().replace(**{f"{kind}_bits": bits})


def test_each_kind_has_bits_and_a_clip_of_its_own(weights, tmp_path):
    """And the artifact keeps them: codes of all widths survive the file, and inspect counts each under its own name."""
    config = Config(attn_bits=5, mlp_bits=7, embed_bits=6, int6_clip="max", mlp_clip="2.5", embed_clip="search")
    coded = quantise_state(config, weights)
    roles = {"tok_emb.weight": "int6", "blocks.0.attn.c_q.weight": "int5", "blocks.0.mlp.fc.weight": "int7"}
    for name, role in roles.items():
        t, w, largest = coded[name], weights[name], CODE_MAX[role]
        assert (t.role, t.values.abs().max().item()) == (role, largest)
        if role == "int5":
            assert t.scale.equal((w.abs().amax(1) / 15).clamp_min(1 / 15).half())
        if role == "int7":
            assert t.scale.equal((2.5 * w.std(1) / 63).half())
        assert ((t.dequantize() - w.clamp(-largest * t.scale[:, None], largest * t.scale[:, None])).abs()
                <= 0.5001 * t.scale[:, None].float()).all()  # fmt: skip
    path = tmp_path / "a.pgolf"
    pack.pack_state(config, weights, TOKENIZER, path)
    assert_same(pack.read_content(path).tensors, coded)
    found = inspect(path)
    assert {k["kind"]: k["parameters"] for k in found["kinds"] if k["parameters"]} == {
        "int5": 264 * 256,
        "int6": 300 * 256,
        "int7": 264 * 256,
        "float16": 257,
    }
    assert "int8" not in {k["kind"] for k in found["kinds"]}
    assert sum(kind["stored_bytes"] for kind in found["kinds"]) == path.stat().st_size
    unpack.unpack(path, tmp_path / "open")
    unpack.repack(tmp_path / "open", tmp_path / "again.pgolf")
    assert (tmp_path / "again.pgolf").read_bytes() == path.read_bytes()


def test_report_of_packing(weights, tmp_path):
    stages = []
    config = Config(int6_clip="max")
    path = tmp_path / "a.pgolf"
    report = pack.pack_state(config, weights, TOKENIZER, path, on_progress=lambda *done: stages.append(done))
    assert set(report.seconds) == {"quantising", "compressing", "accounting"} == {name for name, _, _ in stages}
    assert ("quantising", 5, 5) in stages
    assert sum(report.bytes_by_kind.values()) == report.artifact_bytes
    assert report.bytes_by_kind.keys() == {"header", "attn", "mlp", "embed", "float16"}
    # As many values, one distribution: int6 takes as much for attention as for the MLP, int8 for embeddings more.
    assert report.bytes_by_kind["attn"] == pytest.approx(report.bytes_by_kind["mlp"], rel=0.02)
    assert report.bytes_by_kind["embed"] > 1.2 * report.bytes_by_kind["mlp"]
    w, coded = weights["blocks.0.mlp.fc.weight"], quantise_state(config, weights)["blocks.0.mlp.fc.weight"]
    assert report.errors["mlp"] == pytest.approx(((w - coded.dequantize()).norm() / w.norm()).item(), rel=1e-5)
    assert report.errors.keys() == {"attn", "mlp", "embed", "float16"}
    assert report.errors["float16"] < 5e-4 < report.errors["embed"] < report.errors["attn"]
    assert json.loads(json.dumps(report.as_dict()))["errors"] == report.errors


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
    with np.errstate(all="raise"):
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


def test_order_of_a_plane():
    """Files outlive the program: the order is part of the format."""
    a, b = (np.arange(n, dtype=np.int8).reshape(-1, 8) for n in (96, 16))
    flat = (np.zeros(12, dtype=np.int8), np.zeros(8, dtype=np.int8))
    assert planes.gather_codes([a], [flat]) == a.tobytes()
    odd_rows_first = (np.array([1, -1] * 6, dtype=np.int8), np.zeros(8, dtype=np.int8))
    last_column_last = (np.zeros(2, dtype=np.int8), np.array([-1] * 7 + [1], dtype=np.int8))
    expected = a[1::2].tobytes() + b[:, :7].tobytes() + a[::2].tobytes() + b[:, 7].tobytes()
    assert planes.gather_codes([a, b], [odd_rows_first, last_column_last]) == expected


def test_levels_are_half_steps_of_log2_mean_square():
    rows, columns = planes.spread_levels(np.array([[4, -4], [1, 1]], dtype=np.int8))
    assert rows.tolist() == [8, 0]  # 2 log2(16 + 1/12), 2 log2(1 + 1/12)
    assert columns.tolist() == [0, 0]
    rows, columns = planes.spread_levels(np.array([[0, 8], [0, 8]], dtype=np.int8))
    assert rows.tolist() == [10, 10]  # 2 log2(32 + 1/12)
    assert columns.tolist() == [-17, 2]  # 2 log2(1/12 / 32.08), 2 log2(64.08 / 32.08)


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


# --- packing, unpacking, looking inside ---


def test_pack_load_unpack_repack(weights, tmp_path):
    config = Config().replace(preset="tiny", num_layers=1, int6_clip="max")
    path = tmp_path / "runs/one/artifact.pgolf"
    report = pack.pack_state(config, weights, TOKENIZER, path, extra={"step": 7})
    assert report.artifact_bytes == path.stat().st_size
    assert report.parameters == sum(w.numel() for w in weights.values())
    assert report.total_bytes == report.artifact_bytes + pack.code_bytes(config, {"step": 7})
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

    unpack.unpack(path, tmp_path / "unpacked")
    again = unpack.repack(tmp_path / "unpacked", tmp_path / "again.pgolf")
    assert (tmp_path / "again.pgolf").read_bytes() == path.read_bytes()
    assert dataclasses.replace(again, path=report.path) == report


def test_pack_run(weights, tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        pack.pack_run(tmp_path, tmp_path / "a.pgolf")
    config = Config(preset="tiny", int6_clip="max")
    (tmp_path / run.CONFIG).write_text(config.to_json())
    with pytest.raises(InputError, match=f"holds no {run.MODEL}"):
        pack.pack_run(tmp_path, tmp_path / "a.pgolf")
    (tmp_path / run.MODEL).write_bytes(b"\xff" * 50)
    with pytest.raises(InputError, match="tokenizer.model: cannot be read"):
        pack.pack_run(tmp_path, tmp_path / "a.pgolf")
    (tmp_path / run.TOKENIZER).write_bytes(b"a tokenizer")
    with pytest.raises(InputError, match=f"{run.MODEL}: not a safetensors file"):
        pack.pack_run(tmp_path, tmp_path / "a.pgolf")
    safetensors.torch.save_file(weights, tmp_path / run.MODEL)
    report = pack.pack_run(tmp_path, tmp_path / "a.pgolf")
    artifact = pack.load_artifact(tmp_path / "a.pgolf")
    assert {name: value.shape for name, value in artifact.state.items()} == {n: w.shape for n, w in weights.items()}
    assert artifact.header["tokenizer_sha256"] == TOKENIZER
    assert pack.pack_run(tmp_path, tmp_path / "b.pgolf").sha256 == report.sha256


def test_a_model_survives_its_artifact(tmp_path):
    """Names and shapes of the export are the reader's, too; at this size every tensor is float16, except the MLP's."""
    config = Config(num_layers=2, model_dim=192, num_heads=4, num_kv_heads=2, vocab_size=64, bigram_vocab_size=32)
    model, again = GPT(config), GPT(config)
    pack.pack_state(config, model.export_state(), TOKENIZER, tmp_path / "a.pgolf")
    artifact = pack.load_artifact(tmp_path / "a.pgolf")
    again.load_export(artifact.state)
    roles = {name: tensor_role(config, name, tuple(value.shape)) for name, value in artifact.state.items()}
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
        paths = unpack.unpack(path, tmp_path / "x")
        if change is None:
            paths["codes"].write_bytes(b"\xff" * 50)
        else:
            header = json.loads(paths["header"].read_text())
            change(header)
            paths["header"].write_text(json.dumps(header))
        with pytest.raises(InputError, match=message) as caught:
            unpack.repack(tmp_path / "x", tmp_path / "b.pgolf")
        assert str(caught.value).startswith(str(tmp_path / "x"))
        assert name in str(caught.value)
    assert not (tmp_path / "b.pgolf").exists()


def test_oversize_is_refused_with_both_numbers(weights, tmp_path, monkeypatch):
    path = tmp_path / "artifact.pgolf"
    path.write_bytes(b"what was there")
    monkeypatch.setattr(pack, "LIMIT_BYTES", 1000)
    with pytest.raises(InputError, match=r"may take 1,000 bytes together, got ([\d,]+) \+ ([\d,]+) = ") as caught:
        pack.pack_state(Config(), weights, TOKENIZER, path)
    assert f"{pack.code_bytes(Config()):,}" in str(caught.value)
    assert path.read_bytes() == b"what was there"
    report = pack.pack_state(Config(), weights, TOKENIZER, path, allow_oversize=True)
    assert report.headroom_bytes == 1000 - path.stat().st_size - pack.code_bytes(Config()) < 0


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


def test_header_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(InputError, match="the header may take 1,048,576 bytes, got .*; shorten extra"):
        pack.pack_tensors(Config(), {}, TOKENIZER, tmp_path / "a", extra={"x": "y" * 2**20})
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
