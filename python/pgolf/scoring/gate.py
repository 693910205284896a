"""The only way from a stream's targets to a scorer or a learner; it knows which scores are in the total.

    batch = gate.open(windows, seq_len)                      # inputs; target t of a stream is its token t + 1
    fitted = batch.to_fit(weights)                           # only what lies before all that this fit will score
    nll = gate.score(batch, lambda targets: ...)             # the scored targets, once the distribution is fixed
    sequence = gate.committed(first, end)                    # targets to learn from: their scores are in the total

What surprises is `score`: a scorer never asks for the targets that it scores. It gives a function of targets, which is
called with the true ones here, and by an audit with every other token of the vocabulary as well. A request that would
leak raises LeakError, or is noted in `violations` where the gate is not strict. Inputs hold the same tokens as targets
(teacher forcing), so what a scorer does with them cannot be prevented here: the audit flips them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..distributed import Ranks
from .windows import Window, gather_batch

NllOf = Callable[[Tensor], Tensor]  # targets [B, T], 0 where nothing is scored -> nll of the scored ones, row-major
MAX_NOTED = 100  # violations that are kept as sentences


class LeakError(RuntimeError):
    """A scorer or a learner asked for targets that its own scores are still to come from."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows that are scored together.

    Attributes:
        inputs: [B, T] int64 on the gate's device, 0 behind short windows.
        scored: [B, T] bool, there too: the positions whose targets are scored.
    """

    windows: list[Window]
    inputs: Tensor
    scored: Tensor
    _gate: "TokenGate"
    _inputs: Tensor  # on the CPU, as the following two
    _targets: Tensor
    _scored: Tensor

    @property
    def num_scored(self) -> list[int]:
        """Scored targets of each window."""
        return [w.length - w.score_from for w in self.windows]

    @property
    def first_scored(self) -> int:
        return min(w.start + w.score_from for w in self.windows)

    def to_fit(self, weights: Tensor, shared: bool = False) -> Tensor:
        """The targets whose weight is positive, 0 elsewhere: [B, T] int64 on the gate's device.

        Args:
            weights: [B, T] on the CPU, as they weigh in the objective. Padding behind a window is no target.
            shared: one fit serves all windows, so it may see what lies before the first target of them all; else each
                window's own. Of a batch that is scored, any target may be fitted to: its state serves later batches.
        """
        fitted = weights > 0
        starts, lengths, scored = torch.tensor([(w.start, w.length, w.score_from) for w in self.windows]).T[..., None]
        position = torch.arange(weights.shape[1])
        target, first = starts + position, starts + scored
        first = first.min().expand_as(first) if shared else first
        late = (fitted & (position < lengths) & (target >= first)).nonzero()
        if len(late) and not self._gate.is_committed(target[tuple(late.T)].numpy()):
            i, p = late[-1].tolist()
            self._gate.refuse(f"a fit that scores target {int(first[i])} asked for target {int(target[i, p])}")
        return torch.where(fitted, self._targets, 0).to(self.inputs.device, non_blocking=True)

    def prefix(self) -> Tensor:
        """The tokens before the last target that the batch scores, on the CPU; token i precedes target i."""
        return self._gate.tokens[: max(w.start + w.length for w in self.windows)]

    def charged(self) -> tuple[Tensor, Tensor]:
        """(targets, inputs) of the scored positions, on the CPU, for counting bytes. Only once they are scored."""
        if not self._gate.is_committed(self.first_scored):
            raise LeakError("a batch must be scored before its bytes are counted")
        return self._targets[self._scored], self._inputs[self._scored]


@dataclass(frozen=True)
class Coverage:
    """Targets that no rank scored, those scored more than once, and whether each rank went from left to right."""

    num_missing: int
    num_repeated: int
    in_order: bool

    @property
    def exact(self) -> bool:
        return not self.num_missing and not self.num_repeated


class TokenGate:
    """One pass over a token stream.

    Args:
        tokens: [N + 1] int64 on the CPU; targets are tokens[1:].
        device: where batches go.
        strict: raise LeakError at a request that leaks; False: note it in `violations` and hand the targets out.
        planned_targets: what num_targets would be of a stream that was not cut short. A schedule over the whole text,
            as test-time training has, follows it. None: num_targets.
    """

    def __init__(
        self,
        tokens: Tensor,
        device: torch.device | str = "cpu",
        *,
        strict: bool = True,
        planned_targets: int | None = None,
    ):
        self.tokens, self.device, self.strict = tokens, device, strict
        self.num_targets = len(tokens) - 1
        self.planned_targets = self.num_targets if planned_targets is None else planned_targets
        self.violations: list[str] = []
        self.num_violations = 0
        self.watched: tuple[object, ...] = ()
        self._times = np.zeros(self.num_targets, dtype=np.uint8)  # scored by this rank; stays at 255
        self._elsewhere = np.zeros(0, dtype=bool)  # scored by other ranks
        self._end, self._in_order = 0, True

    def watch(self, *holders: object) -> None:
        """Say what holds state (models, scorers, learners). A plain gate only keeps it; an audit hashes its tensors."""
        self.watched = holders

    def open(self, windows: Sequence[Window], seq_len: int) -> Batch:
        """Inputs of windows that are to be scored next."""
        inputs, targets, scored = gather_batch(self.tokens, windows, seq_len)
        on_device = (t.to(self.device, non_blocking=True) for t in (inputs, scored))
        return Batch(list(windows), *on_device, self, inputs, targets, scored)

    def score(self, batch: Batch, nll_of: NllOf) -> Tensor:
        """The nll of the batch's scored targets, [n]; from now on they count as scored.

        Args:
            nll_of: from targets [B, T] to nll [n] in row-major order. What it depends on besides must not change
                between this call and its return.
        """
        nll = nll_of(self.scored_targets(batch))
        for w in batch.windows:
            first, end = w.start + w.score_from, w.start + w.length
            part = self._times[first:end]
            part += part < 255
            self._in_order &= first >= self._end
            self._end = end
        return nll

    def scored_targets(self, batch: Batch) -> Tensor:
        """[B, T] int64 on the gate's device: 0 where nothing is scored."""
        return torch.where(batch._scored, batch._targets, 0).to(self.device, non_blocking=True)

    def committed(self, first: int, end: int) -> Tensor:
        """Tokens [first, end] to learn from: inputs, and behind them the targets [first, end), which must be scored."""
        if not self.is_committed(slice(first, end)):
            self.refuse(f"a learner asked for the targets {first} to {end - 1}, which are not all scored")
        return self.tokens[first : end + 1]

    def is_committed(self, targets: int | slice | np.ndarray) -> bool:
        """Whether the scores of all these targets are in the total, of whatever rank (see share)."""
        scored = self._times[targets] > 0
        if len(self._elsewhere):
            scored = scored | self._elsewhere[targets]
        return bool(np.all(scored))

    def refuse(self, sentence: str) -> None:
        if self.strict:
            raise LeakError(f"{sentence}; its scores would depend on what they score")
        self.num_violations += 1
        if len(self.violations) < MAX_NOTED:
            self.violations.append(sentence)

    def share(self, ranks: Ranks) -> None:
        """Learn what the other ranks have scored; all ranks call it."""
        if ranks.world_size == 1:
            return
        self._elsewhere = np.zeros(self.num_targets, dtype=bool)
        for first, end in (run for runs in ranks.gather(_runs(self._times > 0)) for run in runs):
            self._elsewhere[first:end] = True

    def coverage(self, ranks: Ranks) -> Coverage:
        """How all ranks together have covered the stream; all ranks call it."""
        own = (_runs(self._times > 0), int((self._times > 1).sum()), self._in_order)
        times = np.zeros(self.num_targets, dtype=np.uint8)
        repeated, in_order = 0, True
        for runs, more, ordered in ranks.gather(own):
            for first, end in runs:
                part = times[first:end]
                part += part < 255
            repeated += more
            in_order &= ordered
        return Coverage(int((times == 0).sum()), repeated + int((times > 1).sum()), in_order)


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """The intervals [first, end) of the true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
