"""Scoring: every target once, with the published numbers, whatever the batches; SLOT sees no target that it scores."""

import numpy as np
import pytest
import torch
from scoring_samples import SYSTEMS, load, score_batch, trained_model, validation_text

from pgolf.config import Config
from pgolf.data.byte_counts import ByteCounts
from pgolf.errors import InputError
from pgolf.scoring.objective import objective_weights
from pgolf.scoring.slot import Slot
from pgolf.scoring.windows import Window, gather_batch, make_windows


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, ByteCounts]:
    return validation_text()


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    return load("sliding_pr1333")


@pytest.mark.parametrize(("targets", "windows"), [(62_021_632, 969_057), (45_508_608, 711_041)])
def test_window_counts_of_the_challenge(targets, windows):
    assert len(range(0, max(targets - (2048 - 64), 1), 64)) == windows
    assert len(make_windows(targets // 997, 2048, 64)) == len(range(0, targets // 997 - 1984, 64))


@pytest.mark.parametrize("num_targets", [1, 15, 16, 17, 63, 64, 65, 79, 80, 81, 1000])
@pytest.mark.parametrize("stride", [1, 16, 63, 64])
def test_every_target_is_scored_exactly_once(num_targets, stride):
    """Lengths around the window (64), the stride and their sums, where an off-by-one would drop or repeat targets."""
    count = np.zeros(num_targets, dtype=int)
    for w in make_windows(num_targets, 64, stride):
        assert 0 < w.length <= 64
        assert w.start + w.length <= num_targets
        count[w.start + w.score_from : w.start + w.length] += 1
    assert (count == 1).all()


def test_nothing_to_score_is_an_error():
    with pytest.raises(InputError, match="nothing to score"):
        make_windows(0, 64, 16)


def test_a_batch_holds_inputs_their_successors_and_the_scored_mask():
    tokens = torch.arange(100, 111)
    x, y, scored = gather_batch(tokens, [Window(0, 8, 0), Window(6, 4, 2)], 8)
    assert x.tolist() == [[*range(100, 108)], [106, 107, 108, 109, 0, 0, 0, 0]]
    assert y.tolist() == [[*range(101, 109)], [107, 108, 109, 110, 0, 0, 0, 0]]
    assert scored.tolist() == [[True] * 8, [False, False, True, True, False, False, False, False]]


CAUSAL = SYSTEMS["pr1333"].replace(slot_steps=4, slot_lr=0.05)
SLOTS = {
    "delta": CAUSAL,
    "delta before the norm, half-life": CAUSAL.replace(slot_norm="before", slot_half_life=16.0),
    "bias, half-life": CAUSAL.replace(slot_parameters="bias", slot_lr=0.1, slot_half_life=16.0),
    "both": CAUSAL.replace(slot_parameters="both"),
    "normalised over the batch": CAUSAL.replace(slot_normalize="batch"),
    "L-BFGS": CAUSAL.replace(slot_optimizer="lbfgs", slot_steps=1, slot_max_iter=3, slot_lr=1.0),
}


def slot_nll(model, tokens, cfg, batch_windows):
    """nll of every target of the stream, in order, scored in batches of `batch_windows`."""
    windows = make_windows(len(tokens) - 1, 64, 16)
    pieces = []
    for i in range(0, len(windows), batch_windows):
        batch = windows[i : i + batch_windows]
        pieces.append(score_batch(Slot(cfg), model, *gather_batch(tokens, batch, 64), batch))
    return torch.cat(pieces)


@pytest.mark.parametrize("slot", SLOTS)
def test_slot_is_strictly_causal_over_the_stream(published, text, slot):
    """Flip one token of the stream: the scores of all targets before it keep their bits; later ones do move."""
    model = trained_model("pr1333", published, dtype=torch.float32)
    tokens = text[0][:401]
    before = slot_nll(model, tokens, SLOTS[slot], 8)
    for flip in (1, 40, 64, 65, 150, 200, 333, 399, 400):  # first window, its edge, batches, the last target
        changed = tokens.clone()
        changed[flip] = 4 + (changed[flip] + 7) % 400
        after = slot_nll(model, changed, SLOTS[slot], 8)
        earlier = flip - 1  # target t is token t + 1
        assert torch.equal(before[:earlier], after[:earlier]), f"token {flip} changed a score before it"
        assert not torch.equal(before[earlier:], after[earlier:])


@pytest.mark.parametrize("slot", SLOTS)
def test_slot_fits_change_scores_but_not_those_of_the_first_window(published, text, slot):
    model = trained_model("pr1333", published, dtype=torch.float32)
    tokens = text[0][:401]
    frozen = SLOTS[slot].replace(slot_steps=0)
    plain, fitted = slot_nll(model, tokens, frozen, 8), slot_nll(model, tokens, SLOTS[slot], 8)
    assert torch.equal(plain[:64], fitted[:64])
    assert not torch.equal(plain[64:], fitted[64:])


def test_context_weights_end_before_the_first_scored_target():
    weights = objective_weights(Config(slot_half_life=2.0), [Window(0, 8, 0), Window(16, 8, 4)], 8)
    assert weights[0].tolist() == [0.0] * 8
    np.testing.assert_allclose(weights[1], [0.25, 0.5**1.5, 0.5, 0.5**0.5, 0, 0, 0, 0], rtol=1e-6)
