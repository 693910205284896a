"""Plans: published figures as they are, scaling by hand, and a plan measured on this machine."""

import json

import pytest

from pgolf.cli import main
from pgolf.errors import InputError
from pgolf.presets import FACTS, PRESETS
from pgolf.publish.plan import forward_flops, plan, predicted_step_ms, sliding_seconds, step_flops

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


def test_scaling():
    cfg = PRESETS["pr1128"]
    assert predicted_step_ms(cfg, "h100", 4) == pytest.approx(2 * predicted_step_ms(cfg, "h100", 8))
    assert predicted_step_ms(cfg, "a100", 8) == pytest.approx(989 / 312 * predicted_step_ms(cfg, "h100", 8))
    other = plan(cfg.replace(matrix_lr=0.1))
    assert other["stages"]["training"]["from"].startswith("scaled")
    assert other["stages"]["slot+ttt"]["seconds"] is None
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


def test_this_machine_is_measured(dataset_dir, capsys):
    words = ["plan", "--preset", "tiny", "--data", str(dataset_dir), "--device", "cpu", "--set", "eval_batch_windows=8"]
    words += ["--set", "attn_gptq=true", "--set", "calibration_batches=8", "--set", "eval_stages=plain,sliding,ttt"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == PRESETS["tiny"].max_steps
    seconds = {name: stage["seconds"] for name, stage in result["stages"].items()}
    assert [*seconds] == ["training", "calibration", "packing", "plain", "sliding", "ttt"]
    assert all(seconds[name] > 0 for name in ("training", "calibration", "packing", "plain", "sliding"))
    assert seconds["ttt"] is None
    assert seconds["sliding"] > seconds["plain"]  # four windows for one
    assert main([*words, "--budget", "0.001"]) == 2
    assert "training and calibration: " in capsys.readouterr().err
