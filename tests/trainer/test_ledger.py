"""The ledger of started runs: what training writes, what survives crashes, what makes two runs comparable."""

import fcntl
import json
import threading

import pytest

from pgolf import ledger
from pgolf.data.dataset import Dataset
from pgolf.errors import InputError
from pgolf.presets import preset

TINY = preset("tiny")


def record(run_dir, cfg=TINY, steps=0, error=None, resume=False):
    """One run as train() records it."""
    with ledger.Recorder(run_dir, cfg, enabled=True) as recorder:
        recorder.start("data", lambda: steps, resume)
        if error:
            raise error


def test_training_leaves_a_line_at_its_start_and_one_at_its_end(dataset_dir, tmp_path):
    from pgolf.train import train

    cfg = TINY.replace(max_steps=2, val_tokens=1024, seed=7)
    train(cfg, dataset_dir, tmp_path / "seven", device="cpu")
    (entry,) = ledger.read(tmp_path / ledger.LEDGER)
    assert (entry.run, entry.seed, entry.preset, entry.outcome, entry.steps) == ("seven", 7, "tiny", "finished", 2)
    assert entry.config_sha256 == ledger.config_sha256(cfg)
    assert entry.data_sha256 == Dataset.open(dataset_dir).provenance()["sha256"]


def test_refused_input_is_not_a_started_run(dataset_dir, tmp_path):
    from pgolf.train import train

    with pytest.raises(InputError, match="vocab_size"):
        train(TINY.replace(vocab_size=700), dataset_dir, tmp_path / "run", device="cpu")
    assert not (tmp_path / ledger.LEDGER).exists()


def test_a_failure_says_why_and_how_far_it_came(tmp_path):
    for steps in (0, 5):
        with pytest.raises(RuntimeError):
            record(tmp_path / "run", steps=steps, error=RuntimeError("out of memory"))
    early, late = ledger.read(tmp_path / ledger.LEDGER)
    assert early.outcome == "failed: RuntimeError: out of memory"
    assert early.came_to_nothing
    assert not late.came_to_nothing
    assert "seed 1337 (run, started" in str(late)
    assert "after 5 steps" in str(late)


def test_a_killed_run_has_no_end_and_a_resumed_one_is_the_same_run(tmp_path):
    recorder = ledger.Recorder(tmp_path / "run", TINY, enabled=True)
    recorder.start("data", lambda: 3)  # and SIGKILL
    (killed,) = ledger.read(tmp_path / ledger.LEDGER)
    assert killed.outcome == ""
    assert not killed.came_to_nothing
    record(tmp_path / "run", steps=9, resume=True)
    (resumed,) = ledger.read(tmp_path / ledger.LEDGER)
    assert (resumed.id, resumed.outcome, resumed.steps) == (killed.id, "finished", 9)
    record(tmp_path / "run", steps=9)  # the directory was deleted and the run begun anew: a second run
    assert len(ledger.read(tmp_path / ledger.LEDGER)) == 2


def test_other_ranks_write_nothing(tmp_path):
    with ledger.Recorder(tmp_path / "run", TINY, enabled=False) as recorder:
        recorder.start("data", lambda: 1)
    assert not (tmp_path / ledger.LEDGER).exists()


def test_torn_lines_cost_only_themselves(tmp_path):
    path = tmp_path / ledger.LEDGER
    record(tmp_path / "first")
    with path.open("a") as file:
        file.write('{"event": "start", "id": "x", "ru')  # the machine died here
    record(tmp_path / "second")
    assert [e.run for e in ledger.read(path)] == ["first", "second"]
    for line in ("[]", '"start"', '{"event": "end", "id": "unknown"}', '{"event": "start", "id": 1}', "{}"):
        with path.open("a") as file:
            file.write(line + "\n")
    assert [e.run for e in ledger.read(path)] == ["first", "second"]


def test_concurrent_runs_do_not_tear_each_others_lines(tmp_path):
    threads = [threading.Thread(target=record, args=(tmp_path / f"run{i}",)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / ledger.LEDGER).read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 32
    assert sorted(e.run for e in ledger.read(tmp_path / ledger.LEDGER)) == sorted(f"run{i}" for i in range(16))


def test_a_line_waits_for_the_one_that_is_being_written(tmp_path):
    record(tmp_path / "first")
    with (tmp_path / ledger.LEDGER).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=record, args=(tmp_path / "second",))
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
        assert len(ledger.read(tmp_path / ledger.LEDGER)) == 1
    thread.join()
    assert len(ledger.read(tmp_path / ledger.LEDGER)) == 2


def test_the_hash_sees_what_changes_a_result_and_nothing_else():
    same = TINY.replace(seed=2, preset="renamed", compile="off", micro_batch_tokens=512, log_every=7)
    assert ledger.config_sha256(same) == ledger.config_sha256(TINY)
    assert ledger.differing_fields(TINY, same) == []
    other = TINY.replace(seed=2, matrix_lr=0.06)
    assert ledger.config_sha256(other) != ledger.config_sha256(TINY)
    assert ledger.differing_fields(TINY, other) == [("matrix_lr", 0.05, 0.06)]


def test_a_ledger_that_cannot_be_written_stops_the_run(tmp_path):
    (tmp_path / ledger.LEDGER).mkdir()
    with pytest.raises(InputError, match="could not be written"):
        record(tmp_path / "run")
