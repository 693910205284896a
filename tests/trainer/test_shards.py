"""Shards are the challenge's files byte for byte, and a file that is not one is refused with the reason."""

from pathlib import Path

import numpy as np
import pytest

from pgolf.data.shards import (
    HEADER_BYTES,
    check_ids,
    count_tokens,
    find_shards,
    open_shard,
    shard_name,
    write_shard,
    write_shards,
)
from pgolf.errors import InputError

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "tokenizer.npz")


def test_the_challenges_bytes(tmp_path):
    original = GOLDEN["shard_bytes"].tobytes()
    (tmp_path / shard_name("val", 0)).write_bytes(original)
    tokens = open_shard(tmp_path / "fineweb_val_000000.bin")
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens[: len(GOLDEN["val_tokens"])], GOLDEN["val_tokens"])
    write_shard(tmp_path / shard_name("val", 1), tokens)
    assert (tmp_path / "fineweb_val_000001.bin").read_bytes() == original


@pytest.mark.parametrize("count", [0, 1, 1000])  # an empty file cannot be mapped; one token; some
def test_round_trip(tmp_path, count):
    tokens = np.random.default_rng().integers(0, 1 << 16, count).astype(np.uint16)
    write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    assert count_tokens(tmp_path / "fineweb_train_000000.bin") == count
    np.testing.assert_array_equal(open_shard(tmp_path / "fineweb_train_000000.bin"), tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["fineweb_train_000000.bin"]  # no partial file is left


@pytest.mark.parametrize("total, files", [(0, 1), (99, 1), (100, 1), (101, 2), (1000, 10)])  # around the limit of 100
def test_streams_are_cut_at_the_limit(tmp_path, total, files):
    rng = np.random.default_rng()
    tokens = rng.integers(0, 1 << 16, total).astype(np.uint16)
    chunks = np.split(tokens, np.sort(rng.integers(0, total + 1, 7)))  # some of them empty, some beyond the limit
    paths = write_shards(tmp_path, "train", iter(chunks), max_tokens=100)
    assert paths == find_shards(tmp_path, "train")
    assert [p.name for p in paths] == [shard_name("train", i) for i in range(files)]
    assert all(count_tokens(p) == 100 for p in paths[:-1])
    np.testing.assert_array_equal(np.concatenate([open_shard(p) for p in paths]), tokens)


def damaged(tmp_path, change) -> Path:
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.arange(100, dtype=np.uint16))
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data) or data)
    return path


def test_errors_say_what_and_why(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_shard(tmp_path / "fineweb_train_000009.bin")
    with pytest.raises(InputError, match=r"100 tokens must make 1224 bytes, got 1200"):
        open_shard(damaged(tmp_path, lambda data: data[:1200]))
    with pytest.raises(InputError, match=r"100 tokens must make 1224 bytes, got 1230"):
        open_shard(damaged(tmp_path, lambda data: data + bytes(6)))
    with pytest.raises(InputError, match=f"header of {HEADER_BYTES} bytes, got a file of 8 bytes"):
        open_shard(damaged(tmp_path, lambda data: data[:8]))
    with pytest.raises(InputError, match="got a file of 0 bytes"):
        open_shard(damaged(tmp_path, lambda data: data.clear()))
    with pytest.raises(InputError, match="must start with the number 20240520, got 20240521"):
        open_shard(damaged(tmp_path, lambda data: data.__setitem__(0, data[0] + 1)))
    with pytest.raises(InputError, match="format version must be 1, got 2"):
        open_shard(damaged(tmp_path, lambda data: data.__setitem__(4, 2)))
    with pytest.raises(InputError, match=r"must lie in 0\.\.65535, got 0\.\.65536"):
        write_shard(tmp_path / "fineweb_train_000001.bin", np.array([0, 65536]))
    with pytest.raises(InputError, match="below vocab_size 50, got 50 at token 2"):
        check_ids(tmp_path / "x.bin", np.array([1, 49, 50, 51]), 50)
