"""The strictly causal forms of SLOT: no flipped token changes an earlier score, no batch or rank changes any."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from scoring_samples import ONE_RANK, SYSTEMS, ThreeTokenModel, flip_changes, load, no_bytes, trained_model

from pgolf.config import Config
from pgolf.distributed import Ranks
from pgolf.evaluate import score_method
from pgolf.scoring.objective import objective_weights, standing
from pgolf.scoring.stream import plan_batches
from pgolf.scoring.windows import Window, make_windows

FLIPS = load("flip_stream")
TOKENS = torch.from_numpy(FLIPS["tokens"]).long()  # 385, of a vocabulary of 64
# Windows of 64 with stride 16 over 377 targets: the last window scores 9; batches of 4, so six of them, the last short.
BASE = Config(
    eval_seq_len=64,
    train_seq_len=64,
    train_batch_tokens=64,
    eval_stride=16,
    eval_batch_windows=4,
    slot_parameters="bias",
)
LBFGS = {"slot_optimizer": "lbfgs", "slot_lr": 1.0, "slot_max_iter": 4, "slot_steps": 1}
DELTA = {"slot_parameters": "delta", "slot_lr": 0.1}
CAUSAL = {
    "cache carried": {"slot_parameters": "cache", "slot_share": "carried", "slot_cache_tokens": 100},
    "cache": {"slot_parameters": "cache"},
    "cache of the newest": {"slot_parameters": "cache", "slot_focal_tokens": 30, "slot_cache_sharpness": 2.0},
    "window": {},
    "window lbfgs": LBFGS,
    "window both, weighted": {"slot_parameters": "both", "slot_half_life": 20.0},
    "window warm": {"slot_warm_start": True},
    "frontier": {"slot_share": "frontier"},
    "frontier lbfgs": {"slot_share": "frontier"} | LBFGS,
    "frontier warm": {"slot_share": "frontier", "slot_warm_start": True, "slot_normalize": "batch"},
    "frontier hypergradient": {"slot_share": "frontier", "slot_optimizer": "hypergradient", "slot_lr_max": 0.5},
    "frontier logits": {"slot_share": "frontier", "slot_parameters": "logits"},
    "carried": {"slot_share": "carried"},
    "carried delta before the norm": {"slot_share": "carried", "slot_norm": "before"} | DELTA,
    "carried lbfgs": {"slot_share": "carried"} | LBFGS,
    "carried logits": {"slot_share": "carried", "slot_parameters": "logits"},
}
DEALS = {
    "one slice": {},
    "two slices": {"eval_slices": 2},
    "interleaved": {"eval_slices": 2, "eval_interleave": True},
}
# In the first window, at borders of windows, batches and slices, in the middle of each, and the very last token.
FLIPPED = [1, 64, 65, 114, 150, 178, 209, 300, 369, 377]  # 112 and 176 are the first that a batch scores


def score(cfg: Config, tokens: torch.Tensor, model=None, ranks: Ranks = ONE_RANK) -> torch.Tensor:
    """The nll of every target in the order of the stream: [N]."""
    nll = torch.full((len(tokens) - 1,), torch.nan, dtype=torch.float64)

    def keep(windows: list[Window], scores: torch.Tensor) -> None:
        at = torch.cat([torch.arange(w.start + w.score_from, w.start + w.length) for w in windows])
        assert nll[at].isnan().all(), "a target was scored twice"
        nll[at] = scores.double()

    model = model or ThreeTokenModel(FLIPS, torch.float32)
    score_method("slot", cfg, model, tokens, no_bytes(420), ranks, on_nll=keep)
    return nll


@pytest.mark.parametrize("deal", DEALS)
@pytest.mark.parametrize("form", CAUSAL)
def test_no_score_depends_on_a_later_token(form, deal):
    """Bitwise, over the whole stream, and the fit does something: later scores follow the flip beyond its window."""
    cfg, tokens = BASE.replace(**CAUSAL[form], **DEALS[deal]), TOKENS[:378]
    assert standing(cfg, "slot").causal
    plain, adapted = score(cfg.replace(slot_steps=0, slot_cache_prior=1e9), tokens), score(cfg, tokens)
    assert not adapted.isnan().any()
    assert (plain - adapted)[-16:].abs().max() > 1e-3, "no fit reached the last batch"
    changes = flip_changes(functools.partial(score, cfg), tokens, torch.arange(1, 378), FLIPPED, 64)
    earlier = changes[~changes.isnan()]
    assert len(earlier) == sum(flip - 1 for flip in FLIPPED)
    assert (earlier == 0).all(), f"{(earlier != 0).sum()} earlier scores changed, by up to {earlier.abs().max():.1e}"


@pytest.mark.parametrize("deal", DEALS)
@pytest.mark.parametrize("share", ["window", "frontier"])
def test_no_fit_sees_a_target_that_it_scores(share, deal):
    """A flip changes the flipped token's own score anyway, so it cannot tell whether the fit saw that target too."""
    cfg, fitted = BASE.replace(slot_share=share, **DEALS[deal]), 0
    slices = plan_batches(make_windows(377, 64, 16), 4, cfg.eval_slices, cfg.eval_interleave)
    for batch in (batch for part in slices for batch in part):
        first_scored = [w.start + w.score_from for w in batch]
        if share == "frontier":
            first_scored = [min(first_scored)] * len(batch)
        for w, weights, first in zip(batch, objective_weights(cfg, batch, 64), first_scored, strict=True):
            seen = (weights > 0).nonzero()[:, 0] + w.start
            assert (seen < first).all() and (seen < w.start + w.length).all()
            fitted += len(seen)
    assert fitted > 0


def test_what_is_carried_may_not_be_scored_again():
    for fields in ({"eval_windows": "legacy"}, {"slot_windows": "legacy-full"}):
        cfg = BASE.replace(slot_share="carried", **fields)
        assert not standing(cfg, "slot").causal and "again" in standing(cfg, "slot").reason
        assert standing(cfg.replace(slot_share="frontier"), "slot").causal


@dataclass(frozen=True)
class ThreadRank(Ranks):
    """One of two ranks that are threads of this process."""

    meeting: threading.Barrier = None
    values: dict = None

    def gather(self, value: object) -> list:
        self.values[self.rank] = value
        self.meeting.wait(timeout=60)
        gathered = [self.values[rank] for rank in range(2)]
        self.meeting.wait(timeout=60)
        return gathered


@pytest.mark.parametrize("form", CAUSAL)
def test_two_ranks_score_the_same_bits(form):
    """Every rank scores its share of the batches, or of the slices where state goes from batch to batch."""
    cfg, tokens = BASE.replace(**CAUSAL[form], eval_slices=2), TOKENS[:378]
    common = {"meeting": threading.Barrier(2), "values": {}}
    ranks = [ThreadRank(rank, 2, torch.device("cpu"), **common) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda rank: score(cfg, tokens, ranks=rank), ranks))
    assert all(0 < part.isnan().sum() < len(part) for part in parts)
    assert torch.equal(torch.where(parts[0].isnan(), parts[1], parts[0]), score(cfg, tokens))


@pytest.mark.parametrize("form", ["cache", "window", "window lbfgs", "window both, weighted"])
def test_a_windows_scores_do_not_depend_on_its_batch(form):
    """One window per batch, five, and all: the bits of a real model's scores are the same."""
    cfg = SYSTEMS["pr1217"].replace(**{k: v for k, v in vars(BASE).items() if k.startswith("slot_")} | CAUSAL[form])
    model = trained_model("pr1217", load("sliding_pr1217"), dtype=torch.float32)
    tokens = torch.randint(0, 420, (200,), generator=torch.Generator().manual_seed(0))
    alone, five, whole = (score(cfg.replace(eval_batch_windows=n), tokens, model) for n in (1, 5, 32))
    assert torch.equal(alone, five) and torch.equal(alone, whole)
