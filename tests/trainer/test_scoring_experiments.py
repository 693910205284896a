"""What was reported without code: a hashed table beside delta, a temperature, a context tree; each causal by itself."""

import math

import pytest
import torch
from scoring_samples import ONE_RANK, SYSTEMS, flip_changes, load, score_batch, trained_model, validation_text

from pgolf.errors import InputError
from pgolf.evaluate import score_method
from pgolf.scoring.context_tree import ContextTree
from pgolf.scoring.objective import standing
from pgolf.scoring.slot import Slot
from pgolf.scoring.slot_autograd import AutogradSlot
from pgolf.scoring.windows import gather_batch, make_windows

BASE = SYSTEMS["pr1217"].replace(slot_steps=3, slot_lr=0.02, eval_batch_windows=8)
CAUSAL = {
    "table": ("slot", BASE.replace(slot_buckets=16)),
    "table before the norm": ("slot", BASE.replace(slot_buckets=16, slot_norm="before", slot_normalize="batch")),
    "temperature": ("slot", BASE.replace(slot_parameters="temperature", slot_lr=0.1)),
    "context tree": ("ctw", BASE.replace(ctw_entropy=0.5)),
}


@pytest.fixture(scope="module")
def model():
    return trained_model("pr1217", load("sliding_pr1217"), dtype=torch.float32)


@pytest.fixture(scope="module")
def text():
    tokens, byte_counts = validation_text()
    return tokens[:401], byte_counts


def nll_of(method, cfg, model, tokens, byte_counts):
    pieces = []
    score_method(method, cfg, model, tokens, byte_counts, ONE_RANK, on_nll=lambda w, nll: pieces.append(nll))
    return torch.cat(pieces)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_score_depends_on_a_later_token(name, model, text):
    method, cfg = CAUSAL[name]
    assert standing(cfg, method).causal
    plain, scores = (nll_of(m, cfg, model, *text) for m in ("sliding", method))
    assert (plain[64:] - scores[64:]).abs().max() > 1e-3, "it did nothing"
    targets = torch.arange(1, 401)
    changes = flip_changes(
        lambda tokens: nll_of(method, cfg, model, tokens, text[1]), text[0], targets, [1, 64, 65, 200, 333, 400], 420
    )
    assert (changes[~changes.isnan()] == 0).all()


def test_a_shared_table_leaks_and_says_so(model, text):
    cfg = BASE.replace(slot_buckets=16, slot_share="shared-context", slot_normalize="batch")
    assert not standing(cfg, "slot").causal
    changes = flip_changes(
        lambda tokens: nll_of("slot", cfg, model, tokens, text[1]), text[0], torch.arange(1, 401), [200, 333], 420
    )
    assert (changes[~changes.isnan()].abs() > 1e-7).sum() > 20


@pytest.mark.parametrize("norm", ["after", "before"])
def test_one_bucket_shifts_every_position_alike(norm, model, text):
    """A single row has delta's gradient, so both move alike, as one delta with twice the rate does."""
    cfg = BASE.replace(slot_norm=norm, slot_wd=0.0, slot_normalize="batch")
    windows = make_windows(400, 64, 16)[:8]
    batch = gather_batch(text[0], windows, 64)
    table, delta = AutogradSlot(cfg.replace(slot_buckets=1)), Slot(cfg.replace(slot_lr=2 * cfg.slot_lr))
    got, want = (score_batch(scorer, model, *batch, windows) for scorer in (table, delta))
    torch.testing.assert_close(got, want, rtol=0, atol=5e-4)
    both = table.last_parameters
    torch.testing.assert_close(both["delta"], both["table"][:, 0])
    assert (both["delta"][0] == 0).all() and (both["delta"][1:] != 0).any()


def test_a_temperature_descends_its_gradient(model, text):
    """One step of SGD from 1 is the derivative of the context's loss, by finite differences."""
    cfg = BASE.replace(slot_parameters="temperature", slot_steps=1, slot_lr=0.1)
    windows = make_windows(400, 64, 16)[3:4]
    x, y, scored = gather_batch(text[0], windows, 64)
    double = trained_model("pr1217", load("sliding_pr1217"))
    scorer = AutogradSlot(cfg)
    score_batch(scorer, double, x, y, scored, windows)
    with torch.no_grad():
        logits = double.logits(x)[0].double()

    def loss(temperature):
        return torch.nn.functional.cross_entropy(logits[:48] / temperature, y[0, :48]).item()

    slope = (loss(1 + 1e-4) - loss(1 - 1e-4)) / 2e-4
    assert scorer.last_parameters["temperature"].item() == pytest.approx(1 - 0.1 * slope, abs=1e-5)


def test_the_context_tree_counts_what_came_before(text):
    cfg = BASE.replace(ctw_depth=2, vocab_size=420)
    stream = [5, 6, 7, 5, 6, 8, 5, 6, 9]
    tree = ContextTree(cfg)
    tree.stream = stream
    tree._count_up_to(8)
    seen = tree.log_estimate(8, 10).exp()  # after 5, 6 came 7 and 8
    want = torch.full((10,), 0.5, dtype=torch.float64)
    want[7] = want[8] = 1.5
    torch.testing.assert_close(seen, want / want.sum())
    fresh = ContextTree(cfg)
    fresh.stream = stream
    assert fresh.log_estimate(0, 10).exp().tolist() == pytest.approx([0.1] * 10)
    fresh._count_up_to(2)
    assert fresh.log_estimate(2, 10).exp()[5].item() == pytest.approx(1.5 / 7)  # 6 was never left: order zero


def test_a_mixture_of_weight_one_is_the_estimate(model, text):
    """Everything of the tree, nothing of the model, where its entropy is all there can be; else their mixture."""
    cfg = BASE.replace(ctw_weight=1.0, ctw_entropy=0.0, ctw_depth=0)
    uniform = type("Uniform", (), {"cfg": model.cfg, "hidden": lambda self, x: torch.zeros(*x.shape, 4)})()
    uniform.head_weight = lambda: torch.zeros(420, 4)
    scores = nll_of("ctw", cfg, uniform, *text)
    stream = text[0].tolist()
    for i in (0, 100, 399):
        before = stream[: i + 1]
        want = -math.log((before.count(stream[i + 1]) + 0.5) / (len(before) + 210))
        assert scores[i].item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("fields", [{"eval_windows": "legacy"}, {"eval_interleave": True, "eval_slices": 2}])
def test_a_context_tree_needs_order(fields, model, text):
    with pytest.raises(InputError, match="needs every target once and in order"):
        nll_of("ctw", BASE.replace(**fields), model, *text)


@pytest.mark.parametrize(
    "fields",
    [
        {"slot_buckets": 4, "slot_parameters": "both"},
        {"slot_buckets": 4, "slot_optimizer": "lbfgs"},
        {"slot_parameters": "temperature", "slot_clamp": 1.0},
        {"ctw_weight": 1.5},
    ],
)
def test_settings_that_do_not_fit_are_refused(fields):
    with pytest.raises(InputError, match="config:"):
        BASE.replace(**fields)
