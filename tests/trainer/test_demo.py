"""The demo in miniature: data -> training -> artifact -> three scores -> report, and what each of them must hold."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from conftest import STDLIB

from pgolf import run
from pgolf.data.dataset import Dataset

SETTINGS = ["vocab_size=512", "max_steps=150", "dtype=float32", "matrix_lr=0.04"]


@pytest.fixture(scope="module")
def demo(dataset_dir, tmp_path_factory):
    from pgolf.demo import run_demo

    return run_demo(tmp_path_factory.mktemp("demo") / "run", dataset_dir, "tiny", SETTINGS, "cpu")


def order_zero_bpb(dataset: Dataset) -> float:
    """Bits per byte of the best memoryless code: byte frequencies of the validation text itself, known in advance."""
    text = b"".join(dataset.tokenizer.decode(d).encode() for d in dataset.documents("val"))
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def test_the_model_learns_and_beats_an_order_zero_model(demo, dataset_dir):
    losses = [e["loss"] for e in run.read_log(Path(demo["run"])) if e["event"] == "step"]
    assert sum(losses[-10:]) / 10 < losses[0] - 2
    baseline = order_zero_bpb(Dataset.open(dataset_dir))
    for method in ("plain", "sliding", "slot"):
        assert demo["scores"][method]["val_bpb"] < baseline - 0.5, method


def test_scores_are_consistent(demo, dataset_dir):
    scores, dataset = demo["scores"], Dataset.open(dataset_dir)
    text_bytes = sum(len(dataset.tokenizer.decode(d).encode()) for d in dataset.documents("val"))
    for method, score in scores.items():
        assert score["tokens"] == len(dataset.val_tokens()) - 1, method
        assert score["bytes"] == text_bytes, method
        assert score["val_bpb"] == pytest.approx(score["val_loss"] * score["tokens"] / math.log(2) / score["bytes"])
        assert score["causal"] is True
    # More context helps, and so does fitting to it; int6 costs little.
    assert scores["sliding"]["val_bpb"] < scores["plain"]["val_bpb"]
    assert scores["slot"]["val_bpb"] < scores["sliding"]["val_bpb"]
    assert scores["plain"]["val_bpb"] < demo["train"]["val_bpb"] + 0.05
    kept = json.loads((Path(demo["run"]) / run.SCORES).read_text())
    assert {method: kept[method] for method in scores} == scores


def test_the_artifact_alone_carries_the_model(demo):
    from pgolf.artifact.inspect import inspect

    artifact = Path(demo["run"]) / run.ARTIFACT
    assert artifact.stat().st_size == demo["artifact_bytes"]
    assert (
        inspect(artifact)["parameters"]
        == json.loads((Path(demo["run"]) / run.LOG).read_text().splitlines()[0])["parameters"]
    )


def test_two_ranks_score_exactly_as_one(demo, dataset_dir, run_pgolf):
    """Batches are cut before they are dealt to ranks, so the sums have the same bits."""
    artifact = Path(demo["run"]) / run.ARTIFACT
    command = [artifact, "--data", dataset_dir, "--method", "slot", "--tokens", 4000, "--json", "--device", "cpu"]
    two_ranks = json.loads(run_pgolf(*command, ranks=2, module="pgolf.evaluate").stdout)
    one_rank = json.loads(run_pgolf("eval", *command).stdout)
    assert two_ranks["world_size"] == 2
    kept = json.loads((Path(demo["run"]) / run.SCORES).read_text())
    assert kept["slot"] == demo["scores"]["slot"], "a partial score took the place of the whole one"
    assert kept["slot, first 4000 tokens"]["tokens"] == 4000
    for key in ("val_loss", "val_bpb", "tokens", "bytes"):
        assert two_ranks[key] == one_rank[key], key


def test_every_file_of_the_run_is_there(demo):
    for name in (run.CONFIG, run.ENVIRONMENT, run.LOG, run.TOKENIZER, run.MODEL, run.ARTIFACT, run.SCORES, run.REPORT):
        assert (Path(demo["run"]) / name).stat().st_size > 0, name


def test_eval_refuses_what_is_not_about_scoring(demo, dataset_dir, capsys):
    from pgolf.cli import main

    command = ["eval", str(Path(demo["run"]) / run.ARTIFACT), "--data", str(dataset_dir), "--set", "num_layers=3"]
    assert main(command) == 2
    assert "is not about scoring" in capsys.readouterr().err


def pgolf(*command: object) -> int:
    from pgolf.cli import main

    return main([str(word) for word in command])


def test_unpack_and_pack_give_the_same_bytes(demo, tmp_path, capsys):
    artifact = Path(demo["run"]) / run.ARTIFACT
    assert pgolf("unpack", artifact, "--out", tmp_path / "open") == 0
    assert pgolf("pack", tmp_path / "open", "--out", tmp_path / "again.pgolf") == 0
    assert (tmp_path / "again.pgolf").read_bytes() == artifact.read_bytes()
    capsys.readouterr()
    assert pgolf("inspect", artifact, "--json") == 0
    description = json.loads(capsys.readouterr().out)
    assert description["artifact_bytes"] == demo["artifact_bytes"]


def test_a_flipped_byte_is_one_line(demo, dataset_dir, tmp_path, capsys):
    damaged = bytearray((Path(demo["run"]) / run.ARTIFACT).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pgolf").write_bytes(damaged)
    for command in (
        ("inspect", tmp_path / "damaged.pgolf"),
        ("eval", tmp_path / "damaged.pgolf", "--data", dataset_dir),
    ):
        assert pgolf(*command) == 2
        error = capsys.readouterr().err
        assert "damaged.pgolf" in error
        assert error.count("\n") <= 2


def test_eval_refuses_other_data_and_unknown_methods(demo, tmp_path, capsys):
    from pgolf.data.corpus import path_documents
    from pgolf.data.prepare import prepare

    prepare(
        path_documents([STDLIB / "logging", STDLIB / "unittest"]), tmp_path / "other", vocab_size=512, val_share=0.2
    )
    artifact = Path(demo["run"]) / run.ARTIFACT
    assert pgolf("eval", artifact, "--data", tmp_path / "other") == 2
    assert "its tokenizer is not the one" in capsys.readouterr().err
    assert pgolf("eval", artifact, "--data", tmp_path / "other", "--method", "slt") == 2
    assert (
        "method must be one of plain, sliding, slot, ttt, slot+ttt, ctw or stages, got 'slt'" in capsys.readouterr().err
    )


def test_presets_as_json(capsys):
    assert pgolf("presets", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} >= {"demo", "tiny"}
    assert all(row["parameters"] > 10_000 for row in rows)


def test_a_second_demo_does_not_overwrite_the_first(demo, dataset_dir, capsys):
    assert pgolf("demo", "--preset", "tiny", "--run", demo["run"], "--data", dataset_dir) == 2
    assert "holds a run already" in capsys.readouterr().err
