"""Budgets: predictions by hand, refusals that lose nothing, and real runs whose predictions stand beside what came."""

import json

import pytest
import torch

from pgolf import budget, ledger, run
from pgolf.cli import main
from pgolf.errors import InputError
from pgolf.presets import preset

TINY = preset("tiny")
CPU = torch.device("cpu")


def test_plans_by_hand():
    """Recurrence makes steps slower from step 40 on."""
    steps = TINY.replace(max_steps=100)
    assert budget.plan_training(steps, {False: 0.5}) == budget.TrainingPlan(100, 500.0, 50.0)
    both = steps.replace(recur_layers=(1,), recur_start_step=40)
    assert budget.plan_training(both, {False: 0.5, True: 1.0}, 3.0).seconds == 40 * 0.5 + 60 * 1.0 + 3.0
    always = steps.replace(recur_layers=(1,), recur_start_step=0)
    assert budget.plan_training(always, {True: 1.0}).seconds == 100.0
    for limit, expected in ((10.0, 20), (20.0, 40), (50.0, 70), (100.0, 100)):
        plan = budget.plan_training(both.replace(max_seconds=limit), {False: 0.5, True: 1.0})
        assert (plan.steps, plan.train_seconds) == (expected, min(limit, 80.0)), limit


def test_a_refused_plan_says_by_how_much():
    plan = budget.plan_training(TINY.replace(max_steps=100), {False: 0.5})
    budget.check_training(TINY, plan, 50.0)
    with pytest.raises(InputError, match=r"100 steps of 500.0 ms take 50.0 s.*: 10.0 s too long; about 80 steps fit"):
        budget.check_training(TINY, plan, 40.0)
    timed = TINY.replace(max_steps=1000, max_seconds=600.0, attn_gptq=True, gptq_reserve_seconds=9.0)
    plan = budget.plan_training(timed, {False: 1.0}, 8.5)
    budget.check_training(timed, plan, 600.0)
    plan = budget.plan_training(timed, {False: 1.0}, 12.0)
    with pytest.raises(InputError, match=r": 3.0 s too long; .* gptq_reserve_seconds at least 12.0"):
        budget.check_training(timed, plan, 600.0)


class Clock:
    """A clock that a test winds."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(budget.time, "perf_counter", lambda: self.now)

    def run(self, pace, total, seconds):
        """Batches of `seconds` each, the first of 5; returns how many were done when it was stopped."""
        for done in range(1, total + 1):
            self.now += 5.0 if done == 1 else seconds(done) if callable(seconds) else seconds
            try:
                pace(done, total)
            except InputError as error:
                return done, str(error)
        return total, ""


def test_a_pace_is_predicted_without_the_first_batch(monkeypatch):
    clock, seen = Clock(monkeypatch), []
    pace = budget.Pace("plain", CPU, on_progress=lambda *values: seen.append(values))
    assert clock.run(pace, 100, 0.5)[0] == 100
    assert pace.predicted_s == pytest.approx(5.0 + 99 * 0.5)
    assert seen == [(i, 100) for i in range(1, 101)]
    assert clock.run(budget.Pace("plain", CPU, limit_s=54.6, budget_s=60.0), 100, 0.5)[0] == 100


def test_a_pace_that_is_too_slow_is_stopped_early_and_one_that_slows_down_later(monkeypatch):
    clock = Clock(monkeypatch)
    done, error = clock.run(budget.Pace("plain", CPU, limit_s=50.0, budget_s=60.0), 100, 0.5)
    assert done == 4
    assert error == (
        "eval: --budget 60 cannot be met: 4 of 100 batches of plain took 6.5 s, all would take 54.5 s and 50.0 s are "
        "left: 4.5 s too long"
    )
    done, _ = clock.run(budget.Pace("plain", CPU, limit_s=60.0, budget_s=60.0), 100, lambda i: 0.5 if i < 20 else 2.0)
    assert done == 32
    assert clock.run(budget.Pace("plain", CPU, limit_s=1.0, budget_s=1.0), 4, 0.5)[0] == 4  # nothing left to save


def test_calibration_is_extrapolated_from_a_few_batches(monkeypatch):
    from pgolf.artifact import calibration

    clock, calls = Clock(monkeypatch), []

    def calibrate(cfg, model, dataset):
        calls.append(cfg.calibration_batches)
        clock.now += 10.0 * (len(calls) == 1) + 1.5 + 0.25 * cfg.calibration_batches

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    cfg = TINY.replace(attn_gptq=True, calibration_batches=64)
    assert budget.measure_calibration(cfg, None, None) == pytest.approx(1.5 + 0.25 * 64)
    assert sum(calls) < 8
    assert budget.measure_calibration(TINY, None, None) == 0.0


def test_a_budget_of_training(dataset_dir, tmp_path, capsys):
    words = ["train", "--preset", "tiny", "--data", str(dataset_dir), "--device", "cpu", "--steps", "6"]
    words += ["--set", "val_tokens=1024", "--set", "attn_gptq=true", "--set", "calibration_batches=4"]
    assert main([*words, "--run", str(tmp_path / "no"), "--budget", "0.01"]) == 2
    assert "--budget 0.01 cannot be met: 6 steps" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / ledger.LEDGER).exists()

    assert main([*words, "--run", str(tmp_path / "free")]) == 0
    assert main([*words, "--run", str(tmp_path / "kept"), "--budget", "600"]) == 0
    assert "predicted 6 steps in" in capsys.readouterr().err
    events = {e["event"]: e for e in run.read_log(tmp_path / "kept")}
    assert 0 < events["predict"]["calibration_seconds"] < 600
    assert events["end"]["predicted_train_seconds"] == events["predict"]["train_seconds"]
    # A busy machine may be several times slower for a while, but not a hundred times.
    assert 0.01 < events["predict"]["train_seconds"] / events["end"]["train_seconds"] < 100
    # Measuring is undone: the losses have the same bits.
    kept, free = ([e["loss"] for e in run.read_log(tmp_path / n) if e["event"] == "step"] for n in ("kept", "free"))
    assert kept == free

    artifact = tmp_path / "kept" / run.ARTIFACT
    assert main(["pack", str(tmp_path / "kept")]) == 0
    score = ["eval", str(artifact), "--data", str(dataset_dir), "--device", "cpu", "--method", "plain"]
    score += ["--set", "eval_batch_windows=8"]
    assert main([*score, "--budget", "0.001"]) == 2
    assert "--budget 0.001 cannot be met: 4 of" in capsys.readouterr().err
    assert not (tmp_path / "kept" / run.SCORES).exists()
    assert main([*score, "--budget", "600", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0.01 < result["predicted_seconds"] / result["seconds"] < 100
