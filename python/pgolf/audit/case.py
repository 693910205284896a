"""What the tests T1 to T12 are given, and what each gives back."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Config
from ..data.byte_counts import ByteCounts
from ..data.dataset import Dataset
from ..model import GPT
from .passes import AuditGate, run_pass
from .protocol import Evaluator

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"


@dataclass(frozen=True)
class Budget:
    """How much is tried. The defaults audit an artifact of a few million parameters in about a minute.

    Attributes:
        flips: single tokens replaced by T1, one pass up to each.
        cuts: places where T2 and T5 cut the stream, to try the whole vocabulary behind it; and T3 to cut or replace it.
        positions: targets at these places, together, for which T5 tries the vocabulary.
        sample_tokens: tokens that T9 samples; 0: as many as the audited stream has.
        level: the chance that T9 calls an honest evaluator a leak, at most.
        train_tokens: of the training split, read by T10; 0: all.
        rank_processes: T4 starts two real processes; False: two ranks in turn, where no state is exchanged.
        limit_seconds: of training and of evaluation, for T11.
    """

    flips: int = 8
    cuts: int = 3
    positions: int = 48
    sample_tokens: int = 0
    level: float = 1e-6
    train_tokens: int = 100_000_000
    rank_processes: bool = True
    limit_seconds: float = 600.0


@dataclass
class Case:
    """An evaluator and the stream it is audited on.

    Attributes:
        tokens: [N + 1] int64: the first N targets of the validation stream.
        byte_counts: of the vocabulary.
        source, cfg: the frozen model and its windows, from which T9 samples; None: it is not run.
        dataset, artifact: for T8's text, T10 and for T11, T12; None: they are not run.
        sampled: T9's stream, where several cases share one; None: it is sampled.
        clocks: T11's, filled by whoever read and built the model; total_targets: of the whole validation stream.
    """

    evaluator: Evaluator
    tokens: Tensor
    vocab_size: int
    byte_counts: ByteCounts
    device: torch.device
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    source: GPT | None = None
    cfg: Config | None = None
    dataset: Dataset | None = None
    artifact: Path | None = None
    sampled: tuple[Tensor, Tensor] | None = None
    clocks: dict[str, float] = field(default_factory=dict)
    total_targets: int = 0

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1

    @functools.cached_property
    def base(self) -> AuditGate:
        """The evaluator's pass over the stream as it is, with the ledger of its state: what the others compare with."""
        return self.run(self.tokens, ledger=True)

    def run(self, tokens: Tensor, **options) -> AuditGate:
        """A pass over another stream; the length of the text stays known as that of this one."""
        planned = options.pop("planned_targets", self.num_targets)
        return run_pass(self.evaluator, tokens, self.device, planned_targets=planned, **options)

    def generator(self, test: str) -> torch.Generator:
        """Random numbers of one test, whichever tests ran before it."""
        return torch.Generator().manual_seed(self.seed * 1000 + int(test.removeprefix("T")))


class Finding(NamedTuple):
    """A verdict, one sentence why, and the numbers behind it (JSON values)."""

    verdict: str
    detail: str
    figures: dict

    @classmethod
    def of(cls, holds: bool, detail: str, **figures) -> "Finding":
        return cls(PASS if holds else FAIL, detail, figures)

    @classmethod
    def not_run(cls, detail: str) -> "Finding":
        return cls(NOT_RUN, detail, {})
