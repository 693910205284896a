"""Tables of tiles: which row a launch gets, a machine's own table, and tables that are damaged."""

import itertools
import json
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")  # the tuner imports the kernels
from benchmarks.tune import borders
from benchmarks.tune_newton_schulz import table_rows
from benchmarks.tuning import add_to_table, close_table, taking
from pgolf_kernels import tiles
from pgolf_kernels.multi_tensor import PassTile
from pgolf_kernels.ops.int6_linear import gpu as int6_gpu
from pgolf_kernels.ops.int6_linear import triton_kernel as int6
from pgolf_kernels.ops.newton_schulz import plan, triton_kernel
from pgolf_kernels.ops.slot import triton_rows
from pgolf_kernels.ops.softcapped_cross_entropy.triton_kernel import RowTile
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
    add_to_table(found, "row kernel 1024", [{"config": RowTile(1024, 2), "ms": 1.0}])
    add_to_table(found, "row kernel 4096", [{"config": RowTile(4096, 4), "failed": "wrong result"}])  # none ran
    add_to_table(found, "slot reduce 4096", [{"config": triton_rows.RowsTile(64, 2), "ms": 1.0}])
    add_to_table(found, "optim adamw 0", [{"config": PassTile(1024, 4), "ms": 1.0}])
    add_to_table(found, "cublas 1536", {"x w_up^T": 1.0})
    close_table(found)
    path = tiles.own_file(HOPPER)
    tiles.write(path, found)
    assert tiles.read(path) == found
    assert tiles.tile(HOPPER, "leaky_relu2_mlp", "up", Pair, hidden=1000) == Pair(64, 4)
    assert tiles.tile(HOPPER, "leaky_relu2_mlp", "up", Pair, hidden=9999) == Pair(128, 8)
    assert found["softcapped_cross_entropy"]["row"] == [{"block": 1024, "num_warps": 2}]
    assert tiles.tile(HOPPER, "slot", "reduce", triton_rows.RowsTile) == (64, 2)
    assert tiles.tile(HOPPER, "optim", "adamw", PassTile) == (1024, 4)


def test_a_candidate_takes_the_place_of_the_tables_tile():
    before = tiles.tile(HOPPER, "optim", "adamw", PassTile)
    with taking("optim", "adamw", PassTile(64, 1)):
        assert tiles.tile(HOPPER, "optim", "adamw", PassTile) == (64, 1)
        assert tiles.tile(HOPPER, "optim", "update", PassTile) != (64, 1)
    assert tiles.tile(HOPPER, "optim", "adamw", PassTile) == before


def test_the_tuner_writes_int6s_tiles_and_borders(own):
    """Rows of narrow and of wide weights apart; what was not measured, depths with tails, keeps the shipped rows."""
    found, narrow, wide = {}, int6.Tile(16, 16, 64, 4, 2, 168), int6.Tile(64, 64, 32, 8, 4, 128)
    for what, config in (
        ("linear 16", narrow),
        ("linear 64", wide),
        ("wide linear 16", wide),
        ("wide linear 64", wide),
    ):
        add_to_table(found, what, [{"config": config, "ms": 1.0}])
    add_to_table(found, "borders 0", [{"config": int6_gpu.Borders(8, 32), "ms": 0.0}])
    close_table(found)
    tiles.write(tiles.own_file(HOPPER), found)
    cpu = torch.device("cpu")
    assert [int6.choose_tile(cpu, *size) for size in ((16, 1536, 512), (65, 1536, 512), (3, 8192, 512))] == [
        narrow, wide, wide,
    ]  # fmt: skip
    assert int6.choose_tile(cpu, 16, 1536, 500) == int6.Tile(16, 16, 32, 4, 3, 168)
    assert int6_gpu.borders(cpu) == (8, 32)
    assert [int6_gpu.order(torch.empty(m, 8))[0] for m in (8, 9, 33)] == ["cuda", "triton", "dequantize"]


def test_the_tuner_writes_newton_schulzs_tiles(own):
    """By the sum over the banks of a size; a candidate that failed in one of them is out."""
    a, b, failed = (triton_kernel.Tile(side, side, 64, 4, 3) for side in (64, 128, 256))
    times = {a: [3.0, 1.0], b: [1.0, 2.0], failed: [0.5]}
    launch = plan.Tiles(128, 64, 128, 64, 8, 2, 128)
    norms = {triton_kernel.NormTile(2, 256, 4): [1.0, 3.0], triton_kernel.NormTile(4, 512, 8): [2.0, 1.0]}
    found = table_rows({("symmetric", 512): times, ("apply", 512): times}, {"all banks": launch}, norms)
    assert found.keys() == {"symmetric", "apply", "megakernel", "normalize"}
    tiles.write(tiles.own_file(HOPPER), {"newton_schulz": found})
    cpu = torch.device("cpu")
    assert triton_kernel.norm_tile(cpu) == (4, 512, 8)
    assert triton_kernel.symmetric_tile(cpu, 22, 512) == triton_kernel.apply_tile(cpu, 22, 512, 512) == b
    assert triton_kernel.symmetric_tile(cpu, 22, 192).block_m == 64  # which tiles of 128 do not divide
    assert plan.choose_tiles(HOPPER, (plan.Bank(22, 512, 1536, ()), plan.Bank(22, 512, 512, ()))) == launch
    assert plan.choose_tiles(HOPPER, (plan.Bank(1, 512, 512, ()),)).symmetric == 64


@pytest.mark.parametrize(
    ("fastest", "expected"),
    [("cctd", (4, 8)), ("ctct", (1, 64)), ("dddd", (0, 0)), ("cccc", (64, 64)), ("ttdt", (0, 4)), ("ccdd", (4, 4))],
)
def test_borders_are_where_a_way_stops_winning(fastest, expected):
    ways = {"c": "cuda", "t": "triton", "d": "dequantize"}
    times = {
        rows: {ways[key]: 1.0 if key == best else 2.0 for key in ways}
        for rows, best in zip((1, 4, 8, 64), fastest, strict=True)
    }
    assert borders(times) == expected


@pytest.mark.parametrize("name", tiles.shipped())
def test_shipped_tiles_of_unmasked_products_divide_every_side(name):
    """Sides are multiples of 64; a row of larger tiles without its min_divisor would leave rows out."""
    table = tiles.shipped()[name]
    on = Gpu("some GPU", tuple(table["capabilities"][0]), 100, table["shared_bytes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "gpu", lambda device: on)
        for side, other, matrices in itertools.product(range(64, 1600, 64), (64, 512, 1536), (1, 22, 200)):
            tile = triton_kernel.symmetric_tile(None, matrices, side)
            assert side % tile.block_m == 0
            tile = triton_kernel.apply_tile(None, matrices, min(side, other), max(side, other))
            assert min(side, other) % tile.block_m == 0 and max(side, other) % tile.block_n == 0
    large = plan.choose_tiles(on, (plan.Bank(22, 512, 512, ()), plan.Bank(11, 512, 1536, ())))
    assert large.symmetric == 128
    for banks in ([(3, 512, 512), (2, 1536, 512)], [(22, 512, 512), (11, 1536, 500), (1, 64, 64)]):
        assert plan.choose_tiles(on, tuple(plan.Bank(*bank, ()) for bank in banks)).symmetric == 64


def test_a_tile_that_leaves_rows_out_is_refused(own):
    row = triton_kernel.Tile(128, 128, 64, 8, 3)._asdict()
    own({"newton_schulz": {"symmetric": [row], "apply": [row]}})
    x = torch.zeros(1, 192, 192, dtype=torch.float16)
    for call in (
        lambda: triton_kernel.symmetric(x, x, 1, 1.0),
        lambda: triton_kernel.apply(x, x, 1, 1.0, torch.empty_like(x)),
    ):
        with pytest.raises(ValueError, match="a tile of 128 does not divide 192"):
            call()


def test_tables_are_written_as_they_are_shipped(tmp_path):
    for name, table in tiles.shipped().items():
        tiles.write(tmp_path / name, table)
        assert (tmp_path / name).read_text() == (tiles.Path(tiles.__file__).parent / f"{name}.json").read_text()


def test_a_cpu_stands_for_hopper():
    assert tiles.gpu(torch.device("cpu")) is HOPPER
