"""What T2 and T5 share: whole distributions, found by putting every token of the vocabulary into the target's slot.

The stream is cut so that its last batch holds one window where it can, and scores few targets; only that batch is then
scored once per token of the vocabulary, all chosen positions at a time, by the function that the gate was given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..scoring.gate import Batch, NllOf
from .case import Case
from .passes import AuditGate


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


def cuts(case: Case, count: int) -> list[tuple[int, int]]:
    """(first target, end) of what the last window of a cut stream scores: in the first batch, the last and between."""
    batches = case.base.batches
    if len(batches) == 1:
        windows = [batches[0][i] for i in sorted({0, len(batches[0]) // 2, len(batches[0]) - 1})]
    else:
        windows = [batches[i][0] for i in sorted({0, *range(1, count - 1), len(batches) - 1})]
    scored = [(w.start + w.score_from, w.start + w.length) for w in windows[:count]]
    return [(first, min(end, first + MAX_SCORED)) for first, end in scored]


def distributions(case: Case, tokens: Tensor, end: int, targets: list[int]) -> tuple[Tensor, AuditGate]:
    """log p of the targets, all before `end`, in the stream that ends there; and the pass."""
    probe = Distributions(targets, case.vocab_size)
    gate = case.run(tokens[: end + 1], probe=probe)
    return probe.log_p, gate
