"""Score a token stream: the one function behind validation while training, sliding windows and test-time adaptation.

Windows are cut into batches once, whatever the number of ranks; a rank scores a contiguous run of batches, and the
totals are added in batch order in float64. So the result does not depend on how many ranks worked on it.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pgolf_kernels import softcapped_cross_entropy

from ..data.byte_counts import ByteCounts
from ..distributed import Ranks
from ..model import GPT
from .windows import Window, gather_batch, make_windows

# Scores the masked targets of one batch: (model, x, y, scored, windows) -> nll of scored targets, in row-major order.
BatchScorer = Callable[[GPT, Tensor, Tensor, Tensor, list[Window]], Tensor]


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


def score_frozen(model: GPT, x: Tensor, y: Tensor, scored: Tensor, windows: list[Window]) -> Tensor:
    """No adaptation. The head runs on scored rows only."""
    rows = model.hidden(x)[scored]  # (n, D)
    return softcapped_cross_entropy(
        rows, model.head_weight(), y[scored], softcap=model.cfg.logit_softcap, reduction="none"
    )


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
    score_batch: BatchScorer = score_frozen,
    on_progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score every target of `tokens` once.

    Args:
        tokens: [N + 1] int64 on the CPU; targets are tokens[1:].
        seq_len, stride: window length and step, in tokens; stride = seq_len scores without overlap.
        batch_windows: windows per forward. Part of the method where windows share state, else only a matter of speed.
        on_progress: called with (batches done, batches of this rank).
    """
    started = time.perf_counter()
    windows = make_windows(len(tokens) - 1, seq_len, stride)
    batches = [windows[i : i + batch_windows] for i in range(0, len(windows), batch_windows)]
    first, last = (len(batches) * r // ranks.world_size for r in (ranks.rank, ranks.rank + 1))
    totals = []  # (nll, tokens, bytes) of each of this rank's batches
    for done, batch in enumerate(batches[first:last], 1):
        x, y, scored = gather_batch(tokens, batch, seq_len)
        num_bytes = int(byte_counts.count_bytes(y[scored], x[scored]).sum())
        device_batch = (t.to(ranks.device, non_blocking=True) for t in (x, y, scored))
        nll = score_batch(model, *device_batch, batch)
        totals.append((nll.double().sum(), nll.numel(), num_bytes))
        if on_progress:
            on_progress(done, last - first)
    local = [(nll.item(), n, b) for nll, n, b in totals]
    everything = [batch for rank in ranks.gather(local) for batch in rank]
    nll, num_tokens, num_bytes = (sum(column) for column in zip(*everything, strict=True))
    return Score(
        val_loss=nll / num_tokens,
        val_bpb=nll / math.log(2) / max(num_bytes, 1),
        tokens=num_tokens,
        bytes=num_bytes,
        seconds=round(time.perf_counter() - started, 3),
    )
