"""SLOT in closed form: every scored position has a logit bias of its own, from the context positions that are like it.

    k[t, i]    = exp(sharpness * (cos(h[t] - m, h[i] - m) - 1))   h: final hidden states, m: their mean
    bias[t, v] = log((sum_i k[t, i] [y[i] = v] + prior) / (sum_i k[t, i] p[i, v] + prior))

so a token gains where it came more often than the model expected, and loses where it came less often. With k = 1 that
is one step of iterative scaling of the bias that a window shares; with the denominator left out it is the continuous
cache of https://arxiv.org/abs/1612.04426, which adds what the model has learnt from its context already once more.
Nothing is fitted. With slot_share "window" nothing leaves a window, so a score depends on the window's context alone;
with "carried" the targets scored before that context, the newest slot_cache_tokens of them, are remembered, too.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config
from ..model import GPT
from .gate import Batch, NllOf
from .objective import SHARES, objective_weights
from .stream import BatchScorer


class Memory(NamedTuple):
    """Positions whose targets are known: final hidden states, targets, and the model's probabilities there."""

    hidden: Tensor  # [S, D]
    targets: Tensor  # [S] int64
    expected: Tensor  # [S, V]

    @classmethod
    def join(cls, *parts: "Memory") -> "Memory":
        return parts[0] if len(parts) == 1 else cls(*map(torch.cat, zip(*parts, strict=True)))

    def cut(self, first: int, end: int | None = None) -> "Memory":
        return Memory(*(t[first:end] for t in self))


class CacheSlot(BatchScorer):
    """Slot for slot_parameters "cache"."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        # What is remembered of a window itself, whatever is carried; at a short half-life far weights would round to 0.
        self.context = cfg.replace(slot_share="window", slot_half_life=0.0)
        self.sequential = SHARES[cfg.slot_share].behind
        self.begin_slice()

    def begin_slice(self) -> None:
        self._carried: Memory | None = None
        self._positions = torch.empty(0, dtype=torch.int64)  # of what is carried, in the stream, ascending
        self._scored: tuple[Tensor, Tensor, float] | None = None  # what learn needs of a batch that is scored

    def __call__(self, model: GPT, batch: Batch) -> NllOf:
        hidden = model.hidden(batch.inputs)
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        weight, softcap = model.head_weight().to(hidden.dtype), model.cfg.logit_softcap
        known = objective_weights(self.context, batch.windows, hidden.shape[1]) > 0
        targets, counts = batch.to_fit(known), known.sum(1).tolist()
        known = known.to(targets.device, non_blocking=True)
        if self.sequential:
            self._scored = hidden[batch.scored], weight, softcap
        # One window at a time, and its padding with it: a score's bits must depend neither on the windows beside it nor
        # on how many positions are scored, which is where the text ends.
        log_probs = []
        for w, h, y, k, count in zip(batch.windows, hidden, targets, known, counts, strict=True):
            memory = [remember(h[k], y[k], weight, softcap)] if count else []
            if older := self._older_than(w.start):
                memory.insert(0, older)
            found = log_probs_of(h[w.score_from :], weight, softcap, Memory.join(*memory) if memory else None, self.cfg)
            log_probs.append(found[: w.length - w.score_from])
        log_probs = torch.cat(log_probs)
        return lambda targets: -log_probs.gather(1, targets[batch.scored][:, None])[:, 0]

    def learn(self, batch: Batch) -> None:
        if not self.sequential:
            return
        (hidden, weight, softcap), self._scored = self._scored, None
        targets = batch.to_fit(batch.scored.cpu(), shared=True)
        new = remember(hidden, targets[batch.scored], weight, softcap)
        at = torch.cat([torch.arange(w.start + w.score_from, w.start + w.length) for w in batch.windows])
        joined = new if self._carried is None else Memory.join(self._carried, new)
        # The next window begins up to eval_seq_len before its first scored target.
        most = self.cfg.slot_cache_tokens + self.cfg.eval_seq_len
        self._carried = Memory(*(t.clone() for t in joined.cut(-most)))
        self._positions = torch.cat([self._positions, at])[-most:]

    def _older_than(self, start: int) -> Memory | None:
        """Of what is carried, the targets before `start`, slot_cache_tokens at most."""
        first, end = torch.searchsorted(
            self._positions, torch.tensor([start - self.cfg.slot_cache_tokens, start])
        ).tolist()
        return self._carried.cut(first, end) if end > first else None


def remember(hidden: Tensor, targets: Tensor, weight: Tensor, softcap: float) -> Memory:
    """Positions [S, D] with targets [S] int64, under a head [V, D]."""
    # c tanh(z / c) = 2c sigmoid(2z / c) - c, and a softmax does not see the last term: PyTorch's tanh takes as long as
    # the product before it, its sigmoid a fifth.
    # In place, because fresh memory for each step costs page faults, half the time in all.
    capped = (hidden @ weight.T).mul_(2 / softcap).sigmoid_().mul_(2 * softcap)
    return Memory(hidden, targets, torch.softmax(capped, -1))


def log_probs_of(rows: Tensor, weight: Tensor, softcap: float, memory: Memory | None, cfg: Config) -> Tensor:
    """[n, V] log-probabilities at rows [n, D]; without a memory the model's own."""
    logits = rows @ weight.T
    if memory:
        mean = memory.hidden.mean(0)
        cosine = F.normalize(rows - mean, dim=-1) @ F.normalize(memory.hidden - mean, dim=-1).T
        likeness = cosine.sub_(1).mul_(cfg.slot_cache_sharpness).exp_()  # [n, S]
        seen, expected = _count(likeness, memory.targets, len(weight)), likeness @ memory.expected
        logits += seen.add_(cfg.slot_cache_prior).div_(expected.add_(cfg.slot_cache_prior)).log_()
    return torch.log_softmax(logits.div_(softcap).tanh_().mul_(softcap), -1)


def _count(likeness: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
    """[n, V]: what each target weighs in all. A GPU adds to one place in no fixed order, so a product does it there."""
    if likeness.is_cuda:
        return likeness @ F.one_hot(targets, num_tokens).to(likeness.dtype)
    seen = likeness.new_zeros(len(likeness), num_tokens)
    return seen.scatter_add_(1, targets.expand_as(likeness), likeness)
