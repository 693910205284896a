"""The demo in miniature: data -> training -> artifact -> three scores -> report, and what each of them must hold."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

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
    assert json.loads((Path(demo["run"]) / run.SCORES).read_text()) == scores


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
    process = run_pgolf(
        Path(demo["run"]) / run.ARTIFACT,
        "--data",
        dataset_dir,
        "--method",
        "slot",
        "--tokens",
        4000,
        "--json",
        "--device",
        "cpu",
        ranks=2,
        module="pgolf.evaluate",
    )
    one = run_pgolf(
        "eval",
        Path(demo["run"]) / run.ARTIFACT,
        "--data",
        dataset_dir,
        "--method",
        "slot",
        "--tokens",
        4000,
        "--json",
        "--device",
        "cpu",
    )
    two_ranks, one_rank = json.loads(process.stdout), json.loads(one.stdout)
    assert two_ranks["world_size"] == 2
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
