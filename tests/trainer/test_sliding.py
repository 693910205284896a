"""Sliding windows against the published loops: windows, every position's nll, counts, bytes and bits per byte."""

import numpy as np
import pytest
import torch
from numerics import DEVICES
from scoring_samples import ONE_RANK, SYSTEMS, load, trained_model, validation_text

from pgolf.distributed import Ranks
from pgolf.evaluate import score_method
from pgolf.scoring.published import PUBLISHED
from pgolf.scoring.stream import cut_slices, score_stream
from pgolf.scoring.windows import gather_batch, make_windows

RULE_OF = {"pr1217": "legacy", "pr675": "legacy", "pr1333": "exact"}
PLAIN = {"seq_len": 64, "stride": 64, "batch_windows": 5}
# How the golden SLOT scores were made: batches of 16, of 32 for #1333, on one rank.
SLOT_BATCH = {"pr1217": 16, "pr675": 16, "pr1333": 32}


@pytest.fixture(scope="module")
def text():
    return validation_text()


@pytest.fixture(scope="module")
def arrays() -> dict[str, dict[str, np.ndarray]]:
    return {system: load(f"sliding_{system}") for system in RULE_OF}


@pytest.mark.parametrize("system", RULE_OF)
def test_windows_and_the_nll_of_every_position(system, arrays, text):
    golden, tokens = arrays[system], text[0]
    windows = make_windows(len(tokens) - 1, 64, 16, RULE_OF[system])
    assert [w.start for w in windows] == golden["window_start"].tolist()
    assert [w.length for w in windows] == golden["window_len"].tolist()
    assert [w.score_from for w in windows] == golden["scored_start"].tolist()
    x, y, scored = gather_batch(tokens, windows, 64)
    inside = torch.arange(64) < torch.tensor([w.length for w in windows])[:, None]
    nll = trained_model(system, golden)(x, y, reduction="none").view(x.shape)
    np.testing.assert_allclose(nll[inside], golden["nll"][inside.numpy()], atol=4e-5)
    assert scored.sum() == golden["token_count"]
    assert len({w.start + p for w in windows for p in range(w.score_from, w.length)}) == len(tokens) - 1
    if "scored_bytes" in golden:
        assert text[1].count_bytes(y[scored], x[scored]).tolist() == golden["scored_bytes"].tolist()
    sums = [nll[torch.tensor(part)][scored[part]] for part in cut_slices(list(range(len(windows))), 3, False)]
    losses = [part.mean().item() for part in sums]
    np.testing.assert_allclose(losses, golden["sliding_rank_of_3"][:, 0], rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("system", RULE_OF)
def test_sliding_and_plain_scores(system, device, arrays, text):
    golden, ranks = arrays[system], Ranks(0, 1, torch.device(device))
    model = trained_model(system, golden).to(device)
    cfg = SYSTEMS[system].replace(eval_windows=RULE_OF[system])
    sliding = score_method("sliding", cfg, model, *text, ranks)
    assert (sliding.tokens, sliding.bytes) == (golden["token_count"], golden["byte_count"])
    np.testing.assert_allclose(sliding.val_loss, golden["sliding_val_loss"], rtol=1e-6)
    np.testing.assert_allclose(sliding.val_bpb, golden["sliding_val_bpb"], rtol=1e-6)
    plain = score_method("plain", cfg, model, *text, ranks)
    np.testing.assert_allclose(plain.val_loss, golden["eval_val_val_loss"], rtol=1e-6)
    np.testing.assert_allclose(plain.val_bpb, golden["eval_val_val_bpb"], rtol=1e-6)


@pytest.mark.parametrize("system", RULE_OF)
def test_slot_on_real_hidden_states(system, arrays, text):
    golden = arrays[system]
    fields = PUBLISHED[system] | {"eval_stride": 16, "eval_slices": 1, "eval_batch_windows": SLOT_BATCH[system]}
    score = score_method("slot", SYSTEMS[system].replace(**fields), trained_model(system, golden), *text, ONE_RANK)
    # The original's float64 run has a smaller eps in its norms; a line search magnifies the difference.
    exact, rtol = ("_f64", 1e-5) if system == "pr675" else ("", 1e-6)
    np.testing.assert_allclose(score.val_loss, golden["slot_val_loss" + exact], rtol=rtol)
    np.testing.assert_allclose(score.val_bpb, golden["slot_val_bpb" + exact], rtol=rtol)
    print("MEASURE", system, score.val_loss / golden["slot_val_loss" + exact] - 1)


def test_every_system_has_its_rule():
    assert {name: PUBLISHED[name]["eval_windows"] for name in RULE_OF} == RULE_OF
    assert PUBLISHED["pr1333"]["slot_windows"] == "legacy"


@pytest.mark.parametrize(
    ("num_targets", "stride", "windows", "counted"),
    [(62_021_632, 64, 969_088, 62_023_616), (62_021_632, 96, 646_059, 62_023_584), (45_508_608, 64, 711_072, None)],
)
def test_legacy_counts_of_the_challenge(num_targets, stride, windows, counted):
    """The rule in closed form at full size, and as windows on the last part of the stream."""
    assert len(range(0, num_targets, stride)) == windows
    tail = num_targets - stride * (windows - 200)
    listed = make_windows(tail, 2048, stride, "legacy")
    assert len(listed) == 200
    scored = sum(w.length - w.score_from for w in listed)
    if counted is not None:
        assert num_targets - tail + scored == counted


def test_short_windows_of_the_end():
    """97 targets, windows of 64 by 32: the last start has one target left."""
    legacy = [(w.start, w.length, w.score_from) for w in make_windows(97, 64, 32, "legacy")]
    assert legacy == [(0, 64, 0), (32, 64, 32), (64, 33, 1), (96, 1, 0)]
    full = [(w.start, w.length, w.score_from) for w in make_windows(97, 64, 32, "legacy-full")]
    assert full == legacy[:3]
    assert [w.start for w in make_windows(5, 64, 32, "legacy-full")] == [0]


@pytest.mark.parametrize(
    "fields", [{}, {"slot_share": "shared-context", "slot_warm_start": True}], ids=["own", "carried"]
)
@pytest.mark.parametrize("slices", [1, 4])
def test_any_number_of_ranks_scores_the_same_bits(slices, fields, arrays, text):
    """Three ranks one after another, the last of which hears what the others found."""
    model = trained_model("pr1217", arrays["pr1217"], dtype=torch.float32)
    cfg = SYSTEMS["pr1217"].replace(eval_slices=slices, eval_batch_windows=7, eval_windows="legacy", **fields)
    found: dict[int, list] = {}

    class Later(Ranks):
        def gather(self, value):
            found[self.rank] = value
            return [found.get(r, [[] for _ in value]) for r in range(self.world_size)]

    def score(rank, world_size):
        seen = []
        place = Later(rank, world_size, torch.device("cpu"))
        result = score_method("slot", cfg, model, *text, place, on_nll=lambda w, nll: seen.append(w[0].start))
        return result, seen

    whole, starts = score(0, 1)
    if fields:
        cold = score_method("slot", cfg.replace(slot_warm_start=False), model, *text, ONE_RANK)
        assert cold.val_loss != whole.val_loss, "nothing was carried from batch to batch"
    found.clear()
    ranks = [score(rank, 3) for rank in (2, 0, 1)]
    last = ranks[-1][0]
    assert (last.val_loss, last.val_bpb, last.tokens, last.bytes) == (
        whole.val_loss,
        whole.val_bpb,
        whole.tokens,
        whole.bytes,
    )
    assert sorted(start for _, seen in ranks for start in seen) == sorted(starts)
    assert all(seen for _, seen in ranks) or (fields and slices == 1), "a rank had nothing to do"


def test_progress_counts_this_ranks_batches(arrays, text):
    calls = []
    score_stream(
        trained_model("pr1217", arrays["pr1217"]),
        *text,
        ONE_RANK,
        **PLAIN,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(i, 5) for i in range(1, 6)]
