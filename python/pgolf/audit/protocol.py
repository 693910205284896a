"""What an evaluator must be to be audited: one method that scores a stream through a gate.

    class Mine:
        partition = "free"

        def score(self, gate, ranks, batch_windows=None):
            for windows in ...:
                batch = gate.open(windows, seq_len)                  # inputs, [B, T]
                log_p = ...                                          # from the inputs and what was learned so far
                nll = gate.score(batch, lambda targets: ...)         # targets [B, T] -> nll of the scored ones
                learn(gate.committed(first, end))                    # scored targets only

The real evaluator is audited through the same protocol: its score_stream makes the very same calls. docs/auditing.md
has a whole example. What surprises: the auditor learns everything it knows from the gate, and an evaluator that goes
around the gate is caught by the tests that only compare scores.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..config import Config
from ..data.byte_counts import ByteCounts
from ..distributed import Ranks
from ..errors import InputError
from ..evaluate import score_method
from ..model import GPT
from ..scoring.gate import TokenGate
from ..scoring.objective import SHARES
from ..scoring.stream import Score

FREE, DECLARED, BY_LENGTH = "free", "declared", "by length"


class Evaluator(Protocol):
    """Scores every target of a stream once, from left to right.

    Attributes:
        partition: what the scores may depend on besides the tokens before them. "free": nothing, so the number of
            windows that share a batch must not matter, and T4 changes it. "declared": how the windows are cut into
            batches is part of the method, as where a fit is carried from batch to batch. "by length": that cut changes
            with the length of the text, so T3 does not cut it short.
    """

    partition: str

    def score(self, gate: TokenGate, ranks: Ranks, batch_windows: int | None = None) -> Score | None:
        """Score the gate's stream.

        Args:
            gate: open batches, score them, learn from what is committed.
            ranks: this process's place; rank r of n scores its share. All of it in a single process.
            batch_windows: windows per batch; None: as the evaluator likes.

        Returns:
            What it would report, which is then checked against the gate's own log; None if it reports nothing.
        """


@dataclass(frozen=True)
class Subject:
    """What an evaluator of the user's is made from: the frozen model of the artifact, its config, its byte counts."""

    model: GPT
    cfg: Config
    byte_counts: ByteCounts

    @property
    def device(self) -> torch.device:
        return self.model.tok_emb.weight.device


@dataclass(frozen=True)
class PgolfEvaluator:
    """`pgolf eval --method METHOD`: score_method itself, with the fields of a config."""

    method: str
    cfg: Config
    model: GPT
    byte_counts: ByteCounts

    @property
    def partition(self) -> str:
        share = SHARES[self.cfg.slot_share]
        carries = share.leak is None and (share.shared or self.cfg.slot_warm_start)
        if "slot" not in self.method.split("+") or not carries:
            return FREE
        return DECLARED if self.cfg.eval_slices == 1 else BY_LENGTH

    @property
    def permuted(self) -> bool:
        """Whether windows are dealt to slices in turn, as some published runs did: declared, but not left to right."""
        return self.cfg.eval_interleave and "ttt" not in self.method and self.method != "plain"

    @property
    def learns_after(self) -> int:
        """Targets before the first that is scored by what was learned from a chunk; 0: there are no chunks."""
        return self.cfg.ttt_chunk_tokens if "ttt" in self.method.split("+") else 0

    def score(self, gate: TokenGate, ranks: Ranks, batch_windows: int | None = None) -> Score:
        cfg = self.cfg if batch_windows is None else self.cfg.replace(eval_batch_windows=batch_windows)
        return score_method(self.method, cfg, self.model, gate, self.byte_counts, ranks)


def load_evaluator(spec: str, subject: Subject) -> Evaluator:
    """The evaluator that `module:object` makes of a subject; modules are looked for in the current folder, too.

    Raises:
        InputError: there is no such object, or what it makes is no evaluator.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not module_name or not name:
        raise InputError(f"audit: --evaluator must read module:object, got {spec!r}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        make = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"audit: --evaluator {spec} could not be loaded: {error}") from error
    evaluator = make(subject)
    if getattr(evaluator, "partition", None) not in (FREE, DECLARED, BY_LENGTH) or not hasattr(evaluator, "score"):
        raise InputError(
            f"audit: --evaluator {spec} must make an object with `score` and `partition` {FREE!r}, {DECLARED!r} or "
            f"{BY_LENGTH!r}, got {type(evaluator).__name__}"
        )
    return evaluator
