"""Banks: matrices of one shape in one group, the unit in which Muon orthogonalises and ranks exchange.

A loose matrix is a bank of one; parameters whose matrices have one shape make up one bank.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..matmul import default_compute_dtype

ADJUST_LR: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
}


@dataclass(eq=False)
class Bank:
    """What a step knows of a bank: its gradient, then this rank's updates, then all updates orthogonalised.

    gradient, updates: (matrices whose momentum is on this rank, rows, cols); the first only if ranks reduce it bank by
    bank. orthogonal: (matrices, rows, cols). work: what the one that is being received waits for.
    """

    group: dict[str, Any]
    params: list[Tensor]
    updates: Tensor | None = None
    gradient: Tensor | None = None
    orthogonal: Tensor | None = None
    work: dist.Work | None = None

    @property
    def num_matrices(self) -> int:
        return sum(len(as_bank(p)) for p in self.params)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the Newton-Schulz products."""
        return self.group["compute_dtype"] or default_compute_dtype(self.params[0].device)

    def key(self) -> tuple:
        """Equal for banks that one call of Newton-Schulz can take."""
        options = (self.group[name] for name in ("ns_steps", "ns_coefficients", "row_normalize", "compute_dtype"))
        return (self.updates.device, self.updates.dtype, *map(str, options))


def as_bank(t: Tensor) -> Tensor:
    """(matrices, rows, cols), a view, of a matrix or a bank."""
    return t if t.dim() == 3 else t.unsqueeze(0)


def by_matrix_shape(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters whose matrices make up one bank, in the order of first appearance (the same on every rank)."""
    alike = defaultdict(list)
    for p in params:
        alike[p.shape[-2:], p.device].append(p)
    return list(alike.values())


def calls(banks: list[Bank], apart: bool) -> list[list[Bank]]:
    """Banks that share a call of Newton-Schulz: one by one if `apart`, else all that are alike."""
    together = defaultdict(list)
    for index, bank in enumerate(banks):
        together[index if apart else bank.key()].append(bank)
    return list(together.values())


def update(group: dict[str, Any], banks: list[Bank]) -> None:
    """p <- (1 - lr wd) p - lr scale orthogonal, for the banks of a group."""
    lr = group["lr"]
    for bank in banks:
        rows, cols = bank.orthogonal.shape[-2:]
        counts = [p.numel() // (rows * cols) for p in bank.params]
        updates = [o.view_as(p) for o, p in zip(bank.orthogonal.split(counts), bank.params, strict=True)]
        if group["weight_decay"]:
            torch._foreach_mul_(bank.params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(bank.params, updates, alpha=-lr * ADJUST_LR[group["adjust_lr"]](rows, cols))
