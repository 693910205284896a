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
from .windows import Window, gather_batch, make_windows

if TYPE_CHECKING:
    from .ttt import ScoreFirst


class BatchScorer:
    """Scores the targets of one batch that `scored` marks: their nll, in row-major order."""

    sequential = False  # True: state goes from batch to batch, so one rank scores a whole slice in order

    def begin_slice(self) -> None:
        """Called before the first batch of every slice."""

    def __call__(self, model: GPT, x: Tensor, y: Tensor, scored: Tensor, windows: list[Window]) -> Tensor:
        raise NotImplementedError


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

    def __call__(self, model: GPT, x: Tensor, y: Tensor, scored: Tensor, windows: list[Window]) -> Tensor:
        rows = model.hidden(x)[scored]  # (n, D)
        return softcapped_cross_entropy(
            rows, model.head_weight(), y[scored], softcap=model.cfg.logit_softcap, reduction="none"
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
    tokens: Tensor,
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
        tokens: [N + 1] int64 on the CPU; targets are tokens[1:].
        seq_len, stride: window length and step, in tokens; stride = seq_len scores without overlap.
        batch_windows: windows per forward. Part of the method where windows share state, else only a matter of speed.
        rule: which windows there are, see make_windows.
        slices, interleave: how windows are dealt before batches are cut, see cut_slices.
        scorer: how a batch is scored; None: by the model as it is.
        learner: trains a copy of the model on each chunk of the stream behind the scoring of that chunk.
        on_progress: called with (batches done, batches of this rank).
        on_nll: called with the windows and scores of each batch of this rank, in order.
    """
    started = time.perf_counter()
    scorer = scorer or Frozen()
    windows = make_windows(len(tokens) - 1, seq_len, stride, rule)
    model = learner.begin(model) if learner else model
    chunks = []  # of each chunk of the stream, this rank's runs of batches
    for chunk in learner.split(windows, len(tokens) - 1) if learner else [windows]:
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
                x, y, scored = gather_batch(tokens, batch, seq_len)
                num_bytes = int(byte_counts.count_bytes(y[scored], x[scored]).sum())
                device_batch = (t.to(ranks.device, non_blocking=True) for t in (x, y, scored))
                nll = scorer(model, *device_batch, batch)
                totals[-1].append((nll.double().sum(), nll.numel(), num_bytes))
                done += 1
                if on_nll:
                    on_nll(batch, nll)
                if on_progress:
                    on_progress(done, num_batches)
        if learner and index + 1 < len(chunks):
            learner.train(index, tokens, ranks)
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
