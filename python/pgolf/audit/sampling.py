"""Sample a stream from a frozen model in exactly the windows in which plain sliding scoring will score it.

Each token is drawn at temperature 1 from the whole vocabulary, from the row of the very window that scores it, so the
model's score of the stream is its true code length. A forward of the whole window for every token would take hours: a
KVCache drafts a window's tokens first, one forward of the window then draws them all again from the same random
numbers, and drafting starts anew at the first that differs. The cache's rounding so decides about speed alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import Config
from ..generate import choose
from ..kv_cache import KVCache
from ..model import GPT
from ..scoring.windows import make_windows


@torch.no_grad()
def sample_stream(
    model: GPT,
    cfg: Config,
    first: int,
    num_targets: int,
    generator: torch.Generator,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """A stream that begins with a given token.

    Args:
        cfg: eval_seq_len and eval_stride are read.
        first: token 0, such as BOS.

    Returns:
        tokens [num_targets + 1] int64 and the log-probability of each target, [num_targets] float64, as drawn.
    """
    device, T = model.tok_emb.weight.device, cfg.eval_seq_len
    uniform = 1 - torch.rand(num_targets, dtype=torch.float64, generator=generator)  # in (0, 1]
    uniform = uniform.to(device)
    tokens = torch.zeros(num_targets + T + 1, dtype=torch.int64, device=device)
    tokens[0] = first
    log_p = torch.zeros(num_targets, dtype=torch.float64, device=device)
    for w in make_windows(num_targets, T, cfg.eval_stride):
        scored = slice(w.start + w.score_from, w.start + w.length)
        known = w.score_from  # of the window's targets, those that are final
        while known < w.length:
            _draft(model, tokens, uniform, w.start, known, w.length)
            inputs = tokens[w.start : w.start + T].clone()
            inputs[w.length :] = 0  # as gather_batch pads
            logits = _logits(model, inputs)[w.score_from : w.length]
            drawn = choose(logits, uniform[scored, None], 1.0)[:, 0]
            targets = tokens[scored.start + 1 : scored.stop + 1]
            differ = (drawn != targets).nonzero()
            known = w.length if not len(differ) else w.score_from + int(differ[0]) + 1
            # Behind the first difference the rows saw a wrong token: they are drawn anew.
            targets[: known - w.score_from] = drawn[: known - w.score_from]
        log_p[scored] = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        if on_progress:
            on_progress(scored.stop, num_targets)
    return tokens[: num_targets + 1].cpu(), log_p.cpu()


def _logits(model: GPT, inputs: Tensor) -> Tensor:
    """[T, V] of one window."""
    return model.logits(inputs[None])[0]


def _draft(model: GPT, tokens: Tensor, uniform: Tensor, start: int, known: int, length: int) -> None:
    """Guess targets known to length - 1 of the window that begins at `start`, in place."""
    cache = KVCache(model, 1, length)
    new = tokens[start : start + known + 1]
    for target in range(start + known, start + length):
        logits = model.logits(new[None], cache, last_only=True)[:, 0]
        new = choose(logits, uniform[target].view(1, 1), 1.0)[0]
        tokens[target + 1] = new[0]
