"""Depth recurrence switches on during training, compiles nothing then, and stays on wherever the weights go."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from pgolf import run
from pgolf.artifact.pack import pack_run, read_content
from pgolf.artifact.unpack import repack, unpack
from pgolf.data.dataset import Dataset
from pgolf.distributed import Ranks
from pgolf.errors import InputError
from pgolf.evaluate import evaluate, load_model
from pgolf.generate import generate
from pgolf.model import GPT
from pgolf.presets import preset
from pgolf.train import train
from pgolf.trainer import Trainer
from pgolf_kernels import dispatch

START, STEPS = 3, 6
CPU = torch.device("cpu")
CFG = preset("tiny").replace(
    recur_layers=(1, 2), recur_start_step=START, max_steps=STEPS, warmdown_frac=0.0, warmdown_steps=0, dtype="float32"
)
CFG = CFG.replace(val_tokens=2048, train_batch_tokens=1024)


def losses(run_dir) -> list[float]:
    return [event["loss"] for event in run.read_log(run_dir) if event["event"] == "step"]


@pytest.fixture(scope="module")
def runs(dataset_dir, tmp_path_factory) -> dict:
    """Three runs of STEPS steps: recurrence from START on, from the first step on, and never; packed."""
    folder = tmp_path_factory.mktemp("recurrence")
    starts = {"switched": CFG, "always": CFG.replace(recur_start_step=0), "never": CFG.replace(recur_start_step=STEPS)}
    for name, cfg in starts.items():
        train(cfg, dataset_dir, folder / name, device="cpu")
        pack_run(folder / name, folder / name / run.ARTIFACT)
    return {name: folder / name for name in starts}


def test_recurrence_switches_on_at_its_step(runs):
    """The first START steps are those of the run without it, bit for bit; the next one is not."""
    switched, always, never = (losses(runs[name]) for name in ("switched", "always", "never"))
    assert switched[:START] == never[:START]
    assert all(abs(a - b) > 1e-6 for a, b in zip(switched[START:], never[START:], strict=True))
    # The untrained output projections are zero, so that a layer run twice changes nothing before the second step.
    assert always[0] == pytest.approx(never[0], abs=1e-6)
    assert abs(always[2] - never[2]) > 1e-6


@pytest.mark.parametrize(("steps", "active"), [(0, False), (START, False), (START + 1, True), (STEPS, True)])
def test_a_model_is_as_its_last_step_was(steps, active):
    assert CFG.recurs_after(steps) is active
    assert CFG.replace(recur_layers=()).recurs_after(steps) is False
    assert CFG.replace(recur_start_step=0).recurs_after(steps) is True
    assert len(GPT(CFG).layer_order()) == CFG.num_layers  # a new model has taken no step


def trained_loss(run_dir) -> float:
    """Of the final weights; packing and scoring log what comes behind it."""
    return next(e["val_loss"] for e in run.read_log(run_dir) if e["event"] == "end")


@pytest.mark.parametrize(("name", "active"), [("switched", True), ("always", True), ("never", False)])
def test_an_artifact_has_the_recurrence_its_training_ended_with(runs, dataset_dir, tmp_path, name, active):
    artifact = runs[name] / run.ARTIFACT
    model, cfg, header = load_model(artifact, CPU)
    assert header["extra"][run.TRAINED_STEPS] == STEPS
    assert model.recurrence_active is active
    assert model.layer_order() == ([0, 1, 2, 1, 2, 3] if active else [0, 1, 2, 3])
    # The score is that of the final weights, up to int6.
    score = evaluate(artifact, dataset_dir, "plain", limit=2048, device="cpu")
    trained = trained_loss(runs[name])
    assert score["val_loss"] == pytest.approx(trained, abs=2e-3)

    unpack(artifact, tmp_path / "open")
    repack(tmp_path / "open", tmp_path / "again.pgolf")
    assert load_model(tmp_path / "again.pgolf", CPU)[0].recurrence_active is active


def test_final_weights_were_validated_with_recurrence(runs, dataset_dir):
    """The val_loss of the log is the active model's; the inactive model of the same weights has another."""
    dataset = Dataset.open(dataset_dir)
    tokens = torch.from_numpy(dataset.val_tokens()[: 2048 + 1].astype("int64"))
    x, y = tokens[:-1].view(-1, 64), tokens[1:].view(-1, 64)
    model = GPT(CFG)
    model.load_export(load_file(runs["switched"] / run.MODEL))
    logged = trained_loss(runs["switched"])
    with torch.no_grad():
        inactive = model(x, y).item()
        model.recurrence_active = CFG.recurs_after(run.trained_steps(runs["switched"]))
        active = model(x, y).item()
    assert active == pytest.approx(logged, abs=2e-6)
    assert abs(inactive - logged) > 1e-4


def test_sampling_runs_the_layers_twice(runs):
    """Greedy tokens from the cache are those of whole forwards of the active model, position by position."""
    model, _, _ = load_model(runs["switched"] / run.ARTIFACT, CPU)
    prompt = torch.tensor([[1, 40, 41, 42]])
    ids = generate(model, prompt, 12, temperature=0)
    with torch.no_grad():
        want = model.logits(ids[:, :-1])[:, 3:].argmax(-1)
        model.recurrence_active = False
        other = model.logits(ids[:, :-1])[:, 3:]
        model.recurrence_active = True
        assert not torch.allclose(other, model.logits(ids[:, :-1])[:, 3:], atol=1e-3)
    assert torch.equal(ids[:, 4:], want)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_knows_whether_it_has_switched(dataset_dir, tmp_path, bf16):
    """Bit for bit, whatever the tables and their optimiser's state are stored in."""
    dataset, cfg = Dataset.open(dataset_dir), CFG.replace(bf16_tables=bf16, bf16_skip_gates=bf16, muon_projections=bf16)

    def advance(trainer: Trainer, steps: int) -> list[float]:
        values = []
        for _ in range(steps):
            trainer.model.recurrence_active = cfg.recurs_at(trainer.step)
            values.append(trainer.run_step(1.0, 0.9)[0].item())
            trainer.step += 1
        return values

    first = Trainer(cfg, dataset, Ranks(0, 1, CPU))
    for steps, active in ((START, False), (START + 1, True)):
        advance(first, steps - first.step)
        first.save(tmp_path)
        second = Trainer(cfg, dataset, Ranks(0, 1, CPU))
        second.resume(tmp_path)
        assert second.model.recurrence_active is first.model.recurrence_active is active
    assert advance(second, 2) == advance(first, 2)


@pytest.mark.parametrize(("start", "graphs"), [(0, 1), (START, 2), (STEPS, 1)])
def test_every_graph_is_compiled_before_the_clock_starts(dataset_dir, tmp_path, monkeypatch, start, graphs):
    """Counted by a compiler that only counts: warming up compiles each depth the run will use, the run itself none."""
    counter, seen = CompileCounter(), []
    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_with(self, backend=counter, **options)
    )
    warm_up = Trainer.warm_up

    def warm_up_and_count(self, steps):
        seconds = warm_up(self, steps)
        seen.append(counter.frame_count)
        return seconds

    monkeypatch.setattr(Trainer, "warm_up", warm_up_and_count)
    torch._dynamo.reset()
    dispatch.CHOSEN.clear()  # as in a new process: what it holds must not be a condition of a graph
    cfg = CFG.replace(recur_start_step=start, compile="on", warmup_steps=1)
    train(cfg, dataset_dir, tmp_path / "run", device="cpu")
    assert seen == [graphs]
    assert counter.frame_count == graphs


def test_warming_up_both_graphs_leaves_no_trace(runs, dataset_dir, tmp_path):
    trainer = Trainer(CFG.replace(warmup_steps=1), Dataset.open(dataset_dir), Ranks(0, 1, CPU))
    trainer.warm_up(1)
    assert trainer.model.recurrence_active is False
    out = tmp_path / "run"
    train(CFG.replace(warmup_steps=2), dataset_dir, out, device="cpu")
    assert losses(out) == losses(runs["switched"])
    theirs = load_file(runs["switched"] / run.MODEL)
    assert all(torch.equal(value, theirs[name]) for name, value in load_file(out / run.MODEL).items())


def test_weights_of_unknown_steps_are_those_of_step_0_and_nonsense_is_refused(runs, tmp_path):
    source = runs["always"]
    for name in (run.CONFIG, run.TOKENIZER):
        (tmp_path / name).write_bytes((runs["switched"] / name).read_bytes())
    save_file(load_file(source / run.MODEL), tmp_path / run.MODEL)
    assert run.trained_steps(tmp_path) == 0
    pack_run(tmp_path, tmp_path / "a.pgolf")
    assert load_model(tmp_path / "a.pgolf", CPU)[0].recurrence_active is False

    unpack(tmp_path / "a.pgolf", tmp_path / "open")
    header = json.loads((tmp_path / "open/header.json").read_text())
    for nonsense in (-1, True, "many", 2.5):
        header["extra"][run.TRAINED_STEPS] = nonsense
        (tmp_path / "open/header.json").write_text(json.dumps(header))
        repack(tmp_path / "open", tmp_path / "b.pgolf")
        assert read_content(tmp_path / "b.pgolf").header.extra[run.TRAINED_STEPS] == nonsense
        with pytest.raises(InputError, match="train_steps in its header must be a number of steps"):
            load_model(tmp_path / "b.pgolf", CPU)


def test_the_first_validation_is_of_the_untrained_model(dataset_dir, tmp_path):
    train(CFG.replace(val_every=4), dataset_dir, tmp_path / "run", device="cpu")
    scores = {e["step"]: e["val_loss"] for e in run.read_log(tmp_path / "run") if e["event"] == "validate"}
    assert scores.keys() == {0, 4}
    assert scores[0] == pytest.approx(np.log(512), abs=0.05)
    assert scores[4] < scores[0] - 0.1
