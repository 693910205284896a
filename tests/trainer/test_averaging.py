"""The chosen average is exported, validated, calibrated with and resumed; every mean is computed again here."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from pgolf import run
from pgolf.artifact import calibration
from pgolf.data.dataset import Dataset
from pgolf.distributed import Ranks
from pgolf.environment import read_environment
from pgolf.errors import InputError
from pgolf.model import GPT
from pgolf.optimise.averaging import make_average
from pgolf.optimise.schedule import lr_multiplier
from pgolf.presets import preset
from pgolf.scoring.validation import plain_score
from pgolf.train import train
from pgolf.trainer import Trainer

STEPS = 9
RANKS = Ranks(0, 1, torch.device("cpu"))
CFG = preset("tiny").replace(
    **{"max_steps": STEPS, "dtype": "float32", "val_tokens": 1024, "train_batch_tokens": 512, "ema_decay": 0.7},
    # Multipliers of steps 1 to 9: 1 up to the third, then 0.86, 0.71 ... 0.14.
    **{"warmdown_frac": 7 / 9, "swa_start": 0.6, "swa_every": 2, "lawa_every": 2, "lawa_k": 3},
)
# Steps whose weights are averaged, from 1: multiples of two, with a multiplier below 0.6; the last three of all.
SNAPSHOTS = {"swa": [6, 8], "lawa": [4, 6, 8]}


def expected(kind: str, weights: list[dict]) -> dict[str, torch.Tensor]:
    """The average of weights[s], those after step s (0: the initial ones), in float64."""
    names = weights[0].keys()
    if kind in SNAPSHOTS:
        chosen = SNAPSHOTS[kind]
        return {n: sum(weights[s][n].double() for s in chosen) / len(chosen) for n in names}
    if kind == "none":
        return weights[-1]
    mean = {n: w.double() for n, w in weights[0].items()}
    for after in weights[1:]:
        mean = {n: 0.7 * mean[n] + 0.3 * after[n].double() for n in names}
    return mean


@pytest.mark.parametrize("kind", ["ema", "swa", "lawa", "none"])
def test_the_average_is_exported_validated_and_calibrated(dataset_dir, tmp_path, monkeypatch, kind):
    weights, run_step = [], Trainer.run_step

    def watched(self, *arguments):
        weights.extend([self.model.export_state()] if not weights else [])
        weights[0] = {n: w.clone() for n, w in weights[0].items()}
        result = run_step(self, *arguments)
        weights.append({n: w.clone() for n, w in self.model.export_state().items()})
        return result

    monkeypatch.setattr(Trainer, "run_step", watched)
    calibrated = {"attn_gptq": True, "calibration_batches": 1, "float16_max_values": 0}
    cfg = CFG.replace(average=kind, **calibrated)
    end = train(cfg, dataset_dir, tmp_path / "run", device="cpu")
    assert len(weights) == STEPS + 1
    exported = load_file(tmp_path / "run" / run.MODEL)
    for name, value in expected(kind, weights).items():
        torch.testing.assert_close(exported[name].double(), value.double(), rtol=0, atol=2e-7, msg=name)

    model, dataset = GPT(cfg), Dataset.open(dataset_dir)
    model.load_export(exported)
    assert end["val_loss"] == pytest.approx(plain_score(model, dataset, cfg, RANKS).val_loss, rel=1e-6)
    digest = hashlib.sha256((tmp_path / "run" / run.MODEL).read_bytes()).hexdigest()
    ours = calibration.calibrate(cfg, model, dataset)
    kept = calibration.load_hessians(tmp_path / "run", cfg, digest, {name: len(h) for name, h in ours.items()})
    assert all(torch.equal(kept[name], h) for name, h in ours.items())


@pytest.mark.parametrize("kind", ["ema", "swa", "lawa"])
def test_a_resumed_run_has_the_same_average(dataset_dir, tmp_path, kind):
    """Bit for bit, from a checkpoint between two snapshots; one before the first snapshot holds none."""
    cfg, dataset = CFG.replace(average=kind), Dataset.open(dataset_dir)

    def advance(trainer: Trainer, steps: int) -> None:
        while trainer.step < steps:
            trainer.run_step(lr_multiplier(cfg, trainer.step, 0.0), 0.9)
            trainer.step += 1

    whole, parts = Trainer(cfg, dataset, RANKS), Trainer(cfg, dataset, RANKS)
    advance(whole, STEPS)
    for stop in (1, 7, STEPS):
        advance(parts, stop)
        parts.save(tmp_path)
        parts = Trainer(cfg, dataset, RANKS)
        parts.resume(tmp_path)
    assert whole.average.copy_to_model() and parts.average.copy_to_model()
    theirs = whole.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in parts.model.state_dict().items())


def test_bfloat16_tables_are_averaged_in_float32():
    model = GPT(CFG.replace(bf16_tables=True))
    average = make_average(model, CFG.replace(average="lawa", lawa_every=1, lawa_k=2))
    values = []
    for step in range(1, 4):
        with torch.no_grad():
            model.tok_emb.weight.normal_()
        values.append(model.tok_emb.weight.float())
        average.update(step, 1.0)
    assert average.copy_to_model()
    assert torch.equal(model.tok_emb.weight, ((values[1] + values[2]) / 2).bfloat16())


def test_warming_up_leaves_no_snapshot_behind(dataset_dir):
    cfg = CFG.replace(average="lawa", lawa_every=1, warmup_steps=2)
    trainer = Trainer(cfg, Dataset.open(dataset_dir), RANKS)
    trainer.warm_up(2)
    assert trainer.average.count == 0
    before = trainer.model.state_dict()["qo_bank"].clone()
    assert not trainer.average.copy_to_model()
    assert torch.equal(trainer.model.qo_bank, before)


def test_a_run_without_a_snapshot_exports_its_last_weights_and_says_so(dataset_dir, tmp_path, capsys):
    from pgolf.cli import main

    settings = ["--set=max_steps=2", "--set=val_tokens=512", "--set=train_batch_tokens=512"]
    arguments = ["train", "--preset=tiny", f"--data={dataset_dir}", f"--run={tmp_path / 'run'}", "--device=cpu"]
    assert main([*arguments, "--average=swa", *settings]) == 0
    assert "average swa: no snapshot was taken; the last weights are exported" in capsys.readouterr().err
    assert run.read_config(tmp_path / "run").average == "swa"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"average": "mean"}, "average must be one of"),
        ({"swa_every": 0}, "swa_every must be at least 1"),
        ({"lawa_k": 0}, "lawa_k must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay must lie in 0..1, below 1, got 1.0"),
    ],
)
def test_bad_values(settings, message):
    with pytest.raises(InputError, match=message):
        CFG.replace(**settings)


def test_the_published_names():
    """SWA's did nothing and still do nothing but with --average swa; LAWA's did something."""
    request = read_environment({"SWA_ENABLED": "1", "SWA_EVERY": "25"}, "pr1128")
    assert request.config == preset("pr1128")
    assert len(request.notes) == 2
    assert all("has no effect" in note and "--average swa exports them" in note for note in request.notes)
    chosen = read_environment({"SWA_ENABLED": "1", "SWA_EVERY": "25"}, "pr1128", ["average=swa"]).config
    assert chosen == preset("pr1128").replace(average="swa", swa_every=25)
    lawa = read_environment({"LAWA_ENABLED": "1", "LAWA_K": "5", "LAWA_FREQ": "20"}, "pr1128").config
    assert lawa == preset("pr1128").replace(average="lawa", lawa_k=5, lawa_every=20)
    off = read_environment({"LAWA_ENABLED": "0", "LAWA_K": "5"}, "pr1128")
    assert off.config == preset("pr1128")
    assert "LAWA_K=5 has no effect: averaging of late snapshots is off" in off.notes[0]
    with pytest.raises(InputError, match="LAWA_ENABLED must agree with the command line: both set average"):
        read_environment({"LAWA_ENABLED": "1"}, "pr1128", ["average=swa"])
    with pytest.raises(InputError, match="LAWA_ENABLED must be 1 with average=lawa, got '0'"):
        read_environment({"LAWA_ENABLED": "0"}, "pr1128", ["average=lawa"])
