"""Score a token stream: the one function behind validation while training, sliding windows and test-time adaptation.

Windows are dealt to slices and cut into batches once, whatever the number of ranks; a rank scores a contiguous run of
batches, and the totals are added in batch order in float64. So the result does not depend on how many ranks worked on
it. Slices stand for the ranks of a published run: where windows share state, it matters which of them meet in a batch.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pgolf_kernels import softcapped_cross_entropy

from ..data.byte_counts import ByteCounts
from ..distributed import Ranks
from ..model import GPT
from .gate import Batch, LeakError, NllOf, TokenGate
from .windows import Window, make_windows

if TYPE_CHECKING:
    from .ttt import ScoreFirst


class BatchScorer:
    """Makes ready for a batch and returns how its scored targets, which it has not seen, are then scored."""

    sequential = False  # True: state goes from batch to batch, so one rank scores a whole slice in order

    def begin_slice(self) -> None:
        """Called before the first batch of every slice."""

    def __call__(self, model: GPT, batch: Batch) -> NllOf:
        raise NotImplementedError

    def learn(self, batch: Batch) -> None:
        """Called once the batch's scores are in the total: batch.to_fit now gives its scored targets, too."""


@dataclass(frozen=True)
class Score:
    """val_loss in nats per token, val_bpb in bits per byte of text; `tokens` and `bytes` are what was scored."""

    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    seconds: float

    def as_dict(self) -> dict:
        return asdict(self)


class Frozen(BatchScorer):
    """No adaptation. The head runs on scored rows only."""

    def __call__(self, model: GPT, batch: Batch) -> NllOf:
        scored = batch.scored
        rows, weight, softcap = model.hidden(batch.inputs)[scored], model.head_weight(), model.cfg.logit_softcap
        return lambda targets: softcapped_cross_entropy(
            rows, weight, targets[scored], softcap=softcap, reduction="none"
        )


def cut_slices(items: list, num_slices: int, interleave: bool) -> list[list]:
    """Deal items to equal parts: contiguous runs, or item i to part i mod num_slices."""
    if interleave:
        return [items[i::num_slices] for i in range(num_slices)]
    cuts = [len(items) * i // num_slices for i in range(num_slices + 1)]
    return [items[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def plan_batches(
    windows: list[Window], batch_windows: int, num_slices: int, interleave: bool
) -> list[list[list[Window]]]:
    """The batches of each slice that has any, in order."""
    slices = cut_slices(windows, num_slices, interleave)
    return [[part[i : i + batch_windows] for i in range(0, len(part), batch_windows)] for part in slices if part]


@torch.no_grad()
def score_stream(
    model: GPT,
    tokens: Tensor | TokenGate,
    byte_counts: ByteCounts,
    ranks: Ranks,
    *,
    seq_len: int,
    stride: int,
    batch_windows: int,
    rule: str = "exact",
    slices: int = 1,
    interleave: bool = False,
    scorer: BatchScorer | None = None,
    learner: "ScoreFirst | None" = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_nll: Callable[[list[Window], Tensor], None] | None = None,
) -> Score:
    """Score every target of `tokens` once, or as often as `rule` lists it.

    Args:
        tokens: [N + 1] int64 on the CPU; targets are tokens[1:]. Or a gate before them; else a strict one is made.
        seq_len, stride: window length and step, in tokens; stride = seq_len scores without overlap.
        batch_windows: windows per forward. Part of the method where windows share state, else only a matter of speed.
        rule: which windows there are, see make_windows.
        slices, interleave: how windows are dealt before batches are cut, see cut_slices.
        scorer: how a batch is scored; None: by the model as it is.
        learner: trains a copy of the model on each chunk of the stream behind the scoring of that chunk.
        on_progress: called with (batches done, batches of this rank).
        on_nll: called with the windows and scores of each batch of this rank, in order.

    Raises:
        LeakError: a scorer or learner asked a strict gate for targets that are still to be scored by what it makes of
            them.
    """
    started = time.perf_counter()
    scorer = scorer or Frozen()
    gate = tokens if isinstance(tokens, TokenGate) else TokenGate(tokens, ranks.device)
    windows = make_windows(gate.num_targets, seq_len, stride, rule)
    model = learner.begin(model) if learner else model
    gate.watch(model, scorer, learner)
    chunks = []  # of each chunk of the stream, this rank's runs of batches
    for chunk in learner.split(windows, gate.num_targets) if learner else [windows]:
        runs = plan_batches(chunk, batch_windows, slices, interleave)
        if not scorer.sequential:
            runs = [[batch] for run in runs for batch in run]
        chunks.append(cut_slices(runs, ranks.world_size, False)[ranks.rank])
    num_batches, done = sum(len(run) for runs in chunks for run in runs), 0
    totals: list[list] = []  # for each chunk, (nll, tokens, bytes) of each of this rank's batches
    for index, runs in enumerate(chunks):
        totals.append([])
        for run in runs:
            scorer.begin_slice()
            for batch in run:
                opened = gate.open(batch, seq_len)
                nll = gate.score(opened, scorer(model, opened))
                num_bytes = int(byte_counts.count_bytes(*opened.charged()).sum())
                totals[-1].append((nll.double().sum(), nll.numel(), num_bytes))
                scorer.learn(opened)
                done += 1
                if on_nll:
                    on_nll(batch, nll)
                if on_progress:
                    on_progress(done, num_batches)
        if learner and index + 1 < len(chunks):
            gate.share(ranks)
            learner.train(index, gate, ranks)
    if rule == "exact" and gate.strict and not (coverage := gate.coverage(ranks)).exact:
        raise LeakError(f"every target must be scored once, got {coverage}")
    local = [[(nll.item(), n, b) for nll, n, b in chunk] for chunk in totals]
    by_chunk = zip(*ranks.gather(local), strict=True)
    everything = [batch for chunk in by_chunk for rank in chunk for batch in rank]
    nll, num_tokens, num_bytes = (sum(column) for column in zip(*everything, strict=True))
    return Score(
        val_loss=nll / num_tokens,
        val_bpb=nll / math.log(2) / max(num_bytes, 1),
        tokens=num_tokens,
        bytes=num_bytes,
        seconds=round(time.perf_counter() - started, 3),
    )
