"""The gate: what each kind of request may see, who has scored what, and that the real scorers go through it."""

import pytest
import torch
from scoring_samples import ONE_RANK, SYSTEMS, load, trained_model, validation_text

from pgolf.distributed import Ranks
from pgolf.evaluate import score_method
from pgolf.scoring import objective
from pgolf.scoring.gate import Coverage, LeakError, TokenGate
from pgolf.scoring.objective import SHARES
from pgolf.scoring.stream import Frozen, score_stream
from pgolf.scoring.ttt import ScoreFirst
from pgolf.scoring.windows import Window

STREAM = torch.arange(100, 121)  # 20 targets; target t is token 101 + t
WINDOWS = [Window(0, 8, 0), Window(4, 8, 4), Window(8, 8, 4)]  # score targets 0 to 7, 8 to 11, 12 to 15


def weights(*spans: tuple[int, int]) -> torch.Tensor:
    result = torch.zeros(len(spans), 8)
    for row, (first, end) in zip(result, spans, strict=True):
        row[first:end] = 0.5
    return result


def zeros(targets: torch.Tensor) -> torch.Tensor:
    return torch.zeros(int((targets > 0).sum()))


def test_a_batch_has_inputs_but_no_targets_until_they_are_scored():
    gate = TokenGate(STREAM)
    batch = gate.open(WINDOWS, 8)
    assert batch.inputs.tolist() == [[*range(100 + s, 108 + s)] for s in (0, 4, 8)]
    with pytest.raises(LeakError, match="must be scored before"):
        batch.charged()
    seen = []
    nll = gate.score(batch, lambda targets: (seen.append(targets), zeros(targets))[1])
    assert nll.shape == (16,)
    assert seen[0].tolist() == [[*range(101, 109)], [0] * 4 + [*range(109, 113)], [0] * 4 + [*range(113, 117)]]
    targets, inputs = batch.charged()
    assert targets.tolist() == [*range(101, 117)] and inputs.tolist() == [*range(100, 116)]


@pytest.mark.parametrize(
    ("spans", "shared", "leak"),
    [
        ([(0, 0), (0, 4), (0, 4)], False, None),  # each window's own context
        ([(0, 1), (0, 4), (0, 4)], False, "scores target 0 asked for target 0"),
        ([(0, 0), (0, 5), (0, 4)], False, "scores target 8 asked for target 8"),
        ([(0, 0), (0, 4), (2, 8)], False, "scores target 12 asked for target 15"),
        ([(0, 0), (0, 4), (0, 4)], True, "scores target 0 asked for target 11"),
    ],
)
def test_a_fit_sees_what_lies_before_all_that_it_scores(spans, shared, leak):
    gate = TokenGate(STREAM)
    batch, wanted = gate.open(WINDOWS, 8), weights(*spans)
    if leak:
        with pytest.raises(LeakError, match=leak):
            batch.to_fit(wanted, shared)
        gate.strict = False
    targets = batch.to_fit(wanted, shared)
    rows = torch.stack([STREAM[w.start + 1 : w.start + 9] for w in WINDOWS])
    assert torch.equal(targets, torch.where(wanted > 0, rows, 0))
    assert gate.num_violations == bool(leak) and len(gate.violations) == bool(leak)


def test_a_shared_fit_may_see_what_lies_before_the_whole_batch():
    gate = TokenGate(STREAM)
    first, second = gate.open(WINDOWS[:1], 8), gate.open(WINDOWS[1:], 8)
    gate.score(first, zeros)
    assert second.to_fit(weights((0, 4), (0, 0)), shared=True).sum() == sum(range(105, 109))
    with pytest.raises(LeakError, match="scores target 8 asked for target 8"):
        second.to_fit(weights((0, 4), (0, 1)), shared=True)
    gate.score(second, zeros)  # behind its scores all is open: what is learned serves later batches
    assert second.to_fit(weights((0, 8), (0, 8)), shared=True).min() > 0


def test_padding_behind_a_short_window_is_no_target():
    gate = TokenGate(STREAM)
    batch = gate.open([Window(16, 4, 2)], 8)
    wanted = torch.ones(1, 8)
    wanted[0, 2:4] = 0
    assert batch.to_fit(wanted).tolist() == [[117, 118, 0, 0, 0, 0, 0, 0]]


def test_learners_get_scored_targets_only():
    gate = TokenGate(STREAM)
    gate.score(gate.open(WINDOWS[:2], 8), zeros)
    assert gate.committed(2, 12).tolist() == [*range(102, 113)]
    with pytest.raises(LeakError, match="targets 2 to 12, which are not all scored"):
        gate.committed(2, 13)


def test_what_other_ranks_have_scored_counts_once_it_is_shared():
    gate = TokenGate(STREAM)
    gate.score(gate.open(WINDOWS[:1], 8), zeros)

    class Two(Ranks):
        def gather(self, value):
            return [value, [(8, 16)]]

    gate.share(Two(0, 2, torch.device("cpu")))
    assert len(gate.committed(0, 16)) == 17
    with pytest.raises(LeakError):
        gate.committed(0, 17)


def test_coverage_counts_what_is_missing_repeated_and_out_of_order():
    gate = TokenGate(STREAM)
    for window in (WINDOWS[0], WINDOWS[2]):
        gate.score(gate.open([window], 8), zeros)
    assert gate.coverage(ONE_RANK) == Coverage(8, 0, True)
    gate.score(gate.open(WINDOWS[1:2], 8), zeros)
    assert gate.coverage(ONE_RANK) == Coverage(4, 0, False)
    gate.score(gate.open([Window(12, 8, 2)], 8), zeros)
    assert gate.coverage(ONE_RANK) == Coverage(0, 2, False)

    class Two(Ranks):
        def gather(self, value):
            return [value, ([(18, 20)], 0, True)]

    assert gate.coverage(Two(0, 2, torch.device("cpu"))) == Coverage(0, 4, False)


@pytest.fixture(scope="module")
def model():
    return trained_model("pr1217", load("sliding_pr1217"), dtype=torch.float32)


@pytest.mark.parametrize("share", SHARES)
def test_every_share_that_leaks_is_stopped_by_the_gate(share, model, monkeypatch):
    """Called causal by mistake, a leaky form raises; left as it is, it runs and is noted."""
    cfg = SYSTEMS["pr1217"].replace(slot_share=share, slot_steps=1)
    tokens, byte_counts = validation_text()
    leak = SHARES[share].leak
    gate = TokenGate(tokens[:201], strict=False)
    score_method("slot", cfg, model, gate, byte_counts, ONE_RANK)
    assert bool(gate.violations) == bool(leak)
    monkeypatch.setitem(objective.SHARES, share, SHARES[share]._replace(leak=None))
    if leak:
        with pytest.raises(LeakError, match="its scores would depend on what they score"):
            score_method("slot", cfg, model, tokens[:201], byte_counts, ONE_RANK)
    else:
        score_method("slot", cfg, model, tokens[:201], byte_counts, ONE_RANK)


def test_training_ahead_of_the_scores_is_stopped(model):
    class Ahead(ScoreFirst):
        def train(self, chunk, gate, ranks):
            super().train(chunk + 1, gate, ranks)

    cfg = SYSTEMS["pr1217"].replace(ttt_chunk_tokens=64, ttt_epochs=1)
    tokens, byte_counts = validation_text()
    options = {"seq_len": 64, "stride": 16, "batch_windows": 16}
    with pytest.raises(LeakError, match="a learner asked for the targets 64 to 127"):
        score_stream(model, tokens[:401], byte_counts, ONE_RANK, learner=Ahead(cfg), **options)
    score_stream(model, tokens[:401], byte_counts, ONE_RANK, learner=ScoreFirst(cfg), **options)


def test_a_stream_that_is_not_covered_is_no_score(model):
    class Skipping(ScoreFirst):
        def split(self, windows, num_targets):
            return [windows[:-1]]

    tokens, byte_counts = validation_text()
    with pytest.raises(LeakError, match="every target must be scored once, got Coverage.num_missing=16"):
        score_stream(
            model,
            tokens[:401],
            byte_counts,
            ONE_RANK,
            seq_len=64,
            stride=16,
            batch_windows=16,
            scorer=Frozen(),
            learner=Skipping(SYSTEMS["pr1217"].replace(ttt_chunk_tokens=400)),
        )
