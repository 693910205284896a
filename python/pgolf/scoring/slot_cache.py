"""SLOT in closed form: every scored position has a logit bias of its own, from the context positions that are like it.

    k[t, i]    = exp(sharpness * (cos(h[t] - m, h[i] - m) - 1))   h: final hidden states, m: their mean
    bias[t, v] = log((sum_i k[t, i] [y[i] = v] + prior) / (sum_i k[t, i] p[i, v] + prior))

so a token gains where it came more often than the model expected, and loses where it came less often. With k = 1 that
is one step of iterative scaling of the bias that a window shares; with the denominator left out it is the continuous
cache of https://arxiv.org/abs/1612.04426, which adds what the model has learnt from its context already once more.
Nothing is fitted and nothing leaves a window, so a score depends on the window's context alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config
from ..model import GPT
from .gate import Batch, NllOf
from .objective import objective_weights
from .stream import BatchScorer


class CacheSlot(BatchScorer):
    """Slot for slot_parameters "cache". It remembers the targets that slot_share and slot_focal_tokens name."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def __call__(self, model: GPT, batch: Batch) -> NllOf:
        cfg = self.cfg
        hidden = model.hidden(batch.inputs)
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        weight, remembered = (
            model.head_weight().to(hidden.dtype),
            objective_weights(cfg, batch.windows, hidden.shape[1]) > 0,
        )
        targets, num_remembered = batch.to_fit(remembered), remembered.sum(1).tolist()
        remembered = remembered.to(targets.device, non_blocking=True)
        # One window at a time, and its padding with it: a score's bits must depend neither on the windows beside it nor
        # on how many positions are scored, which is where the text ends.
        log_probs = []
        for w, h, y, known, num in zip(batch.windows, hidden, targets, remembered, num_remembered, strict=True):
            rows = h[w.score_from :]
            if num:
                found = cached_log_probs(rows, h[known], y[known], weight, model.cfg.logit_softcap, cfg)
            else:
                found = capped_log_probs(rows @ weight.T, model.cfg.logit_softcap)
            log_probs.append(found[: w.length - w.score_from])
        log_probs = torch.cat(log_probs)
        return lambda targets: -log_probs.gather(1, targets[batch.scored][:, None])[:, 0]


def capped_log_probs(logits: Tensor, softcap: float) -> Tensor:
    """[n, V] logits -> log-probabilities, behind the softcap."""
    return torch.log_softmax(softcap * torch.tanh(logits / softcap), -1)


def cached_log_probs(
    rows: Tensor, context: Tensor, targets: Tensor, weight: Tensor, softcap: float, cfg: Config
) -> Tensor:
    """[n, V] log-probabilities of rows [n, D], from context [S, D] with targets [S] int64, S > 0, and a head [V, D]."""
    # The softcap by c tanh(z / c) = 2c sigmoid(2z / c) - c, whose last term a softmax drops: PyTorch's tanh takes as long
    # as the product before it, its sigmoid a fifth.
    expected = torch.softmax(2 * softcap * torch.sigmoid(2 / softcap * (context @ weight.T)), -1)  # [S, V]
    mean = context.mean(0)
    cosine = F.normalize(rows - mean, dim=-1) @ F.normalize(context - mean, dim=-1).T
    likeness = torch.exp(cfg.slot_cache_sharpness * (cosine - 1))  # [n, S]
    seen, prior = _count(likeness, targets, len(weight)), cfg.slot_cache_prior
    bias = ((seen + prior) / (likeness @ expected + prior)).log()
    return capped_log_probs(rows @ weight.T + bias, softcap)


def _count(likeness: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
    """[n, V]: what each target weighs in all. A GPU adds to one place in no fixed order, so a product does it there."""
    if likeness.is_cuda:
        return likeness @ F.one_hot(targets, num_tokens).to(likeness.dtype)
    seen = likeness.new_zeros(len(likeness), num_tokens)
    return seen.scatter_add_(1, targets.expand_as(likeness), likeness)
