"""Every published form of SLOT: its numbers step by step, the settings that go together, the standing of each.

The arrays come from the published evaluation loops: two sizes (A, B) with three ranks each, the first with the window
that scores all it holds, the last with the short windows of the stream's end, and streams of several batches (C).
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scoring_samples import SLOT_SYSTEMS, FixedStates, load, score_batch

from pgolf.config import FIELDS, Config
from pgolf.config_rules import CHOICES
from pgolf.data.byte_counts import ByteCounts
from pgolf.errors import InputError
from pgolf.scoring import slot as slot_module
from pgolf.scoring.objective import SHARES, objective_weights, standing
from pgolf.scoring.published import PUBLISHED, published_settings
from pgolf.scoring.slot import Slot, make_optimizer
from pgolf.scoring.stream import plan_batches
from pgolf.scoring.windows import Window, gather_batch, make_windows
from pgolf_kernels import AdamW

ARRAYS = load("slot_variants")
CASES = sorted({name.split("/")[0] for name in ARRAYS if name[0] in "AB"})
STREAMS = sorted({name.split("/")[0] for name in ARRAYS if name[0] == "C"})


def array(name: str) -> np.ndarray:
    """An array, or the one it is a copy of."""
    value = ARRAYS[name]
    return ARRAYS[str(value)] if value.dtype.kind == "U" else value


def config(case: str, variant: str) -> Config:
    seq_len, stride, _ = ARRAYS[f"{case}/shape"]
    base = Config(eval_seq_len=int(seq_len), train_seq_len=int(seq_len), train_batch_tokens=int(seq_len))
    return base.replace(**(PUBLISHED[SLOT_SYSTEMS[variant]] | {"eval_stride": int(stride)}))


def dtype_of(variant: str) -> torch.dtype:
    return torch.float64 if variant in "fg" else torch.float32  # a line search branches on rounding


def model_of(case: str, states: str, dtype: torch.dtype) -> FixedStates:
    tensors = (torch.from_numpy(array(f"{case}/{name}")).to(dtype) for name in (states, "W"))
    return FixedStates(*tensors, float(ARRAYS[f"{case}/shape"][2]))


def byte_counts_of(case: str) -> ByteCounts:
    names = ("base_bytes", "has_leading_space", "is_boundary")
    return ByteCounts(*(torch.from_numpy(array(f"{case}/{name}")) for name in names))


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_published_one(case, monkeypatch):
    variant = case[2:]
    cfg, dtype = config(case, variant), dtype_of(variant)
    spans = (array(f"{case}/{name}").tolist() for name in ("window_start", "window_len", "scored_start"))
    windows = [Window(*span) for span in zip(*spans, strict=True)]
    x, y = (torch.from_numpy(array(f"{case}/{name}")).long() for name in "xy")
    scored = torch.zeros_like(y, dtype=torch.bool)
    for i, w in enumerate(windows):
        scored[i, w.score_from : w.length] = True
    model = model_of(case, "H", dtype)
    tolerance = max(1e-6, 100 * float(ARRAYS[f"{case}/sensitivity"])) if variant in "fg" else None

    def close(got: torch.Tensor, want: np.ndarray, what: str) -> None:
        want = torch.from_numpy(want).reshape(got.shape).to(dtype)
        limit = tolerance or 1e-4 * max(float(want.abs().max()), 1e-3)
        assert (got - want).abs().max() <= limit, f"{what}: off by {(got - want).abs().max():.1e}"

    class FirstSteps(AdamW):
        """The learning rates of a whole fit, though only its first steps are run."""

        def learning_rates(self, steps: int) -> list[float]:
            return super().learning_rates(cfg.slot_steps)[:steps]

    def first_steps(cfg: Config):
        made = make_optimizer(cfg)
        return FirstSteps(**dataclasses.asdict(made)) if isinstance(made, AdamW) else made

    monkeypatch.setattr(slot_module, "make_optimizer", first_steps)
    deltas = ARRAYS[f"{case}/delta"]
    for k in range(1, cfg.slot_steps + 1):
        scorer = Slot(cfg.replace(slot_steps=k, slot_clamp=0.0))  # the arrays are of before the clamping
        score_batch(scorer, model, x, y, scored, windows)
        fit = scorer.last_fit
        close(fit.bias if variant == "g" else fit.delta, deltas[k - 1], f"step {k}")
        if f"{case}/bias" in ARRAYS and k in (1, cfg.slot_steps):
            close(fit.bias, ARRAYS[f"{case}/bias"][0 if k == 1 else 1], f"bias of step {k}")
        close(fit.loss_per_step.sum(1), ARRAYS[f"{case}/losses"][:k], f"losses of {k} steps")
    nll = score_batch(Slot(cfg), model, x, y, scored, windows)
    close(nll, ARRAYS[f"{case}/nll"], "scores")
    total = float(nll.double().sum())
    np.testing.assert_allclose(total / len(nll), ARRAYS[f"{case}/val_loss"], rtol=1e-6)
    if f"{case}/val_bpb" in ARRAYS:
        num_bytes = int(byte_counts_of(case).count_bytes(y[scored], x[scored]).sum())
        np.testing.assert_allclose(total / math.log(2) / num_bytes, ARRAYS[f"{case}/val_bpb"], rtol=1e-6)


@pytest.mark.parametrize("case", STREAMS)
def test_batches_in_a_row_are_the_published_ones(case):
    """Windows, batches, the clamped warm start and the total of a stream of forty windows."""
    variant = case[1:]
    cfg, dtype = config(case, variant), dtype_of(variant)
    tokens = torch.from_numpy(array(f"{case}/tokens")).long()
    windows = make_windows(len(tokens) - 1, cfg.eval_seq_len, cfg.eval_stride, "legacy")
    scorer, totals = Slot(cfg), []
    scorer.begin_slice()
    for k, batch in enumerate(plan_batches(windows, cfg.eval_batch_windows, 1, False)[0]):
        inputs = gather_batch(tokens, batch, cfg.eval_seq_len)
        nll = score_batch(scorer, model_of(case, f"H{k}", dtype), *inputs, batch)
        got = scorer.last_fit.bias if variant == "g" else scorer.last_fit.delta
        want = torch.from_numpy(ARRAYS[f"{case}/delta{k}"])
        want = want.clamp(-5, 5) if variant == "g" else want
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if variant == "g" else 1e-5)
        torch.testing.assert_close(nll, torch.from_numpy(ARRAYS[f"{case}/nll{k}"]), rtol=0, atol=1e-5)
        totals.append((float(nll.double().sum()), len(nll)))
    assert k == 1
    nll, count = map(sum, zip(*totals, strict=True))
    np.testing.assert_allclose(nll / count, ARRAYS[f"{case}/val_loss"], rtol=1e-6)


def test_interleaved_slices_are_the_published_ranks():
    """The windows that e and f were run on are those of one rank of three."""
    windows = make_windows(368, 128, 16, "legacy")
    for rank in range(3):
        starts = array(f"A{rank}e/window_start").tolist()
        assert [w.start for w in plan_batches(windows, 99, 3, True)[rank][0]] == starts
        contiguous = array(f"A{rank}b/window_start").tolist()
        assert [w.start for w in plan_batches(windows, 99, 3, False)[rank][0]] == contiguous


def test_the_standing_of_each_published_system():
    for name, fields in PUBLISHED.items():
        assert standing(Config().replace(**fields), "slot").causal == (name in ("pr1217-window", "pr549")), name
        assert standing(Config().replace(**fields), "ttt").causal
        assert all("=" in setting for setting in published_settings(name))
        missing = {field for field in FIELDS if field.startswith("slot_")} - set(fields)
        assert not missing, f"{name} would follow Config's defaults in {missing}"
    assert set(SHARES) == CHOICES["slot_share"]
    with pytest.raises(InputError, match="did you mean 'pr1217'"):
        published_settings("pr1218")


@pytest.mark.parametrize("share", SHARES)
def test_objectives_keep_to_the_window(share):
    cfg = Config(eval_seq_len=8, train_seq_len=8, train_batch_tokens=8, eval_stride=2)
    cfg = cfg.replace(slot_share=share, slot_parameters="bias", slot_half_life=0.0)
    weights = objective_weights(cfg, [Window(0, 8, 0), Window(2, 8, 6), Window(4, 6, 4), Window(8, 2, 0)], 8)
    want = {
        "context": [0, 6, 4, 0],
        "prefix": [5, 5, 5, 5],
        "all": [8, 8, 8, 8],
        "all-but-last": [7, 7, 7, 7],
        "scored": [8, 2, 2, 2],
        "window": [0, 6, 4, 0],
        "frontier": [0, 0, 0, 0],
        "carried": [8, 2, 2, 2],
    }[share.removeprefix("shared-").removeprefix("window-")]
    assert weights.sum(1).tolist() == want
    if share == "frontier":  # windows of one batch end their fits at the same target, the ninth of the stream
        weights = objective_weights(cfg, [Window(2, 8, 6), Window(4, 8, 6), Window(10, 8, 6)], 8)
        assert weights.sum(1).tolist() == [6, 4, 0]


def test_a_focus_and_a_half_life_weigh_the_context():
    cfg = Config(eval_seq_len=8, train_seq_len=8, train_batch_tokens=8, eval_stride=2, slot_half_life=2.0)
    weights = objective_weights(cfg.replace(slot_focal_tokens=4), [Window(2, 8, 6), Window(4, 4, 2)], 8)
    np.testing.assert_allclose(weights[0], [0, 0, 0, 0, 0.5, 0.5**0.5, 0, 0], rtol=1e-6)
    assert (weights[1] == 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slot_parameters": "logits"}, "slot_parameters 'logits' needs a slot_share that is shared, got 'window'"),
        (
            {"slot_parameters": "logits", "slot_share": "shared-all", "slot_norm": "before"},
            "slot_norm must be 'after', got 'before'",
        ),
        ({"slot_share": "carried", "slot_parameters": "temperature"}, "slot_share must not be 'carried'"),
        ({"slot_share": "shared-all", "slot_parameters": "bias", "slot_optimizer": "lbfgs-joint"}, "use 'lbfgs'"),
        ({"slot_share": "all"}, "slot_share must be one of"),
        ({"slot_restart_steps": -1}, "slot_restart_steps must be at least 0, got -1"),
        ({"ttt_freeze_blocks": 12}, "ttt_freeze_blocks must lie in 0..num_layers 11, got 12"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Config().replace(**fields)


def test_a_restart_begins_with_fresh_moments():
    """Two restarts are two fits, the second from where the first ended."""
    case = "B1e"
    cfg = config(case, "e").replace(slot_steps=6, slot_restart_steps=3, slot_optimizer="hypergradient", slot_lr_max=0.1)
    model, windows = model_of(case, "H", torch.float64), [Window(i * 60, 80, 60) for i in range(8)]
    x, y = (torch.from_numpy(array(f"{case}/{name}")).long() for name in "xy")
    scored = torch.zeros_like(y, dtype=torch.bool)
    scored[:, 60:] = True
    twice, once = Slot(cfg), Slot(cfg.replace(slot_steps=3))
    score_batch(twice, model, x, y, scored, windows)
    score_batch(once, model, x, y, scored, windows)
    assert torch.equal(twice.last_fit.loss_per_step[:3], once.last_fit.loss_per_step)
    warm = Slot(cfg.replace(slot_steps=6, slot_restart_steps=0))
    score_batch(warm, model, x, y, scored, windows)
    assert torch.equal(warm.last_fit.loss_per_step[:4], twice.last_fit.loss_per_step[:4])
    assert not torch.equal(warm.last_fit.loss_per_step[4:], twice.last_fit.loss_per_step[4:])
