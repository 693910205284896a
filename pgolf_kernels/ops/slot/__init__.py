"""Per-window test-time adaptation of a hidden shift and a logit bias (SLOT), and the scores that follow from it."""

from .op import slot_fit, slot_score
from .optimizers import LBFGS, AdamW, HypergradientAdamW
from .problem import SlotFit

__all__ = ["LBFGS", "AdamW", "HypergradientAdamW", "SlotFit", "slot_fit", "slot_score"]
