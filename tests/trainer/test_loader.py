"""Batches are those of the published systems, shared without overlap by any number of ranks, and resume exactly.

Golden data: windows drawn by the published coprime loader on eight ranks. "few" has shards of one block, two blocks and
one too short for a window, and passes that end within a batch; "many" has more shards than the widest mix, at the
start, in the middle and at the end of the widening.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.data.loader import make_loader
from pgolf.data.loader_coprime import CoprimeLoader, coprime_seed, seed_path
from pgolf.data.loader_sequential import SequentialLoader
from pgolf.data.loader_shuffled import ShuffledLoader
from pgolf.data.shards import shard_name, write_shard
from pgolf.errors import InputError

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "loader.npz")
KINDS = ["sequential", "coprime", "shuffled"]


def write_random(directory: Path, sizes: list[int]) -> tuple[list[Path], list[np.ndarray]]:
    """Shards of random tokens, in a folder named as the challenge names its own."""
    directory = directory / "fineweb10B_sp1024"
    directory.mkdir()
    rng = np.random.default_rng()
    arrays = [rng.integers(0, 1024, size).astype(np.uint16) for size in sizes]
    paths = [directory / shard_name("train", i) for i in range(len(sizes))]
    for path, tokens in zip(paths, arrays, strict=True):
        write_shard(path, tokens)
    return paths, arrays


@pytest.mark.parametrize("vocab_size, seed", [(1024, 17327015384875681392), (4096, 4565206011618265856)])
def test_seeds_of_the_published_runs(vocab_size, seed):
    names = [Path("/anywhere") / f"fineweb10B_sp{vocab_size}" / shard_name("train", i) for i in range(80)]
    assert coprime_seed([seed_path(name) for name in names]) == seed
    assert coprime_seed(["a"]) == 106652627936467


@pytest.mark.parametrize("case", ["few", "many"])
def test_windows_of_the_published_loader(tmp_path, case):
    windows, seq_len = GOLDEN[f"{case}_windows"], int(GOLDEN[f"{case}_seq_len"])
    paths, arrays = write_random(tmp_path, GOLDEN[f"{case}_shard_tokens"].tolist())
    one = CoprimeLoader(paths, seq_len, windows.shape[1] * seq_len)
    ranks = [CoprimeLoader(paths, seq_len, windows.shape[1] * seq_len, rank, 8) for rank in range(8)]
    for expected, batches in zip(windows, GOLDEN[f"{case}_batches_before"].tolist(), strict=True):
        for loader in (one, *ranks):
            loader.batches = batches if batches >= 0 else loader.batches
        np.testing.assert_array_equal(one.next_windows(), expected)
        for rank, loader in enumerate(ranks):
            x, y = loader.next_batch()
            rows = np.stack([arrays[shard][start : start + seq_len + 1] for shard, start in expected[rank::8]])
            np.testing.assert_array_equal(x, rows[:, :-1])
            np.testing.assert_array_equal(y, rows[:, 1:])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_sequential_stream_of_the_published_loader(tmp_path, ranks):
    """Micro-step m of rank r reads slice m * ranks + r of n + 1 tokens, wrapping over the shards, as published."""
    paths, arrays = write_random(tmp_path, [100, 7, 250])
    seq_len, windows = 5, 16
    span = windows // 8 * seq_len + 1
    stream = np.tile(np.concatenate(arrays), 20)
    loaders = [SequentialLoader(paths, seq_len, windows * seq_len, rank, ranks) for rank in range(ranks)]
    for step in range(30):
        for rank, loader in enumerate(loaders):
            starts = [(step * 8 + micro * ranks + rank) * span for micro in range(8 // ranks)]
            slices = [stream[start : start + span].astype(np.int64) for start in starts]
            x, y = loader.next_batch()
            np.testing.assert_array_equal(x, np.concatenate([s[:-1].reshape(-1, seq_len) for s in slices]))
            np.testing.assert_array_equal(y, np.concatenate([s[1:].reshape(-1, seq_len) for s in slices]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 8])  # 3 does not divide the reference's eight
def test_ranks_share_the_one_rank_batch(tmp_path, kind, ranks):
    # Tokens that name their position: equal rows would be equal windows.
    directory = tmp_path / "data"
    directory.mkdir()
    write_shard(directory / shard_name("train", 0), np.arange(60000))
    write_shard(directory / shard_name("train", 1), np.arange(60000, 65000))
    paths = sorted(directory.iterdir())
    one = make_loader(kind, paths, 10, 240)
    if kind == "sequential" and ranks == 3:
        one = SequentialLoader(paths, 10, 240, slices=3)
    many = [make_loader(kind, paths, 10, 240, rank, ranks) for rank in range(ranks)]
    for _ in range(5):
        x, y = one.next_batch()
        parts = [loader.next_batch() for loader in many]
        rows = torch.cat([x for x, _ in parts])
        assert rows.shape == x.shape
        assert x.dtype == y.dtype == torch.int64
        assert set(map(tuple, rows.tolist())) == set(map(tuple, x.tolist()))
        assert len(set(rows.flatten().tolist())) == rows.numel()  # nothing is read twice within a batch
        assert torch.equal(x + 1, y)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_on_any_number_of_ranks(tmp_path, kind):
    paths, _ = write_random(tmp_path, [300, 40, 500])
    reference = make_loader(kind, paths, 16, 256)
    for _ in range(7):
        reference.next_batch()
    state = json.loads(json.dumps(reference.state_dict()))
    resumed = make_loader(kind, paths, 16, 256)
    resumed.load_state_dict(state)
    halves = [make_loader(kind, paths, 16, 256, rank, 2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    for _ in range(20):
        x, y = reference.next_batch()
        again = resumed.next_batch()
        assert torch.equal(x, again[0])
        assert torch.equal(y, again[1])
        rows = torch.cat([half.next_batch()[0] for half in halves])
        assert sorted(rows.tolist()) == sorted(x.tolist())


def published_shuffle(sizes: list[int], rank: int, ranks: int, seq_len: int, count: int):
    """#1394's loader on one of its ranks, written anew: (shard, first token) of `count` windows a batch, for ever."""
    mine = range(rank, len(sizes), ranks)
    rng = np.random.Generator(np.random.PCG64(rank))

    def shuffled(n: int) -> list[int]:
        top = min(seq_len - 1, max(0, n - seq_len - 1))
        phase = int(rng.integers(top + 1)) if top else 0
        return [phase + int(k) * seq_len for k in rng.permutation((n - 1 - phase) // seq_len)]

    waiting = {shard: shuffled(sizes[shard]) for shard in mine}
    while True:
        batch = []
        for _ in range(count):
            if not any(waiting.values()):
                waiting = {shard: shuffled(sizes[shard]) for shard in mine}
            left = np.array([len(windows) for windows in waiting.values()], dtype=np.float64)
            shard = mine[int(rng.choice(len(mine), p=left / left.sum()))]
            batch.append((shard, waiting[shard].pop()))
        yield batch


def test_shuffled_windows_of_the_published_loader(tmp_path):
    """On eight ranks, over several passes; the eleventh shard is one window long and the twelfth too short for any."""
    sizes = [200, 333, 128, 97, 410, 64, 150, 222, 90, 301, 17, 16]
    paths, arrays = write_random(tmp_path, sizes)
    ranks = [ShuffledLoader(paths, 16, 16 * 24, rank, 8) for rank in range(8)]
    published = [published_shuffle(sizes, rank, 8, 16, 3) for rank in range(8)]
    for _ in range(30):
        for loader, batches in zip(ranks, published, strict=True):
            x, y = loader.next_batch()
            rows = np.stack([arrays[shard][start : start + 17] for shard, start in next(batches)])
            np.testing.assert_array_equal(x, rows[:, :-1])
            np.testing.assert_array_equal(y, rows[:, 1:])


def test_shuffled_passes_read_every_window_once_and_shards_in_proportion(tmp_path):
    """One slice: seven windows a batch has no common divisor with eight ranks."""
    paths, _ = write_random(tmp_path, [16 * 300 + 16, 16 * 100 + 16])
    loader = ShuffledLoader(paths, 16, 16 * 7)
    assert len(loader.slices) == 1
    total = sum(loader.slices[0].left)
    windows = [window for _ in range(total // 7) for window in loader.next_windows()]
    assert len(set(windows)) == len(windows)
    first = [shard for shard, _ in windows[:140]]
    assert 0.6 < first.count(0) / len(first) < 0.9  # three quarters of the windows are the first shard's


@pytest.mark.parametrize(("sizes", "slices"), [([100] * 8, 8), ([100] * 7, 4), ([100, 100, 10], 2), ([100], 1)])
def test_every_shuffled_slice_owns_a_shard(tmp_path, sizes, slices):
    paths, _ = write_random(tmp_path, sizes)
    loader = ShuffledLoader(paths, 16, 16 * 8, rank=1, world_size=2)
    assert len(loader.slices) == slices
    assert loader.next_batch()[0].shape == (4, 16)


def test_moving_the_data_does_not_change_the_batches(tmp_path):
    paths, _ = write_random(tmp_path, [300, 400])
    first = CoprimeLoader(paths, 16, 256).next_windows()
    moved = (tmp_path / "elsewhere").resolve()
    moved.mkdir()
    paths[0].parent.rename(moved / paths[0].parent.name)
    paths = sorted((moved / paths[0].parent.name).iterdir())
    assert CoprimeLoader(paths, 16, 256).next_windows() == first
    assert CoprimeLoader(paths, 16, 256, seed_paths=["b", "c"]).next_windows() != first


@pytest.mark.parametrize("tokens", [17, 18, 33, 34, 50])  # one window; one and a phase; one or two; two; about three
def test_a_single_small_shard_is_enough(tmp_path, tokens):
    paths, (array,) = write_random(tmp_path, [tokens])
    loader = CoprimeLoader(paths, 16, 128)
    for _ in range(20):
        for shard, start in loader.next_windows():
            assert shard == 0
            assert 0 <= start <= tokens - 17
    x, y = loader.next_batch()
    assert x.shape == (8, 16)
    assert set(y.flatten().tolist()) <= set(array.tolist())


def test_every_block_is_read_once_per_pass(tmp_path):
    paths, _ = write_random(tmp_path, [16 * 30 + 16])
    loader = CoprimeLoader(paths, 16, 16)
    loader.next_batch()
    blocks = loader.cursors[0].blocks
    starts = [loader.next_windows()[0][1] for _ in range(blocks - 1)]
    assert len(set(starts)) == blocks - 1


@pytest.mark.parametrize("kind", KINDS)
def test_errors_say_what_and_why(tmp_path, kind):
    paths, _ = write_random(tmp_path, [100, 200])
    with pytest.raises(InputError, match="seq_len \\+ 1 = 257 tokens, got at most 200; use more text or a smaller"):
        make_loader(kind, paths, 256, 512)
    with pytest.raises(InputError, match="must be a positive multiple of seq_len 16"):
        make_loader(kind, paths, 16, 100)
    with pytest.raises(InputError, match="10 windows must divide evenly over the ranks, got rank=0 of 4"):
        make_loader(kind, paths, 16, 160, 0, 4)
    with pytest.raises(InputError, match="at least one training shard"):
        make_loader(kind, [], 16, 160)
    state = make_loader(kind, paths, 16, 160).state_dict()
    with pytest.raises(InputError, match="seq_len must be as saved, 16, got 8"):
        make_loader(kind, paths, 8, 80).load_state_dict(state)
    with pytest.raises(InputError, match="shard_tokens must be as saved"):
        make_loader(kind, paths[:1], 16, 160).load_state_dict(state)
    other = make_loader(KINDS[KINDS.index(kind) - 1], paths, 16, 160)
    with pytest.raises(InputError, match="kind must be as saved"):
        other.load_state_dict(state)
    with pytest.raises(InputError, match="kind must be one of"):
        make_loader("random", paths, 16, 160)


def test_sequential_slices_bound_the_ranks_of_a_resumed_run(tmp_path):
    paths, _ = write_random(tmp_path, [1000])
    state = SequentialLoader(paths, 16, 16 * 24).state_dict()
    with pytest.raises(InputError, match="cannot resume on 3 ranks, the saved batches are cut into 8 slices"):
        SequentialLoader(paths, 16, 16 * 24, 0, 3).load_state_dict(state)
    with pytest.raises(InputError, match="slices must be a multiple of 1 ranks and divide 24 windows, got 5"):
        SequentialLoader(paths, 16, 16 * 24, slices=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned_batches(tmp_path):
    paths, _ = write_random(tmp_path, [1000])
    x, y = make_loader("coprime", paths, 16, 160, pin_memory=True).next_batch()
    assert x.is_pinned()
    assert y.is_pinned()
