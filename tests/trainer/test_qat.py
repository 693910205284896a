"""Quantisation while training: what the forward multiplies by, that the compiled graph has it, and that it helps."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from pgolf import run
from pgolf.artifact.quantise import Rounding, dequantise_state, quantise_state
from pgolf.data.dataset import Dataset
from pgolf.distributed import Ranks
from pgolf.environment import read_environment
from pgolf.errors import InputError
from pgolf.model import GPT
from pgolf.optimise import fake_quantise
from pgolf.optimise.fake_quantise import FakeQuantiser
from pgolf.optimise.schedule import lr_multiplier
from pgolf.presets import preset
from pgolf.scoring.validation import plain_score
from pgolf.train import train
from pgolf.trainer import Trainer
from pgolf_kernels import dispatch

CPU = torch.device("cpu")
RANKS = Ranks(0, 1, CPU)
CFG = preset("tiny").replace(
    **{"num_layers": 2, "ve_layers": (1,), "float16_max_values": 256, "dtype": "float32", "average": "none"},
    **{"max_steps": 4, "warmdown_frac": 1.0, "train_batch_tokens": 512, "val_tokens": 4096, "qat": "hard"},
)


def shapes(model: GPT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(w.shape) for name, w in model.export_state().items()}


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CFG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.05)
        model.mlp_up_bank[0, :5] *= 40  # rows whose step is above the floor
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"attn_bits": 5, "mlp_bits": 8}, {"int6_floor": 1 / 31}, {"int6_clip": "3.5", "mlp_clip": "max"}]
)
def test_hard_rounding_is_the_artifacts(model, settings):
    """Bit for bit what packing and reading gives, where packing does not search for a clip."""
    cfg = CFG.replace(**{"int6_clip": "max", "qat": "hard"} | settings)
    model.fake_quantise = FakeQuantiser(cfg, shapes(model), CPU)
    packed = dequantise_state(quantise_state(cfg, model.export_state()))
    for kind, matrices in model.matrices().items():
        for layer, matrix in enumerate(matrices):
            name = f"blocks.{layer}.{kind}.weight"
            assert torch.equal(matrix, packed[name]), name
            assert not torch.equal(matrix, model.export_state()[name]), name


def test_the_gradient_passes_through_hard_rounding(model):
    model.fake_quantise = FakeQuantiser(CFG, shapes(model), CPU)
    weights = torch.randn(3, 4, 5, requires_grad=True)
    upstream = torch.randn(3, 4, 5)
    model.fake_quantise("mlp_up_bank", weights).backward(upstream)
    assert torch.equal(weights.grad, upstream)


@pytest.mark.parametrize("age", [0, 250, 500, 9000])
def test_soft_rounding_is_the_published_formula(model, age):
    """In float64, value and derivative; beyond the largest code nothing moves and no gradient comes."""
    cfg = CFG.replace(qat="soft", int6_clip="1.5", int6_floor=0.0)
    quantiser = FakeQuantiser(cfg, shapes(model), CPU)
    assert not quantiser.active_at(6, 0.2)
    assert quantiser.active_at(7, 0.1) and quantiser.active_at(7 + age, 1.0)
    weights = model.mlp_up_bank.detach().requires_grad_()
    rounded = quantiser("mlp_up_bank", weights)
    rounded.sum().backward()
    alpha = 1 + 15 * min(age / 500, 1)
    w = weights.detach().double().flatten(0, 1)
    step = Rounding.of(cfg, "mlp").scales(w.float())[0].double()[:, None]
    z = w / step
    s = torch.sigmoid(alpha * (z - z.floor() - 0.5))
    inside = (z.floor() + s).abs() <= 31
    want = (z.floor() + s).clamp(-31, 31) * step
    torch.testing.assert_close(rounded.flatten(0, 1).double(), want, rtol=1e-5, atol=1e-5)
    slope = torch.where(inside, alpha * s * (1 - s), 0.0)
    torch.testing.assert_close(weights.grad.flatten(0, 1).double(), slope, rtol=2e-3, atol=1e-4)
    assert not inside.all()


def test_small_matrices_stay_as_they_are(model):
    quantiser = FakeQuantiser(CFG.replace(float16_max_values=64 * 64), shapes(model), CPU)
    assert torch.equal(quantiser("qo_bank", model.qo_bank), model.qo_bank)
    assert not torch.equal(quantiser("mlp_up_bank", model.mlp_up_bank), model.mlp_up_bank)


@pytest.mark.parametrize(
    ("kind", "operation", "start"),
    [("hard", "round", 0.5), ("hard", "round", 2.0), ("soft", "floor", 0.5), ("none", None, 0.5)],
)
def test_the_compiled_graph_quantises_when_it_should(dataset_dir, tmp_path, monkeypatch, kind, operation, start):
    """Graphs as a compiler gets them: with rounding of four banks and without, all of them before the clock starts."""
    graphs, used, before_clock = [], [], []

    def backend(graph, inputs):
        index = len(graphs)
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes))

        def run_graph(*arguments):
            used.append(index)
            return graph(*arguments)

        return run_graph

    compile_with, warm_up = torch.nn.Module.compile, Trainer.warm_up
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **options: compile_with(m, backend=backend, **options))

    def warm_up_and_look(trainer, steps):
        seconds = warm_up(trainer, steps)
        before_clock.append(len(graphs))
        used.clear()
        return seconds

    monkeypatch.setattr(Trainer, "warm_up", warm_up_and_look)
    torch._dynamo.reset()
    dispatch.CHOSEN.clear()  # as in a new process: what it holds must not be a condition of a graph
    cfg = CFG.replace(qat=kind, qat_start=start, compile="on", warmup_steps=1)
    train(cfg, dataset_dir, tmp_path / "run", device="cpu")
    quantises = [graph[operation] == 4 and graph["clamp"] + graph["clamp_"] >= 4 for graph in graphs]
    assert before_clock == [len(graphs)]  # the run itself compiled nothing
    # Multipliers of the four steps: 1, 0.75, 0.5, 0.25.
    steps = [quantises[index] for index in used]
    if kind == "none":
        assert steps == [False] * 4 and not any(graph["round"] or graph["floor"] for graph in graphs)
    else:
        assert steps == ([False, False, False, True] if start == 0.5 else [True] * 4)
        assert not any(graph["round"] or graph["floor"] for graph, on in zip(graphs, quantises, strict=True) if not on)


def losses(run_dir) -> list[float]:
    return [e["loss"] for e in run.read_log(run_dir) if e["event"] == "step"]


def test_nothing_but_late_steps_sees_it(dataset_dir, tmp_path):
    """Losses are those of a run without until the switch; the final weights are exported and validated as they are."""
    ends = {}
    for kind in ("none", "hard"):
        ends[kind] = train(CFG.replace(qat=kind, qat_start=0.5), dataset_dir, tmp_path / kind, device="cpu")
    with_, without = losses(tmp_path / "hard"), losses(tmp_path / "none")
    assert with_[:3] == without[:3] and with_[3] != without[3]
    dataset, model = Dataset.open(dataset_dir), GPT(CFG)
    model.load_export(load_file(tmp_path / "hard" / run.MODEL))
    assert ends["hard"]["val_loss"] == pytest.approx(plain_score(model, dataset, CFG, RANKS).val_loss, rel=1e-6)


def advance(trainer: Trainer, steps: int) -> None:
    cfg = trainer.cfg
    while trainer.step < steps:
        lr = lr_multiplier(cfg, trainer.step, 0.0)
        quantised = trainer.quantiser is not None and trainer.quantiser.active_at(trainer.step, lr)
        trainer.run_step(lr, 0.9, quantised)
        trainer.step += 1


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_resumed_run_knows_when_it_began(dataset_dir, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(fake_quantise, "RAMP_STEPS", 4)
    cfg = CFG.replace(qat=kind, qat_start=0.7, max_steps=8)
    whole, parts = (Trainer(cfg, Dataset.open(dataset_dir), RANKS) for _ in range(2))
    advance(whole, 8)
    advance(parts, 6)
    parts.save(tmp_path)
    parts = Trainer(cfg, Dataset.open(dataset_dir), RANKS)
    parts.resume(tmp_path)
    advance(parts, 8)
    assert parts.quantiser.since == whole.quantiser.since == 3
    theirs = whole.model.state_dict()
    assert all(torch.equal(w, theirs[name]) for name, w in parts.model.state_dict().items())


def test_packing_costs_less_after_it(dataset_dir, monkeypatch):
    """The loss of the packed weights falls, and so does its distance from that of the trained ones; one seed."""
    monkeypatch.setattr(fake_quantise, "RAMP_STEPS", 30)
    dataset, gaps, packed = Dataset.open(dataset_dir), {}, {}
    grid = {"attn_bits": 5, "mlp_bits": 5, "int6_floor": 1 / 16}
    for kind in ("none", "hard", "soft"):
        cfg = CFG.replace(qat=kind, qat_start=0.6, max_steps=120, **grid)
        trainer = Trainer(cfg, dataset, RANKS)
        advance(trainer, cfg.max_steps)
        model = GPT(cfg)
        model.load_export(dequantise_state(quantise_state(cfg, trainer.model.export_state())))
        packed[kind] = plain_score(model, dataset, cfg, RANKS).val_loss
        gaps[kind] = packed[kind] - plain_score(trainer.model, dataset, cfg, RANKS).val_loss
    assert gaps["none"] > 0.05
    for kind in ("hard", "soft"):
        assert abs(gaps[kind]) < 0.5 * gaps["none"]
        assert packed[kind] < packed["none"]


def test_the_published_names():
    off = read_environment({"LATE_QAT": "1", "LATE_QAT_THRESHOLD": "0.2", "QAT_ENABLED": "0"}, "pr1128")
    assert off.config == preset("pr1128")
    assert any("LATE_QAT_THRESHOLD=0.2 has no effect" in note and "--set qat=hard" in note for note in off.notes)
    late = read_environment({"LATE_QAT_THRESHOLD": "0.2"}, "pr1217", ["qat=soft"]).config
    assert late == preset("pr1217").replace(qat="soft", qat_start=0.2)
    # The flag was on before anything was compiled: this one was alive, from the first step on.
    always = read_environment({"QAT_ENABLED": "1", "LATE_QAT_THRESHOLD": "0.15"}, "pr675")
    assert always.config.qat == "hard" and always.config.qat_start > 1
    assert any("LATE_QAT_THRESHOLD=0.15 has no effect" in note for note in always.notes)
    with pytest.raises(InputError, match="qat must be one of"):
        CFG.replace(qat="late")
