"""Learning-rate multiplier and Muon momentum of a step.

With a time budget the warmdown follows the clock: the steps that are left are estimated from the mean step time so far.
Without one it follows the step count, and a run is reproducible bit for bit.
"""

from ..config import Config


def lr_multiplier(cfg: Config, step: int, elapsed_s: float) -> float:
    """Multiplier in [min_lr, 1] for the step that starts after `step` finished steps and `elapsed_s` of training."""
    if cfg.max_seconds:
        done, budget = elapsed_s, cfg.train_seconds
        warmdown = cfg.warmdown_steps * elapsed_s / max(step, 1)
    else:
        done, budget = float(step), float(cfg.max_steps)
        warmdown = float(cfg.warmdown_steps)
    if cfg.warmdown_frac:
        warmdown = cfg.warmdown_frac * budget
    remaining = max(budget - done, 0.0)
    if remaining > warmdown or warmdown == 0:
        return 1.0
    return max(remaining / warmdown, cfg.min_lr)


def muon_momentum(cfg: Config, step: int) -> float:
    """Linear warm-up from muon_momentum_warmup_start to muon_momentum."""
    f = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    return (1 - f) * cfg.muon_momentum_warmup_start + f * cfg.muon_momentum
