"""The model mixed with what followed the same last tokens before (CTW's deepest match): a published negative result.

The longest context of at most ctw_depth tokens that the stream has shown gives a Krichevsky-Trofimov estimate,
(count + 1/2) / (total + V/2). Where the model's entropy H is at least ctw_entropy nats, the two are mixed as
p^(1 - w) q^w, normalised, w = ctw_weight * min(H / ln V, 1). Counts hold tokens before the scored one only, so each
target must be scored once and in order: with exact windows and contiguous slices.
"""

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config
from ..errors import InputError
from ..model import GPT
from .gate import Batch, NllOf
from .stream import BatchScorer


class ContextTree(BatchScorer):
    """Args: cfg: its ctw_ fields."""

    def __init__(self, cfg: Config):
        if cfg.eval_windows != "exact" or cfg.eval_interleave:
            raise InputError(
                "ctw: needs every target once and in order: set eval_windows=exact and eval_interleave=false, "
                f"got {cfg.eval_windows} and {cfg.eval_interleave}"
            )
        self.cfg = cfg
        self.stream: list[int] = []  # as far as it has been read
        self.counts: dict[tuple[int, ...], Counter] = {}
        self.num_counted = 0  # tokens of the stream that the counts hold

    def __call__(self, model: GPT, batch: Batch) -> NllOf:
        cap, scored = model.cfg.logit_softcap, batch.scored
        rows = model.hidden(batch.inputs)[scored]
        logits = cap * torch.tanh(F.linear(rows, model.head_weight()).double() / cap)
        log_p = logits.log_softmax(-1)
        entropy = (-log_p.exp() * log_p).sum(-1).tolist()
        self.stream += batch.prefix()[len(self.stream) :].tolist()
        indices = [w.start + p + 1 for w in batch.windows for p in range(w.score_from, w.length)]
        limit = math.log(log_p.shape[1])
        for row, index in enumerate(indices):
            self._count_up_to(index)
            if entropy[row] < self.cfg.ctw_entropy:
                continue
            share = self.cfg.ctw_weight * min(entropy[row] / limit, 1.0)
            mixed = (1 - share) * log_p[row] + share * self.log_estimate(index, log_p.shape[1]).to(log_p.device)
            log_p[row] = mixed.log_softmax(0)
        return lambda targets: -log_p.gather(1, targets[scored][:, None])[:, 0]

    def _count_up_to(self, index: int) -> None:
        """Count the tokens before stream[index], each under its contexts of every length."""
        for i in range(self.num_counted, index):
            for depth in range(min(self.cfg.ctw_depth, i) + 1):
                self.counts.setdefault(tuple(self.stream[i - depth : i]), Counter())[self.stream[i]] += 1
        self.num_counted = max(self.num_counted, index)

    def log_estimate(self, index: int, vocab_size: int) -> Tensor:
        """[V] float64: log of the estimate for stream[index] from the longest context seen before it."""
        depths = range(min(self.cfg.ctw_depth, index), -1, -1)
        contexts = (self.counts.get(tuple(self.stream[index - depth : index])) for depth in depths)
        seen = next((c for c in contexts if c), Counter())
        estimate = torch.full((vocab_size,), 0.5, dtype=torch.float64)
        for token, count in seen.items():
            estimate[token] += count
        return (estimate / estimate.sum()).log()
