"""Learning rate and momentum at the points where the published logs show them."""

import pytest

from pgolf.config import Config
from pgolf.optimise.schedule import lr_multiplier, muon_momentum


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.92), (500, 0.943333), (750, 0.955), (1500, 0.99), (9000, 0.99)])
def test_muon_momentum_warms_up_over_1500_steps(step, momentum):
    assert muon_momentum(Config(), step) == pytest.approx(momentum, abs=1e-6)


def test_wall_clock_warmdown_of_the_published_run():
    cfg = Config(max_seconds=600.0, warmdown_steps=3500)
    assert lr_multiplier(cfg, 6612, 555.8) == pytest.approx(0.1498, abs=5e-4)  # where its log starts late QAT
    assert lr_multiplier(cfg, 3600, 3600 * 0.0842) == 1.0
    assert lr_multiplier(cfg, 3640, 3640 * 0.0842) < 1.0
    assert lr_multiplier(cfg, 0, 0.0) == 1.0
    assert lr_multiplier(cfg, 7000, 601.0) == 0.0


@pytest.mark.parametrize(("share", "multiplier"), [(0.2, 1.0), (0.5, 0.7496), (0.8, 0.2999), (0.99, 0.0150)])
def test_warmdown_over_a_share_of_the_budget(share, multiplier):
    by_clock = Config(max_seconds=590.0, warmdown_frac=0.667)
    by_steps = Config(max_seconds=0.0, max_steps=1000, warmdown_frac=0.667)
    assert lr_multiplier(by_clock, 100, 590 * share) == pytest.approx(multiplier, abs=1e-4)
    assert lr_multiplier(by_steps, int(1000 * share), 0.0) == pytest.approx(multiplier, abs=1e-4)


def test_min_lr_is_a_floor_and_no_warmdown_is_constant():
    assert lr_multiplier(Config(max_seconds=10.0, warmdown_frac=0.5, min_lr=0.1), 5, 9.9) == 0.1
    assert lr_multiplier(Config(max_seconds=0.0, max_steps=10, warmdown_steps=0), 9, 0.0) == 1.0
