"""Score-first test-time training against the published loop: every score, loss, rate, norm and weight."""

import math

import numpy as np
import pytest
import torch
from scoring_samples import ONE_RANK, SYSTEMS, flip_changes, load, trained_model, validation_text

from pgolf.errors import InputError
from pgolf.evaluate import score_method
from pgolf.scoring.published import PUBLISHED
from pgolf.scoring.stream import score_stream
from pgolf.scoring.ttt import ScoreFirst

# The tiny run: chunks of 4 sequences, two steps an epoch, two epochs, the first block frozen.
TINY_TTT = {"ttt_chunk_tokens": 256, "ttt_epochs": 2, "ttt_batch_seqs": 2, "ttt_lr": 0.02, "ttt_freeze_blocks": 1}
CFG = SYSTEMS["pr549"].replace(eval_windows="legacy-full", **TINY_TTT)
ONE_SLICE = {"eval_slices": 1, "eval_stride": 16, "eval_batch_windows": 16}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load("ttt_pr549")


@pytest.fixture(scope="module")
def text():
    return validation_text()


def run(cfg, model, text, **callbacks):
    learner = ScoreFirst(cfg)
    score = score_stream(
        model,
        *text,
        ONE_RANK,
        seq_len=cfg.eval_seq_len,
        stride=cfg.eval_stride,
        batch_windows=cfg.eval_batch_windows,
        rule=cfg.eval_windows,
        slices=cfg.eval_slices,
        learner=learner,
        **callbacks,
    )
    return score, learner


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_steps_and_weights_are_the_published_ones(golden, text, dtype):
    model = trained_model("pr549", golden, "w0:", dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen, pieces = [], []
    score, learner = run(CFG, model, text, on_nll=lambda w, nll: (seen.extend(w), pieces.append(nll)))
    assert [w.start for w in seen] == golden["windows"].tolist()
    assert [w.length for w in seen] == golden["window_len"].tolist()
    assert [w.score_from for w in seen] == golden["scored_start"].tolist()
    mask = np.arange(64) < golden["window_len"][:, None]
    mask &= np.arange(64) >= golden["scored_start"][:, None]
    nll = torch.cat(pieces).double()
    np.testing.assert_allclose(nll, golden["nll"][mask], atol=1.9e-4)
    chunk_of = np.repeat(golden["window_chunk"], mask.sum(1))
    sums = [[nll[torch.from_numpy(chunk_of == c)].sum().item(), (chunk_of == c).sum()] for c in range(6)]
    np.testing.assert_allclose(sums, golden["chunk_nll_sum_and_count"], rtol=2e-6)
    np.testing.assert_allclose(score.val_loss, golden["val_loss"], rtol=1e-6)
    np.testing.assert_allclose(score.val_bpb, golden["val_bpb"], rtol=1e-6)

    columns = {name: [getattr(step, name) for step in learner.steps] for name in ("chunk", "lr", "loss", "grad_norm")}
    assert columns["chunk"] == golden["train_chunk"].tolist()
    np.testing.assert_allclose(columns["lr"], golden["train_lr"], rtol=1e-12)
    np.testing.assert_allclose(columns["loss"], golden["train_loss"], rtol=1e-5)
    np.testing.assert_allclose(columns["grad_norm"], golden["train_gradnorm_after_clip"], rtol=1e-5)
    after = learner.model.state_dict()
    checked = 0
    for name, value in golden.items():
        if name.startswith("w1:"):
            np.testing.assert_allclose(after[name[3:]].numpy(), value, atol=1e-5, err_msg=name)
            checked += 1
        if name.startswith("drift:"):
            drift = (after[name[6:]] - before[name[6:]]).norm().item()
            np.testing.assert_allclose(drift, value[-1], rtol=1e-4, atol=1e-7, err_msg=name)
    assert checked == len(after)
    frozen = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert frozen >= {name for name in after if name.startswith("blocks.0.")}
    assert not frozen & {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}, "only small tensors are frozen"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_with_slot_as_1128_and_without_any(golden, text):
    model = trained_model("pr549", golden, "w0:")
    cfg = SYSTEMS["pr549"].replace(**(PUBLISHED["pr1128"] | TINY_TTT | ONE_SLICE))
    for method, want in (("slot+ttt", "slot_ttt_1128_val"), ("ttt", "ttt_1128_val")):
        score = score_method(method, cfg, model, *text, ONE_RANK)
        np.testing.assert_allclose([score.val_loss, score.val_bpb], golden[want], rtol=1e-6)
    score = score_method("ttt", cfg.replace(ttt_epochs=0), model, *text, ONE_RANK)
    np.testing.assert_allclose([score.val_loss, score.val_bpb], golden["no_ttt_val"], rtol=1e-6)


@pytest.mark.parametrize("rule", ["exact", "legacy", "legacy-full"])
def test_no_score_depends_on_a_later_token(golden, text, rule):
    """Bitwise, in the first window, at chunk edges and at the end; and later scores do depend on the training."""
    model = trained_model("pr549", golden, "w0:", torch.float32)
    cfg, tokens = CFG.replace(eval_windows=rule, ttt_epochs=1), text[0][:601]
    targets = []

    def score(stream):
        pieces, targets[:] = [], []

        def keep(windows, nll):
            pieces.append(nll)
            targets.extend(w.start + p + 1 for w in windows for p in range(w.score_from, w.length))

        run(cfg, model, (stream, text[1]), on_nll=keep)
        return torch.cat(pieces)

    score(tokens)
    changes = flip_changes(score, tokens, torch.tensor(targets), [1, 256, 257, 512, 600], 420)
    assert (changes[~changes.isnan()] == 0).all()
    plain = score_method("sliding", cfg, model, tokens, text[1], ONE_RANK)
    assert run(cfg, model, (tokens, text[1]))[0].val_loss != plain.val_loss


def test_slices_split_the_batch_and_average(golden, text):
    """Two slices of two sequences are one step on four; three slices leave parts of unequal size."""
    model = trained_model("pr549", golden, "w0:")
    whole, one = run(CFG.replace(ttt_batch_seqs=4), model, text)
    split, two = run(CFG.replace(eval_slices=2), model, text)
    assert len(one.steps) == len(two.steps) == 10
    np.testing.assert_allclose([s.loss for s in two.steps], [s.loss for s in one.steps], rtol=1e-12)
    np.testing.assert_allclose(split.val_loss, whole.val_loss, rtol=1e-10)
    _, three = run(CFG.replace(eval_slices=3, ttt_batch_seqs=1), model, text)
    assert len(three.steps) == 5 * 2 * 2 and all(math.isfinite(s.loss) for s in three.steps)


def test_a_focus_on_hard_tokens_trains_elsewhere(golden, text):
    """gamma 0 is the plain loss; at gamma 2 the loss of the first step is the weighted one of the same scores."""
    model = trained_model("pr549", golden, "w0:")
    _, plain = run(CFG.replace(ttt_epochs=1), model, text)
    _, focal = run(CFG.replace(ttt_epochs=1, ttt_focal_gamma=2.0), model, text)
    rows = torch.stack([text[0][i * 64 : i * 64 + 65] for i in range(2)])
    nll = model(rows[:, :-1], rows[:, 1:], reduction="none")
    np.testing.assert_allclose(plain.steps[0].loss, nll.mean().item(), rtol=1e-12)
    np.testing.assert_allclose(focal.steps[0].loss, ((1 - torch.exp(-nll)) ** 2 * nll).mean().item(), rtol=1e-9)


def test_a_chunk_holds_a_sequence_at_least():
    with pytest.raises(InputError, match="ttt_chunk_tokens must be at least eval_seq_len 64, got 63"):
        ScoreFirst(CFG.replace(ttt_chunk_tokens=63))
    learner = ScoreFirst(SYSTEMS["pr549"].replace(ttt_chunk_tokens=32768))
    assert len(learner.split([], 62_021_632)) == 1893
