"""SLOT, strictly causal: before a window is scored, a small vector is fitted to the part of it that was scored before.

Nothing is shared between windows and no scored target enters its own fit: the state that scores targets [s, w) of a
window comes from its targets [0, s) alone, and the first window, which has no such part, is scored as it is.
Published variants share the vector over a batch of overlapping windows, which lets targets leak; they are not here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_kernels import AdamW, slot_fit, slot_score

from ..config import Config
from ..model import GPT
from .windows import Window


@dataclass(frozen=True)
class PerWindowSlot:
    """Fits each window on its context. A BatchScorer.

    Args:
        parameters: "delta" (added to the hidden state), "bias" (added to the logits) or "both".
        norm: delta joins "after" or "before" the final norm.
        steps, lr: of AdamW.
        half_life: context weight halves with this many tokens of distance to the first scored target; 0: equal weights.
    """

    parameters: str
    norm: str
    steps: int
    lr: float
    half_life: float

    @classmethod
    def from_config(cls, cfg: Config) -> "PerWindowSlot":
        return cls(cfg.slot_parameters, cfg.slot_norm, cfg.slot_steps, cfg.slot_lr, cfg.slot_half_life)

    def __call__(self, model: GPT, x: Tensor, y: Tensor, scored: Tensor, windows: list[Window]) -> Tensor:
        state = (model.hidden if self.norm == "after" else model.trunk)(x)
        weight, softcap = model.head_weight(), model.cfg.logit_softcap
        fit = slot_fit(
            state,
            weight,
            y,
            context_weights(windows, x.shape[1], self.half_life).to(x.device),
            softcap=softcap,
            norm=self.norm,
            share="window",
            normalize="window",
            parameters=self.parameters,
            optimizer=AdamW(lr=self.lr),
            steps=self.steps,
        )
        return slot_score(state, weight, y, fit, softcap=softcap, norm=self.norm, rows=scored)


def context_weights(windows: list[Window], seq_len: int, half_life: float) -> Tensor:
    """[windows, seq_len] float32: weight of each target in the fit, 0 from the first scored target on."""
    weights = torch.zeros(len(windows), seq_len)
    for i, w in enumerate(windows):
        if w.score_from:
            distance = torch.arange(w.score_from, 0, -1, dtype=torch.float32)  # 1 for the newest context target
            weights[i, : w.score_from] = 0.5 ** (distance / half_life) if half_life else 1.0
    return weights
