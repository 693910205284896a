"""SLOT's cache: against its formula token by token in float64, and what it must and must not do."""

import math

import pytest
import torch
import torch.nn.functional as F
from scoring_samples import ONE_RANK, load, no_bytes, trained_model

from pgolf.config import Config
from pgolf.errors import InputError
from pgolf.evaluate import score_method
from pgolf.scoring.slot_cache import log_probs_of, remember
from pgolf.scoring.windows import make_windows

SOFTCAP = 30.0


def make(num_rows=5, num_context=40, width=24, vocab=50, dtype=torch.float64):
    rows, context = torch.randn(num_rows, width, dtype=dtype), torch.randn(num_context, width, dtype=dtype)
    context[3] = rows[0]  # one that is exactly alike
    return rows, context, torch.randint(vocab, (num_context,)), torch.randn(vocab, width, dtype=dtype)


def cached(rows, context, targets, weight, cfg):
    return log_probs_of(rows, weight, SOFTCAP, remember(context, targets, weight, SOFTCAP), cfg)


def by_formula(rows, context, targets, weight, cfg):
    """The formula of slot_cache.py, one number at a time."""
    mean = context.sum(0) / len(context)
    out = []
    for h in rows:
        seen = torch.full((len(weight),), cfg.slot_cache_prior, dtype=torch.float64)
        expected = seen.clone()
        for g, y in zip(context, targets, strict=True):
            a, b = h - mean, g - mean
            k = math.exp(cfg.slot_cache_sharpness * ((a @ b / (a.norm() * b.norm())).item() - 1))
            seen[y] += k
            expected += k * torch.softmax(SOFTCAP * torch.tanh(weight @ g / SOFTCAP), 0)
        out.append(torch.log_softmax(SOFTCAP * torch.tanh((weight @ h + torch.log(seen / expected)) / SOFTCAP), 0))
    return torch.stack(out)


@pytest.mark.parametrize(
    "fields", [{}, {"slot_cache_sharpness": 0.0}, {"slot_cache_sharpness": 40.0, "slot_cache_prior": 1e-3}]
)
def test_the_formula(fields):
    cfg, problem = Config(**fields), make()
    exact = by_formula(*problem, cfg)
    rows, context, targets, weight = problem
    found = cached(rows, context, targets, weight, cfg)
    assert (found - exact).abs().max() < 1e-12
    single = cached(rows.float(), context.float(), targets, weight.float(), cfg)
    assert (single - exact).abs().max() < 1e-4 * exact.abs().max()
    assert torch.allclose(found.exp().sum(1), torch.ones(len(rows), dtype=torch.float64), atol=1e-12)


def test_what_came_more_often_than_expected_gains():
    """A context of one hidden state: its target gains, the more the more often, and the tokens beside it lose."""
    cfg, (rows, context, _, weight) = Config(), make()
    alike, plain = (
        rows[:1].expand(8, -1) + 0.01 * torch.randn(8, rows.shape[1]),
        log_probs_of(rows[:1], weight, SOFTCAP, None, cfg),
    )
    before, gains = torch.cat([context, alike]), []
    for times in (1, 4, 8):
        targets = torch.zeros(len(before), dtype=torch.int64)
        targets[-times:] = 7
        log_probs = cached(rows[:1], before, targets, weight, cfg)
        gains.append((log_probs - plain)[0, 7].item())
    assert 0 < gains[0] < gains[1] < gains[2]


def test_the_mean_alone_and_a_great_prior_change_nothing():
    """A row at the mean is like no direction, but every number stays finite; with a great prior nothing is learnt."""
    rows, context, targets, weight = make(dtype=torch.float32)
    context, rows = context[:1].expand(9, -1), context[:1].expand(2, -1)
    found = cached(rows, context, targets[:9], weight, Config())
    assert torch.isfinite(found).all()
    calm = cached(rows, context, targets[:9], weight, Config(slot_cache_prior=1e9))
    assert torch.allclose(calm, log_probs_of(rows, weight, SOFTCAP, None, Config()), atol=1e-5)


def system(dtype):
    return trained_model("pr1217", load("sliding_pr1217"), dtype=dtype)


def test_text_that_repeats_itself_costs_less():
    """Forty tokens at random, over and over, are in every context; three hundred are in what is carried alone."""
    cfg = Config(eval_seq_len=128, train_seq_len=128, train_batch_tokens=128, eval_stride=16, eval_batch_windows=1)
    for period, helps in ((40, {"window", "carried"}), (300, {"carried"})):
        tokens = torch.randint(0, 420, (period,), generator=torch.Generator().manual_seed(0)).repeat(600 // period)
        nll = {"sliding": score_method("sliding", cfg, system(torch.float32), tokens, no_bytes(420), ONE_RANK).val_loss}
        for share in ("window", "carried"):
            of = cfg.replace(slot_share=share)
            nll[share] = score_method("slot", of, system(torch.float32), tokens, no_bytes(420), ONE_RANK).val_loss
        assert {share for share in ("window", "carried") if nll[share] < nll["sliding"] - 0.1} == helps, nll


@pytest.mark.parametrize(("focal", "half_life"), [(0, 256.0), (12, 256.0), (0, 0.1)])
def test_what_is_carried(focal, half_life):
    """Batches of three windows, by hand: before its own context a window knows the last 40 targets that are scored.

    A focus is on the context alone, and a half-life, however short, is of a fit: neither touches what is carried.
    """
    cfg = Config(
        eval_seq_len=32, train_seq_len=32, train_batch_tokens=32, eval_stride=8, eval_batch_windows=3,
        slot_share="carried", slot_cache_tokens=40, slot_focal_tokens=focal, slot_half_life=half_life,
    )  # fmt: skip
    model, tokens = system(torch.float64), torch.randint(0, 420, (150,), generator=torch.Generator().manual_seed(1))
    windows, found = make_windows(149, 32, 8), []
    score_method("slot", cfg, model, tokens, no_bytes(420), ONE_RANK, on_nll=lambda _, nll: found.extend(nll.tolist()))
    weight, wanted, scored = model.head_weight().double(), [], {}  # target -> its hidden state, once it is scored
    for first in range(0, len(windows), 3):
        new = {}
        for w in windows[first : first + 3]:
            x, y = tokens[w.start : w.start + w.length], tokens[w.start + 1 : w.start + w.length + 1]
            h = model.hidden(F.pad(x, (0, 32 - w.length))[None])[0, : w.length].detach().double()
            older = [t for t in range(max(w.start - 40, 0), w.start) if t in scored]
            own = slice(32 - focal if focal else 0, w.score_from)
            context = [*(scored[t] for t in older), *h[own]]
            known = torch.cat([tokens[[t + 1 for t in older]], y[own]])
            rows = h[w.score_from :]
            memory = remember(torch.stack(context), known, weight, model.cfg.logit_softcap) if context else None
            log_probs = log_probs_of(rows, weight, model.cfg.logit_softcap, memory, cfg)
            wanted += (-log_probs.gather(1, y[w.score_from :, None])[:, 0]).tolist()
            new |= {w.start + w.score_from + i: row for i, row in enumerate(rows)}
        scored |= new
    assert len(found) == len(wanted) == 149
    assert (torch.tensor(found) - torch.tensor(wanted)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"slot_share": "frontier"}, "slot_share must be 'window' or 'carried', got 'frontier'"),
        ({"slot_share": "scored"}, "slot_share must be 'window' or 'carried', got 'scored'"),
        ({"slot_cache_prior": 0.0}, "slot_cache_prior must be > 0, got 0.0"),
        ({"slot_cache_sharpness": -1.0}, "slot_cache_sharpness must be at least 0, got -1.0"),
        ({"slot_buckets": 8}, "slot_parameters must be 'delta', got 'cache'"),
    ],
)
def test_bad_settings(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        Config(slot_parameters="cache", **fields)
