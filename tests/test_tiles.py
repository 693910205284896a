"""Tables of tiles: which row a launch gets, a machine's own table, and tables that are damaged."""

import json
from typing import NamedTuple

import pytest
import torch

from benchmarks.tune import add_to_table, close_table
from pgolf_kernels import tiles
from pgolf_kernels.tiles import HOPPER, Gpu


class Pair(NamedTuple):
    block: int
    num_warps: int


@pytest.fixture
def own(tmp_path, monkeypatch):
    """This machine's own table, of HOPPER, as a call that writes it."""
    monkeypatch.setenv("PGOLF_TILES", str(tmp_path))
    for cached in (tiles._tables, tiles.tile):
        cached.cache_clear()
    yield lambda text: tiles.own_file(HOPPER).write_text(text if isinstance(text, str) else json.dumps(text))
    for cached in (tiles._tables, tiles.tile):
        cached.cache_clear()


def test_the_first_row_whose_bounds_hold_is_taken(own):
    small, deep, other = [64, 4], [64, 8], [128, 8]
    rows = [{"max_size": 512}, {"min_depth": 1000, "max_size": 1024}, {}]
    rows = [
        bounds | dict(zip(Pair._fields, pair, strict=True))
        for bounds, pair in zip(rows, (small, deep, other), strict=True)
    ]
    own({"an_op": {"a_kernel": rows}})

    def taken(**facts):
        return list(tiles.tile(HOPPER, "an_op", "a_kernel", Pair, **facts))

    assert taken(size=512, depth=1) == small
    assert taken(size=513, depth=1000) == deep
    assert taken(size=513, depth=999) == taken(size=1025, depth=1000) == other


def test_a_machines_own_table_comes_first_and_the_shipped_one_fills_its_gaps(own):
    shipped = tiles.shipped()["sm_90"]
    tuned = shipped["leaky_relu2_mlp"]["up"][0] | {"num_stages": 7}
    own({"leaky_relu2_mlp": {"up": [tuned]}})
    Tiling = NamedTuple("Tiling", [(key, object) for key in tuned])
    assert tiles.tile(HOPPER, "leaky_relu2_mlp", "up", Tiling, hidden=1536).num_stages == 7
    dp = tiles.tile(HOPPER, "leaky_relu2_mlp", "dp", Tiling, hidden=1536)
    assert dp._asdict() == shipped["leaky_relu2_mlp"]["dp"][0]


@pytest.mark.parametrize(
    ("capability", "shared_bytes", "name"),
    [((8, 0), 166_912, "sm_80"), ((8, 9), 101_376, "sm_86"), ((9, 0), 232_448, "sm_90"), ((10, 3), 232_448, "sm_100")]
    + [
        ((12, 1), 101_376, "sm_120"),
        ((13, 0), 300_000, "sm_90"),
        ((8, 7), 166_912, "sm_80"),
        ((7, 5), 65_536, "sm_86"),
    ],
)
def test_every_gpu_finds_a_table(own, capability, shared_bytes, name):
    ((_, table),) = tiles._tables(Gpu("some GPU", capability, 100, shared_bytes))
    assert table["leaky_relu2_mlp"] == tiles.shipped()[name]["leaky_relu2_mlp"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a table of tiles"),
        ("[1]", "not a table of tiles"),
        ({"an_op": {"a_kernel": [3]}}, "rows must be objects"),
        ({"an_op": {"a_kernel": [{"block": 1}]}}, r"must have the fields \['block', 'num_warps'\]"),
        ({"an_op": {"a_kernel": [{"block": 1, "num_warps": 1, "warps": 2}]}}, "must have the fields"),
        ({"an_op": {"a_kernel": [{"max_depth": 1}]}}, "'max_depth' bounds 'depth', which is none of"),
        (
            {"an_op": {"a_kernel": [{"max_size": 1, "block": 1, "num_warps": 1}]}},
            "no table of tiles has a row of an_op.a",
        ),
    ],
)
def test_a_damaged_table_is_named(own, text, message):
    own(text)
    with pytest.raises(ValueError, match=message):
        tiles.tile(HOPPER, "an_op", "a_kernel", Pair, size=5)


def test_the_tuner_writes_what_the_kernels_read(own):
    found = {}
    add_to_table(found, "up 1536", [{"config": Pair(64, 4), "ms": 1.0}, {"config": Pair(128, 4), "ms": 2.0}])
    add_to_table(found, "up 2048", [{"config": Pair(128, 8), "ms": 1.0}])
    add_to_table(found, "row kernel 1024", [{"config": 2, "ms": 1.0}])
    add_to_table(found, "row kernel 4096", [{"config": 4, "failed": "wrong result"}])  # none of them ran
    add_to_table(found, "cublas 1536", {"x w_up^T": 1.0})
    close_table(found)
    path = tiles.own_file(HOPPER)
    tiles.write(path, found)
    assert tiles.read(path) == found
    assert tiles.tile(HOPPER, "leaky_relu2_mlp", "up", Pair, hidden=1000) == Pair(64, 4)
    assert tiles.tile(HOPPER, "leaky_relu2_mlp", "up", Pair, hidden=9999) == Pair(128, 8)
    assert found["softcapped_cross_entropy"]["row"] == [{"num_warps": 2}]


def test_tables_are_written_as_they_are_shipped(tmp_path):
    for name, table in tiles.shipped().items():
        tiles.write(tmp_path / name, table)
        assert (tmp_path / name).read_text() == (tiles.Path(tiles.__file__).parent / f"{name}.json").read_text()


def test_a_cpu_stands_for_hopper():
    assert tiles.gpu(torch.device("cpu")) is HOPPER
