"""Scoring: every target once, with the published numbers, whatever the batches; SLOT sees no target that it scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import DEVICES

from pgolf.config import Config
from pgolf.data.byte_counts import ByteCounts
from pgolf.data.tokenizer import Tokenizer
from pgolf.distributed import Ranks
from pgolf.errors import InputError
from pgolf.model import GPT
from pgolf.scoring.slot import PerWindowSlot, context_weights
from pgolf.scoring.stream import score_stream
from pgolf.scoring.windows import Window, gather_batch, make_windows

GOLDEN = Path(__file__).parent.parent / "golden"
ONE_RANK = Ranks(0, 1, torch.device("cpu"))
PR1333 = Config(
    vocab_size=420,
    num_layers=4,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2.0,
    rope_dims=4,
    rope_train_len=64,
    qk_gain_init=1.5,
    xsa_last_n=4,
    smear_gate=False,
    skip_gates=True,
    ve_dim=12,
    ve_layers=(2, 3),
    recur_layers=(1, 2),
    parallel_start_layer=3,
    train_seq_len=64,
    train_batch_tokens=64,
    eval_seq_len=64,
    eval_stride=16,
)


@pytest.fixture(scope="module")
def tokenizer_arrays() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "tokenizer.npz"))


@pytest.fixture(scope="module")
def byte_counts(tokenizer_arrays) -> ByteCounts:
    return ByteCounts.from_tokenizer(Tokenizer(tokenizer_arrays["spm_model_proto"].tobytes()))


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "sliding_pr1333.npz"))


def trained_model(arrays, device="cpu", dtype=torch.float64) -> GPT:
    model = GPT(PR1333)
    model.load_export({k[2:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("w:")})
    model.activation_dtype = dtype
    return model.to(device, dtype).requires_grad_(False)


@pytest.mark.parametrize("device", DEVICES)
def test_sliding_and_plain_scores_are_the_published_ones(published, tokenizer_arrays, byte_counts, device):
    tokens = torch.from_numpy(tokenizer_arrays["val_tokens"]).long()
    ranks = Ranks(0, 1, torch.device(device))
    model = trained_model(published, device)
    sliding = score_stream(model, tokens, byte_counts, ranks, seq_len=64, stride=16, batch_windows=16)
    assert (sliding.tokens, sliding.bytes) == (published["token_count"], published["byte_count"])
    np.testing.assert_allclose(sliding.val_loss, published["sliding_val_loss"], rtol=1e-6)
    np.testing.assert_allclose(sliding.val_bpb, published["sliding_val_bpb"], rtol=1e-6)
    plain = score_stream(model, tokens, byte_counts, ranks, seq_len=64, stride=64, batch_windows=5)
    np.testing.assert_allclose(plain.val_loss, published["eval_val_val_loss"], rtol=1e-6)
    np.testing.assert_allclose(plain.val_bpb, published["eval_val_val_bpb"], rtol=1e-6)


def test_windows_are_the_published_ones(published):
    windows = make_windows(1472, 64, 16)
    assert [w.start for w in windows] == published["window_start"].tolist()
    assert [w.length for w in windows] == published["window_len"].tolist()
    assert [w.score_from for w in windows] == published["scored_start"].tolist()


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


SLOTS = [
    PerWindowSlot("delta", "after", 4, 0.05, 0.0),
    PerWindowSlot("delta", "before", 4, 0.05, 16.0),
    PerWindowSlot("bias", "after", 4, 0.1, 16.0),
    PerWindowSlot("both", "after", 4, 0.05, 0.0),
]


def slot_nll(model, tokens, slot, batch_windows):
    """nll of every target of the stream, in order, scored in batches of `batch_windows`."""
    windows = make_windows(len(tokens) - 1, 64, 16)
    pieces = []
    for i in range(0, len(windows), batch_windows):
        batch = windows[i : i + batch_windows]
        x, y, scored = gather_batch(tokens, batch, 64)
        with torch.no_grad():
            pieces.append(slot(model, x, y, scored, batch))
    return torch.cat(pieces)


@pytest.mark.parametrize("slot", SLOTS, ids=str)
def test_slot_is_strictly_causal_over_the_stream(published, tokenizer_arrays, slot):
    """Flip one token of the stream: the scores of all targets before it keep their bits; later ones do move."""
    model = trained_model(published, dtype=torch.float32)
    tokens = torch.from_numpy(tokenizer_arrays["val_tokens"]).long()[:401]
    before = slot_nll(model, tokens, slot, 8)
    for flip in (1, 40, 64, 65, 150, 200, 333, 399, 400):  # first window, its edge, batches, the last target
        changed = tokens.clone()
        changed[flip] = 4 + (changed[flip] + 7) % 400
        after = slot_nll(model, changed, slot, 8)
        earlier = flip - 1  # target t is token t + 1
        assert torch.equal(before[:earlier], after[:earlier]), f"token {flip} changed a score before it"
        assert not torch.equal(before[earlier:], after[earlier:])


@pytest.mark.parametrize("slot", SLOTS, ids=str)
def test_slot_fits_change_scores_but_not_those_of_the_first_window(published, tokenizer_arrays, byte_counts, slot):
    model = trained_model(published, dtype=torch.float32)
    tokens = torch.from_numpy(tokenizer_arrays["val_tokens"]).long()[:401]
    frozen = PerWindowSlot(slot.parameters, slot.norm, 0, slot.lr, slot.half_life)
    plain, fitted = slot_nll(model, tokens, frozen, 8), slot_nll(model, tokens, slot, 8)
    assert torch.equal(plain[:64], fitted[:64])
    assert not torch.equal(plain[64:], fitted[64:])


def test_context_weights_end_before_the_first_scored_target():
    weights = context_weights([Window(0, 8, 0), Window(16, 8, 4)], 8, 2.0)
    assert weights[0].tolist() == [0.0] * 8
    np.testing.assert_allclose(weights[1], [0.25, 0.5**1.5, 0.5, 0.5**0.5, 0, 0, 0, 0], rtol=1e-6)
