"""What a flipped token changes before itself: in each form of SLOT exactly what it changed in the published loops."""

import pytest
import torch
from scoring_samples import ONE_RANK, SLOT_SYSTEMS, TINY, ThreeTokenModel, flip_changes, load, no_bytes

from pgolf.config import Config
from pgolf.evaluate import score_method
from pgolf.scoring.objective import standing
from pgolf.scoring.published import PUBLISHED
from pgolf_kernels import AdamW, slot_fit, slot_score

FLIPS = load("flip_stream")


@pytest.mark.parametrize("variant", SLOT_SYSTEMS)
def test_what_leaks_is_what_leaked_in_the_published_loops(variant):
    """Flip tokens of a stream through the whole evaluator; compare all changes of earlier scores with the published."""
    steps, _, batch = FLIPS[f"{variant}/settings"].tolist()
    base = Config(eval_seq_len=64, train_seq_len=64, train_batch_tokens=64)
    fields = PUBLISHED[SLOT_SYSTEMS[variant]] | {"eval_stride": 16, "eval_slices": 1, "eval_batch_windows": int(batch)}
    cfg = base.replace(**fields)
    assert cfg.slot_steps == steps
    tokens, model = torch.from_numpy(FLIPS["tokens"]).long(), ThreeTokenModel(FLIPS)
    target_of = torch.from_numpy(FLIPS["scored_target_index"])

    def score(stream: torch.Tensor) -> torch.Tensor:
        pieces = []
        options = {"on_nll": lambda windows, nll: pieces.append(nll)}
        result = score_method("slot", cfg, model, stream, no_bytes(64), ONE_RANK, **options)
        assert result.tokens == len(FLIPS["scored_target_index"])
        return torch.cat(pieces)

    flips = FLIPS["flip_positions"].tolist()
    atol = 1e-4 if variant in "fg" else 1e-6
    torch.testing.assert_close(score(tokens), torch.from_numpy(FLIPS[f"{variant}/nll"]), rtol=0, atol=atol)
    changes = flip_changes(score, tokens, target_of, flips, 64)
    earlier = ~changes.isnan()
    if standing(cfg, "slot").causal:
        assert (changes[earlier] == 0).all()
        assert FLIPS[f"{variant}/violations"] == 0
        return
    want = torch.from_numpy(FLIPS[f"{variant}/change"]).double()
    count, published = ((c[earlier].abs() > 1e-7).sum().item() for c in (changes, want))
    assert count > 0
    assert published == FLIPS[f"{variant}/violations"]
    # Changes at the threshold itself may fall to either side of it.
    assert abs(count - published) <= 0.002 * earlier.sum(), f"{count} leaks, {published} published"
    torch.testing.assert_close(changes[earlier], want[earlier], rtol=0, atol=1e-5 if variant in "fg" else 1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"slot_optimizer": "lbfgs-joint", "slot_max_iter": 3, "slot_steps": 1, "slot_lr": 1.0},
        {"slot_optimizer": "hypergradient", "slot_hyper_rate": 1e-3, "slot_lr_max": 0.1},
    ],
    ids=["one history", "one rate"],
)
def test_optimisers_that_couple_windows_leak_and_say_so(fields):
    """Every fit sees its own context alone, and yet a token changes scores before it, through the common step."""
    cfg = TINY.replace(eval_batch_windows=32, **fields)
    assert not standing(cfg, "slot").causal
    tokens, model = torch.from_numpy(FLIPS["tokens"]).long(), ThreeTokenModel(FLIPS)

    def score(stream: torch.Tensor) -> torch.Tensor:
        pieces = []
        score_method("slot", cfg, model, stream, no_bytes(64), ONE_RANK, on_nll=lambda w, nll: pieces.append(nll))
        return torch.cat(pieces)

    changes = flip_changes(score, tokens, torch.arange(1, 385), [200, 300], 64)
    assert (changes[~changes.isnan()].abs() > 1e-7).sum() > 50


ONE_WINDOW = load("flip_one_window")


@pytest.mark.parametrize(
    ("case", "mask", "parameters", "steps", "lr", "leaks"),
    [
        ("c0", "scored", "delta", 8, 0.005, 131),
        ("c1", "scored", "both", 16, 0.008, 132),
        ("c2", "all", "delta", 8, 0.005, 132),
        ("c3", "context", "delta", 8, 0.005, 0),
        ("c4", "context", "both", 16, 0.008, 0),
    ],
)
def test_the_published_flip_test_of_one_window(case, mask, parameters, steps, lr, leaks):
    """Targets flip, inputs do not; it passes what leaks between windows, for it has but one."""
    hidden, weight, y = (torch.from_numpy(ONE_WINDOW[name]) for name in ("H", "W", "y"))
    fitted = torch.from_numpy(ONE_WINDOW[f"mask_{mask}"])
    optimizer = AdamW(lr=lr, eps=1e-8, weight_decay=0.01, lr_min=0.0)
    options = {"parameters": parameters, "normalize": "batch", "optimizer": optimizer, "steps": steps}

    def nll(targets: torch.Tensor) -> torch.Tensor:
        fit = slot_fit(hidden, weight, targets, fitted, **options)
        return slot_score(hidden, weight, targets, fit, rows=torch.ones_like(targets, dtype=torch.bool))

    before = nll(y)
    torch.testing.assert_close(before[None], torch.from_numpy(ONE_WINDOW[f"{case}_nll_base"]), rtol=0, atol=2e-3)
    first, found = int(ONE_WINDOW["mask_scored"][0].argmax()), 0
    for k, want in enumerate(torch.from_numpy(ONE_WINDOW[f"{case}_nll_flips"])):
        flipped = y.clone()
        flipped[0, first + k] = (y[0, first + k] + 1) % len(weight)
        after = nll(flipped)
        torch.testing.assert_close(after, want, rtol=0, atol=2e-3)
        others = [first + j for j in range(12) if j != k]
        found += ((after - before)[others].abs() > (1e-4 if leaks else 0)).sum().item()
    assert found == leaks
