"""Plans: published figures as they are, scaling by hand, and a plan measured on this machine."""

import json

import pytest
import torch

from pgolf.cli import main
from pgolf.distributed import Ranks
from pgolf.errors import InputError
from pgolf.model import GPT
from pgolf.presets import FACTS, PRESETS
from pgolf.publish import plan as planning
from pgolf.publish.plan import (
    forward_flops,
    plan,
    predicted_step_ms,
    sliding_seconds,
    step_flops,
    ttt_training_seconds,
)
from pgolf.scoring.ttt import ScoreFirst

PUBLISHED = ("pr1217", "pr1128", "pr1333", "pr675")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_system_has_its_own_figures(name):
    facts, result = FACTS[name], plan(PRESETS[name])
    assert result["step_ms"] == pytest.approx(facts.step_ms, rel=1e-3)
    assert result["total_bytes"] == facts.artifact_bytes
    assert result["stages"]["training"]["seconds"] == PRESETS[name].train_seconds
    for method, seconds in facts.stage_seconds.items():
        assert result["stages"][method]["seconds"] == seconds
    steps = {"pr1217": 6654, "pr1128": 7138, "pr1333": 5453, "pr675": 5795}[name]  # means of the published logs
    assert result["steps"] == pytest.approx(steps, rel=0.001)


def test_each_system_is_predicted_from_the_others():
    errors = [predicted_step_ms(PRESETS[n], "h100", 8, without=n) / FACTS[n].step_ms - 1 for n in PUBLISHED]
    assert max(map(abs, errors)) < 0.2
    assert sliding_seconds(PRESETS["pr1333"], "h100", 8) == pytest.approx(76.2, rel=0.2)
    assert sliding_seconds(PRESETS["pr1128"], "h100", 8) == pytest.approx(85, rel=0.2)  # 75 to 95 s as published


def test_operations_by_hand():
    cfg = PRESETS["tiny"].replace(
        ve_layers=(), rope_dims=4, num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1, mlp_mult=2.0, vocab_size=100
    )
    # Of a layer: queries and output 2 x 64, keys and values 2 x 32, the MLP 2 x 128; attention 8 x 10; the head 800.
    assert forward_flops(cfg, 10, False) == 2 * (2 * (128 + 64 + 256 + 80) + 800)
    again = cfg.replace(recur_layers=(1,), recur_start_step=50)
    once, twice = (forward_flops(again, again.train_seq_len, r) for r in (False, True))
    assert twice > once
    assert step_flops(again, 200) == pytest.approx(3 * again.train_batch_tokens * (once + 3 * twice) / 4)


def test_score_first_training_is_scaled_by_its_steps():
    cfg = PRESETS["pr1217"]
    seconds = ttt_training_seconds(cfg, "h100", 8)
    chunks = 1893  # of 32,768 targets, the last without training
    assert seconds == pytest.approx(3 * (chunks - 1) * 0.057)
    assert sliding_seconds(cfg, "h100", 8) + seconds == pytest.approx(FACTS["pr1217"].stage_seconds["ttt"], rel=0.2)
    assert ttt_training_seconds(cfg, "a100", 8) == seconds  # launches take as long
    assert ttt_training_seconds(cfg, "h100", 3) == pytest.approx(3 * seconds)  # 8 slices: 3, 3 and 2
    assert ttt_training_seconds(cfg.replace(recur_layers=(4, 5)), "h100", 8) == pytest.approx(13 / 11 * seconds)
    small = cfg.replace(ttt_batch_seqs=1, ttt_epochs=1)  # two steps for the two sequences of a slice
    assert ttt_training_seconds(small, "h100", 8) == pytest.approx(2 / 3 * seconds)
    large = cfg.replace(ttt_chunk_tokens=2**24)  # 32 sequences in a micro-batch: arithmetic counts
    assert ttt_training_seconds(large, "a100", 8) > ttt_training_seconds(large, "h100", 8) > 0


def test_scaling():
    cfg = PRESETS["pr1128"]
    assert predicted_step_ms(cfg, "h100", 4) == pytest.approx(2 * predicted_step_ms(cfg, "h100", 8))
    assert predicted_step_ms(cfg, "a100", 8) == pytest.approx(989 / 312 * predicted_step_ms(cfg, "h100", 8))
    other = plan(cfg.replace(matrix_lr=0.1))
    assert other["stages"]["training"]["from"].startswith("scaled")
    ttt = sliding_seconds(cfg, "h100", 8) + ttt_training_seconds(cfg, "h100", 8)
    assert other["stages"]["slot+ttt"]["seconds"] == pytest.approx(ttt, abs=0.01)
    assert other["stages"]["slot+ttt"]["from"].startswith("at least, for SLOT is not in it")
    assert other["stages"]["plain"]["seconds"] is None
    (over,) = plan(cfg.replace(matrix_lr=0.1), budget_s=490.0)["over"][1:]  # with the sliding windows 497 s
    assert over.startswith("scoring: 496.9 s of 490 s")
    with pytest.raises(InputError, match="--gpu must be one of h100, .*, got 'tpu'"):
        plan(cfg, gpu="tpu")


def test_what_does_not_fit_is_exit_code_2(capsys):
    assert main(["plan", "--preset", "pr1333", "--budget", "600"]) == 0
    assert main(["plan", "--preset", "pr1128", "--budget", "600"]) == 2
    assert "scoring: 6" in capsys.readouterr().err
    assert main(["plan", "--preset", "pr1333", "--budget", "500"]) == 2
    shown = capsys.readouterr()
    assert "training and calibration: 590.0 s of 500 s, 90.0 s too long" in shown.err
    assert "scoring: 527.8 s of 500 s, 27.8 s too long" in shown.err


def test_score_first_training_is_extrapolated_from_its_first_chunk(monkeypatch):
    real, epochs, now = ScoreFirst.train, [], [100.0]

    def train(self, chunk, gate, ranks):
        real(self, chunk, gate, ranks)
        epochs.append((chunk, len(self.steps)))
        now[0] += 10.0 if len(epochs) == 1 else 2.0

    monkeypatch.setattr(planning.time, "perf_counter", lambda: now[0])

    monkeypatch.setattr(ScoreFirst, "train", train)
    cfg = PRESETS["tiny"].replace(ttt_chunk_tokens=256, ttt_epochs=5, ttt_batch_seqs=2)
    model, tokens = GPT(cfg).eval(), torch.arange(1000) % 512  # 999 targets: 3 chunks and a rest behind which none is
    ranks = Ranks(0, 1, torch.device("cpu"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert planning.measure_ttt_training(cfg, model, tokens, ranks) == pytest.approx(2.0 * 5 * 3)
    assert epochs == [(0, 2), (0, 4), (0, 6), (0, 8)]  # four sequences of 64, two in a step
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    assert planning.measure_ttt_training(cfg, model, tokens[:257], ranks) == 0.0


def test_this_machine_is_measured(dataset_dir, capsys, monkeypatch):
    real = planning.measure_ttt_training
    monkeypatch.setattr(planning, "measure_ttt_training", lambda *args: 1000.0 + min(real(*args), 900.0))
    words = ["plan", "--preset", "tiny", "--data", str(dataset_dir), "--device", "cpu", "--set", "eval_batch_windows=8"]
    words += ["--set", "attn_gptq=true", "--set", "calibration_batches=8", "--set", "eval_stages=plain,sliding,ttt"]
    words += ["--set", "ttt_chunk_tokens=4096"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == PRESETS["tiny"].max_steps
    seconds = {name: stage["seconds"] for name, stage in result["stages"].items()}
    assert [*seconds] == ["training", "calibration", "packing", "plain", "sliding", "ttt"]
    assert all(value > 0 for value in seconds.values())
    assert seconds["sliding"] > seconds["plain"]  # four windows for one
    assert 1000 < seconds["ttt"] < 2000
    assert main([*words, "--set", "eval_stages=plain", "--set", "attn_gptq=false", "--budget", "0.001"]) == 2
    assert "training and calibration: " in capsys.readouterr().err
