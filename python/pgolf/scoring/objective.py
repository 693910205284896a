"""What a SLOT fit sees: every choice by name, and for each whether a score made with it is causal.

A fit that a batch of overlapping windows shares sees, in the context of a later window, the very targets that an
earlier window scores. So every published shared form leaks, whatever it calls itself, "context-only" ones included.
Causal are the fit per window, the shared one that stops at the batch's frontier, and the one carried behind the scores.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Config
from .windows import Window

# (window, its batch, seq_len, stride) -> the first position of the window, and the one behind the last
Reach = Callable[[Window, list[Window], int, int], tuple[int, int]]


class Share(NamedTuple):
    """shared: one fit per batch instead of per window; reach: the positions it is fitted to; leak: why not causal.

    behind: a batch is scored with the fit so far, and only then fitted to, for the batches that follow it.
    """

    shared: bool
    reach: Reach
    leak: str | None
    behind: bool = False


class Standing(NamedTuple):
    """Whether a score can be trusted. `reason` says why not; "" for a causal one."""

    causal: bool
    reason: str


def _context(w: Window, batch: list[Window], seq_len: int, stride: int) -> tuple[int, int]:
    return 0, w.score_from


def _frontier(w: Window, batch: list[Window], seq_len: int, stride: int) -> tuple[int, int]:
    return 0, max(min(b.start + b.score_from for b in batch) - w.start, 0)  # no target that the batch scores, nor later


def _prefix(w: Window, batch: list[Window], seq_len: int, stride: int) -> tuple[int, int]:
    return 0, max(seq_len - stride, 1) - 1  # of any window, the first and short ones too: scored targets and padding


def _scored(w: Window, batch: list[Window], seq_len: int, stride: int) -> tuple[int, int]:
    return w.score_from, w.length


def _all(w: Window, batch: list[Window], seq_len: int, stride: int) -> tuple[int, int]:
    return 0, seq_len


def _all_but_last(w: Window, batch: list[Window], seq_len: int, stride: int) -> tuple[int, int]:
    return 0, seq_len - 1


_OVERLAP = "one fit serves overlapping windows, so the targets of one are in the context of the next"
SHARES = {  # Config's choices of slot_share
    "window": Share(False, _context, None),
    "frontier": Share(True, _frontier, None),
    "carried": Share(True, _scored, None, behind=True),
    "window-prefix": Share(
        False, _prefix, "the fit of the first window and of short ones sees the targets that they score"
    ),
    "shared-context": Share(True, _context, _OVERLAP),
    "shared-prefix": Share(True, _prefix, _OVERLAP),
    "shared-all": Share(True, _all, "the fit sees the targets that it scores"),
    "shared-all-but-last": Share(True, _all_but_last, "the fit sees the targets that it scores"),
    "scored": Share(False, _scored, "the fit sees nothing but the targets that it scores"),
}


def standing(cfg: Config, method: str) -> Standing:
    """Whether a score of `method` ("plain", "sliding", "slot", "ttt", "slot+ttt") depends on earlier tokens alone."""
    if "slot" in method.split("+"):
        share = SHARES[cfg.slot_share]
        if share.leak:
            return Standing(False, share.leak)
        if not share.shared and cfg.slot_optimizer in ("lbfgs-joint", "hypergradient"):
            return Standing(False, f"{cfg.slot_optimizer} takes one step length from all windows of a batch")
        if share.behind and (cfg.slot_windows or cfg.eval_windows) != "exact":
            return Standing(False, "legacy windows score the last targets again, after the state was fitted to them")
    return Standing(True, "")


def objective_weights(cfg: Config, windows: list[Window], seq_len: int) -> Tensor:
    """[windows, seq_len] float32: the weight of each target in the fit, of padding too where published code has it."""
    reach, first_focal = SHARES[cfg.slot_share].reach, max(seq_len - (cfg.slot_focal_tokens or seq_len), 0)
    weights = torch.zeros(len(windows), seq_len)
    for i, w in enumerate(windows):
        first, end = reach(w, windows, seq_len, cfg.eval_stride)
        first = max(first, first_focal)
        if first < end:
            distance = torch.arange(end - first, 0, -1, dtype=torch.float32)  # 1 for the newest target
            weights[i, first:end] = 0.5 ** (distance / cfg.slot_half_life) if cfg.slot_half_life else 1.0
    return weights
