"""What T2 and T5 share: whole distributions, found by putting every token of the vocabulary into the target's slot.

The stream is cut so that its last batch holds one window (few, where batches are part of the method) and scores few
targets. That batch alone is then scored once per token of the vocabulary, all chosen positions at a time, by the
function that the gate was given.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..scoring.gate import Batch, NllOf
from .case import Case
from .passes import AuditGate
from .protocol import FREE


class Distributions:
    """A probe: the distribution of chosen targets. `log_p` [targets, V] float64, NaN where a token was not tried."""

    def __init__(self, targets: list[int], vocab_size: int, substitutes: Sequence[int] | None = None):
        self.targets, self.substitutes = targets, range(vocab_size) if substitutes is None else substitutes
        self.log_p = torch.full((len(targets), vocab_size), torch.nan, dtype=torch.float64)

    def __call__(self, gate: AuditGate, batch: Batch, nll_of: NllOf) -> None:
        where, row = {}, 0  # target -> (window, position, row of the nll)
        for i, w in enumerate(batch.windows):
            for p in range(w.score_from, w.length):
                where[w.start + p] = (i, p, row)
                row += 1
        found = [(n, *where[t]) for n, t in enumerate(self.targets) if t in where]
        if not found:
            return
        order, windows, positions, rows = (torch.tensor(column) for column in zip(*found, strict=True))
        true = gate.scored_targets(batch)
        for token in self.substitutes:
            targets = true.clone()
            targets[windows, positions] = token
            self.log_p[order, token] = -nll_of(targets)[rows.to(true.device)].double().cpu()


MAX_SCORED = 16  # targets that the last window of a cut stream scores: each costs a softmax per substitute


class Cut(NamedTuple):
    """Where to cut the stream: what its last window scores, and windows per batch (None: as the evaluator likes)."""

    first: int
    end: int
    batch_windows: int | None


def cuts(case: Case, count: int) -> list[Cut]:
    """In the first batch, the last and between; of a single batch, in its first window, its last and between."""
    batches = case.base.batches
    if len(batches) > 1:
        chosen = [(batches[i][0], None) for i in sorted({0, *range(1, count - 1), len(batches) - 1})]
    elif case.evaluator.partition == FREE:
        # With i windows a batch, window i has one of its own.
        chosen = [(batches[0][i], max(i, 1)) for i in sorted({0, len(batches[0]) // 2, len(batches[0]) - 1})]
    else:
        chosen = [(w, None) for w in batches[0][:2]]
    scored = [(w.start + w.score_from, w.start + w.length, size) for w, size in chosen[:count]]
    return [Cut(first, min(end, first + MAX_SCORED), size) for first, end, size in scored]


def distributions(case: Case, tokens: Tensor, cut: Cut, targets: list[int]) -> tuple[Tensor, AuditGate]:
    """log p of the targets, which the last window of the cut stream scores; and the pass."""
    probe = Distributions(targets, case.vocab_size)
    return probe.log_p, case.run(tokens[: cut.end + 1], probe=probe, batch_windows=cut.batch_windows)
