"""T4: the scores have the same bits with one window a batch and with many, and on one rank and on two.

Catches what couples windows: a shared fit, a common step length, state that crosses ranks. Where how windows meet in a
batch is declared as part of the method, only the ranks are changed. The two ranks are processes that talk through gloo.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from ..distributed import Ranks
from .case import Case, Finding
from .passes import differing, run_pass
from .protocol import FREE, Evaluator

NAME, TITLE, CONDITION = "T4", "Batches and ranks", "C1"
BATCHES = (1, 5, 32)


def run(case: Case) -> Finding:
    figures, broken = {}, []
    if case.evaluator.partition == FREE:
        sizes = [size for size in BATCHES if size != len(case.base.batches[0])][: 2 if len(case.tokens) > 2 else 1]
        for size in sizes:
            count, largest = differing(case.base.nll, case.run(case.tokens, batch_windows=size).nll)
            figures[f"scores_changed_with_{size}_windows"] = count
            if count:
                broken.append(f"with {size} windows a batch {count:,} scores differ, by {largest:.2g} nats at most")
    try:
        two = (_in_processes if case.budget.rank_processes else _in_turn)(case)
    except Exception as error:  # whatever an evaluator of the user's raises where it has no ranks
        figures["two_ranks"] = f"not run: {type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}"
        two = None
    if two is not None:
        count, largest = differing(case.base.nll, two)
        figures["scores_changed_on_2_ranks"] = count
        if count:
            broken.append(f"on 2 ranks {count:,} scores differ, by {largest:.2g} nats at most")
    if broken:
        return Finding.of(False, broken[0], **figures)
    parts = [f"with {' and '.join(map(str, sizes))} windows a batch"] if case.evaluator.partition == FREE else []
    parts += ["on 1 and 2 ranks"] if two is not None else []
    if not parts:
        return Finding("not run", "batches are part of the method, and the evaluator knows no ranks", figures)
    fixed = "" if case.evaluator.partition == FREE else "; how windows meet in batches is part of the method"
    return Finding.of(
        True, f"all {case.num_targets:,} scores have the same bits {' and '.join(parts)}{fixed}", **figures
    )


@dataclass(frozen=True)
class _InTurn(Ranks):
    """Rank 1, then rank 0, one after the other: each hears what was said before it."""

    said: list[list] = field(default_factory=lambda: [[], []])

    def gather(self, value: object) -> list:
        own, other = self.said[self.rank], self.said[1 - self.rank]
        own.append(value)
        return [value, *other[len(own) - 1 : len(own)]]


def _in_turn(case: Case) -> Tensor:
    """Enough where ranks exchange nothing but totals. Rank 1 first: of an odd number of batches it has one more."""
    last = _InTurn(1, 2, case.device)
    first = _InTurn(0, 2, case.device, said=last.said)
    passes = [
        run_pass(case.evaluator, case.tokens, case.device, r, planned_targets=case.num_targets) for r in (last, first)
    ]
    return _joined([gate.nll for gate in passes])


def _in_processes(case: Case) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank_main,
            args=(folder, case.evaluator, case.tokens, case.device, torch.get_num_threads()),
            nprocs=2,
            start_method="spawn",
        )
        return _joined([torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)])


def _rank_main(
    rank: int, folder: str, evaluator: Evaluator, tokens: Tensor, device: torch.device, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        ranks = Ranks(rank, 2, device, dist.group.WORLD, dist.group.WORLD)
        torch.save(run_pass(evaluator, tokens, device, ranks).nll, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _joined(parts: list[Tensor]) -> Tensor:
    """Each target's score of the rank that has it."""
    first, second = parts
    return torch.where(first.isnan(), second, first)
