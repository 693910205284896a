"""One pass of an evaluator over a stream, and everything the auditor sees of it, in the gate.

What the tests compare are passes over streams that differ behind some target: so a pass can stop as soon as all targets
up to there are scored, which halves the price of an audit.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..scoring.gate import Batch, NllOf, TokenGate
from ..scoring.stream import Score
from ..scoring.windows import Window
from .protocol import Evaluator

Probe = Callable[["AuditGate", Batch, NllOf], None]


class StreamEnded(Exception):
    """Every target that this pass is about has been scored."""


class AuditGate(TokenGate):
    """A gate that refuses nothing and keeps a record.

    Args:
        stop_after: the pass ends before the first batch that scores nothing up to this target. None: at the end.
        ledger: hash all state that the evaluator watches before and after each batch is scored.
        probe: called before each batch is scored, with the function that will score it.

    Attributes:
        nll: [N] float64: the last score of each target, NaN where there is none.
        batches: the windows of each scored batch, in order.
        num_changed: batches during whose scoring state changed (with ledger); num_hashed: tensors in the last hash.
        reported: what the evaluator returned.
    """

    def __init__(
        self,
        tokens: Tensor,
        device: torch.device,
        *,
        stop_after: int | None = None,
        ledger: bool = False,
        probe: Probe | None = None,
        planned_targets: int | None = None,
    ):
        super().__init__(tokens, device, strict=False, planned_targets=planned_targets)
        self.stop_after, self.ledger, self.probe = stop_after, ledger, probe
        self.nll = torch.full((self.num_targets,), torch.nan, dtype=torch.float64)
        self.batches: list[list[Window]] = []
        self.num_changed = self.num_hashed = 0
        self.reported: Score | None = None

    def open(self, windows: list[Window], seq_len: int) -> Batch:
        first = min(w.start + w.score_from for w in windows)
        if self.stop_after is not None and first > self.stop_after:
            raise StreamEnded
        return super().open(windows, seq_len)

    def score(self, batch: Batch, nll_of: NllOf) -> Tensor:
        if self.probe:
            self.probe(self, batch, nll_of)
        before = self._digest() if self.ledger else None
        nll = super().score(batch, nll_of)
        if self.ledger:
            self.num_changed += self._digest() != before
        self.batches.append(batch.windows)
        values = nll.detach().double().cpu()
        for w, part in zip(batch.windows, values.split(batch.num_scored), strict=True):
            self.nll[w.start + w.score_from : w.start + w.length] = part
        return nll

    def _digest(self) -> bytes:
        digest, self.num_hashed = hashlib.blake2b(), 0
        digest.update(torch.get_rng_state().numpy().tobytes())
        for part in _leaves(self.watched, set()):
            if isinstance(part, Tensor):
                self.num_hashed += 1
                part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            else:
                part = repr(part).encode()
            digest.update(part)
        return digest.digest()


def _leaves(thing: object, seen: set[int]) -> Iterator[Tensor | str | int | float | None]:
    """Tensors, numbers and strings that can be reached from an object's state."""
    if thing is None or isinstance(thing, Tensor | str | bytes | int | float | bool):
        yield thing
        return
    if id(thing) in seen or isinstance(thing, TokenGate | type) or callable(thing) and not hasattr(thing, "__dict__"):
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module | torch.optim.Optimizer):
        yield from _leaves(thing.state_dict(), seen)
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield repr(key)
            yield from _leaves(value, seen)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from _leaves(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from _leaves(vars(thing), seen)


def run_pass(
    evaluator: Evaluator,
    tokens: Tensor,
    device: torch.device,
    ranks: Ranks | None = None,
    batch_windows: int | None = None,
    **options,
) -> AuditGate:
    """Score `tokens` [N + 1] once more; options are AuditGate's."""
    gate = AuditGate(tokens, device, **options)
    with contextlib.suppress(StreamEnded):
        gate.reported = evaluator.score(gate, ranks or Ranks(0, 1, device), batch_windows)
    return gate


def flipped(tokens: Tensor, target: int, vocab_size: int, shift: int = 1) -> Tensor:
    """The stream with another token in the place of one target."""
    changed = tokens.clone()
    changed[target + 1] = (changed[target + 1] + 1 + shift % (vocab_size - 1)) % vocab_size
    return changed


def differing(before: Tensor, after: Tensor) -> tuple[int, float]:
    """How many scores differ in their bits, and by how much at most, in nats; a score only one of them has differs."""
    differ = (before != after) & ~(before.isnan() & after.isnan())
    return int(differ.sum()), float((after - before)[differ].abs().nan_to_num(torch.inf).max()) if differ.any() else 0.0
