"""SLOT's cache: against its formula token by token in float64, and what it must and must not do."""

import math

import pytest
import torch
from scoring_samples import ONE_RANK, load, no_bytes, trained_model

from pgolf.config import Config
from pgolf.errors import InputError
from pgolf.evaluate import score_method
from pgolf.scoring.slot_cache import cached_log_probs, capped_log_probs

SOFTCAP = 30.0


def make(num_rows=5, num_context=40, width=24, vocab=50, dtype=torch.float64):
    rows, context = torch.randn(num_rows, width, dtype=dtype), torch.randn(num_context, width, dtype=dtype)
    context[3] = rows[0]  # one that is exactly alike
    return rows, context, torch.randint(vocab, (num_context,)), torch.randn(vocab, width, dtype=dtype)


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
    found = cached_log_probs(rows, context, targets, weight, SOFTCAP, cfg)
    assert (found - exact).abs().max() < 1e-12
    single = cached_log_probs(rows.float(), context.float(), targets, weight.float(), SOFTCAP, cfg)
    assert (single - exact).abs().max() < 1e-4 * exact.abs().max()
    assert torch.allclose(found.exp().sum(1), torch.ones(len(rows), dtype=torch.float64), atol=1e-12)


def test_what_came_more_often_than_expected_gains():
    """A context of one hidden state: its target gains, the more the more often, and the tokens beside it lose."""
    cfg, (rows, context, _, weight) = Config(), make()
    alike, plain = (
        rows[:1].expand(8, -1) + 0.01 * torch.randn(8, rows.shape[1]),
        capped_log_probs(rows[:1] @ weight.T, SOFTCAP),
    )
    before, gains = torch.cat([context, alike]), []
    for times in (1, 4, 8):
        targets = torch.zeros(len(before), dtype=torch.int64)
        targets[-times:] = 7
        log_probs = cached_log_probs(rows[:1], before, targets, weight, SOFTCAP, cfg)
        gains.append((log_probs - plain)[0, 7].item())
    assert 0 < gains[0] < gains[1] < gains[2]


def test_the_mean_alone_and_a_great_prior_change_nothing():
    """A row at the mean is like no direction, but every number stays finite; with a great prior nothing is learnt."""
    rows, context, targets, weight = make(dtype=torch.float32)
    context, rows = context[:1].expand(9, -1), context[:1].expand(2, -1)
    found = cached_log_probs(rows, context, targets[:9], weight, SOFTCAP, Config())
    assert torch.isfinite(found).all()
    calm = cached_log_probs(rows, context, targets[:9], weight, SOFTCAP, Config(slot_cache_prior=1e9))
    assert torch.allclose(calm, capped_log_probs(rows @ weight.T, SOFTCAP), atol=1e-5)


def test_text_that_repeats_itself_costs_less():
    """Forty tokens at random, over and over: a model that knows nothing of them learns them from its context."""
    model = trained_model("pr1217", load("sliding_pr1217"), dtype=torch.float32)
    tokens = torch.randint(0, 420, (40,), generator=torch.Generator().manual_seed(0)).repeat(8)
    cfg = Config(eval_seq_len=128, train_seq_len=128, train_batch_tokens=128, eval_stride=16)
    losses = {m: score_method(m, cfg, model, tokens, no_bytes(420), ONE_RANK).val_loss for m in ("sliding", "slot")}
    assert losses["slot"] < losses["sliding"] - 0.1, losses


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"slot_share": "frontier"}, "slot_share must be 'window', got 'frontier'"),
        ({"slot_share": "scored"}, "slot_share must be 'window', got 'scored'"),
        ({"slot_cache_prior": 0.0}, "slot_cache_prior must be > 0, got 0.0"),
        ({"slot_cache_sharpness": -1.0}, "slot_cache_sharpness must be at least 0, got -1.0"),
        ({"slot_buckets": 8}, "slot_parameters must be 'delta', got 'cache'"),
    ],
)
def test_bad_settings(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        Config(slot_parameters="cache", **fields)
