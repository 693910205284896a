"""T9's stream: drawn at temperature 1 from the rows that score it, whatever the draft guessed."""

import pytest
import torch
from scoring_samples import ONE_RANK

from pgolf.audit import sampling
from pgolf.audit.controls import TINY, tiny_bytes, tiny_model
from pgolf.evaluate import score_method
from pgolf.scoring.windows import make_windows


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def sample(model, count, seed=3):
    return sampling.sample_stream(model, TINY, 1, count, torch.Generator().manual_seed(seed))


def test_each_token_is_where_its_number_falls_in_the_row_that_scores_it(model):
    """By the definition: one forward of the scoring window per token, inverse of the cumulated probabilities."""
    count = 75
    tokens, log_p = sample(model, count)
    assert tokens[0] == 1 and tokens.shape == (count + 1,)
    uniform = 1 - torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for w in make_windows(count, TINY.eval_seq_len, TINY.eval_stride):
        for p in range(w.score_from, w.length):
            inputs = torch.zeros(1, TINY.eval_seq_len, dtype=torch.int64)
            inputs[0, : p + 1] = tokens[w.start : w.start + p + 1]
            probabilities = model.logits(inputs)[0, p].double().softmax(-1)
            target, cumulated = w.start + p, probabilities.cumsum(0)
            token = int((cumulated < uniform[target] * cumulated[-1]).sum())
            assert tokens[target + 1] == token
            assert log_p[target].item() == pytest.approx(probabilities[token].log().item(), abs=1e-12)


def test_plain_sliding_scores_what_was_drawn(model):
    tokens, log_p = sample(model, 150)
    pieces = []
    score_method("sliding", TINY, model, tokens, tiny_bytes(), ONE_RANK, on_nll=lambda w, nll: pieces.append(nll))
    torch.testing.assert_close(torch.cat(pieces).double(), -log_p, rtol=0, atol=1e-5)


def test_a_bad_draft_costs_time_but_changes_no_token(model, monkeypatch):
    want, calls = sample(model, 60), []
    forward = sampling._logits
    monkeypatch.setattr(sampling, "_logits", lambda *args: (calls.append(1), forward(*args))[1])
    assert torch.equal(sample(model, 60)[0], want[0])
    num_windows = len(make_windows(60, TINY.eval_seq_len, TINY.eval_stride))
    assert len(calls) == num_windows, "the cache's draft is right at first"
    monkeypatch.setattr(sampling, "_draft", lambda model, tokens, uniform, *place: None)
    tokens, log_p = sample(model, 60)
    assert torch.equal(tokens, want[0]) and torch.equal(log_p, want[1])
    assert len(calls) > 3 * num_windows
