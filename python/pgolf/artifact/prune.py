"""Make an artifact fit a number of bytes: the codes of size 1 that cost least become zero.

Setting a code +-1 of a row with scale s to zero changes one weight by s, so it costs s^2 of squared error and saves a
few bits. The cheapest go first, equal ones layer by layer; under the published floor nearly all are equal, so the
first layers' go. How many bytes n zeros save is only known by compressing: the published system takes
8 x the excess bytes and hopes; here that is the first guess of a search by regula falsi that measures every try.
Source: openai/parameter-golf #1333 ("selective +-1 pruning").
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..errors import InputError
from .quantise import CodedTensor

LAYER_ORDER = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")  # as the published modules
MAX_TRIES = 8
CLOSE_ENOUGH = 0.02  # of the excess: a search ends this near below the target


@dataclass(frozen=True)
class Pruning:
    """What was zeroed. cost: sum of s^2 over it; bytes: of artifact and code; tries: compressions, with the first."""

    zeroed: int
    candidates: int
    cost: float
    bytes_before: int
    bytes_after: int
    tries: int


class Candidates:
    """The codes of size 1 of an artifact's matrices, cheapest first; matrices: names of coded tensors."""

    def __init__(self, tensors: dict[str, CodedTensor], matrices: list[str]) -> None:
        self.tensors, self.matrices = tensors, matrices
        self.masks = [tensors[name].values.abs() == 1 for name in matrices]
        steps = [
            tensors[name].scale.float().square()[:, None].expand_as(mask)[mask]
            for name, mask in zip(matrices, self.masks, strict=True)
        ]
        cost = torch.cat(steps) if steps else torch.empty(0)
        self.cost, self.order = cost.sort(stable=True)

    def __len__(self) -> int:
        return len(self.order)

    def without(self, count: int) -> dict[str, CodedTensor]:
        """All tensors, with the `count` cheapest codes set to zero."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[self.order[:count]] = False
        tensors = dict(self.tensors)
        parts = kept.split([int(mask.sum()) for mask in self.masks])
        for name, mask, part in zip(self.matrices, self.masks, parts, strict=True):
            t, values = tensors[name], tensors[name].values.clone()
            values[mask] *= part
            tensors[name] = CodedTensor(t.role, t.shape, values, t.scale)
        return tensors


def layer_by_layer(names: Iterable[str]) -> list[str]:
    """Names of matrices in the order in which equal codes go: those outside the layers first."""

    def place(name: str) -> tuple[int, int]:
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
        return (int(match[1]), LAYER_ORDER.index(match[2])) if match and match[2] in LAYER_ORDER else (-1, 0)

    return sorted(names, key=place)


def prune(
    tensors: dict[str, CodedTensor],
    matrices: list[str],
    target_bytes: int,
    measure: Callable[[dict[str, CodedTensor]], int],
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, CodedTensor], Pruning]:
    """Zero as few codes of `matrices` as it takes.

    Args:
        measure: bytes of artifact and code for given tensors; called at most MAX_TRIES times.
        on_progress: called with (tries done, MAX_TRIES).

    Returns:
        The tensors, unchanged if they fit already, and what was done. measure(tensors) <= target_bytes holds.

    Raises:
        InputError: the target is out of reach even with every one of them zero.
    """
    candidates = Candidates(tensors, matrices)
    tries = 0

    def measured(count: int) -> int:
        nonlocal tries
        size = measure(candidates.without(count) if count else tensors)
        tries += 1
        if on_progress:
            on_progress(tries, MAX_TRIES)
        return size

    before = measured(0)
    if before <= target_bytes:
        return tensors, Pruning(0, len(candidates), 0.0, before, before, tries)
    excess = before - target_bytes
    low, low_over = 0, excess  # too few, and the bytes that they leave above the target
    high, high_over = len(candidates), None  # as many as there are; with a number: enough, and measured
    guess = min(8 * excess, high)
    while low < guess < high or high_over is None:
        if low == high:
            raise InputError(
                f"pack: target_bytes must be at least {target_bytes + low_over:,}, what artifact and code take with "
                f"all {high:,} codes of size 1 set to zero, got {target_bytes:,}; use fewer bits, a larger int6_floor "
                "or a smaller model"
            )
        over = measured(guess) - target_bytes
        if over > 0:
            low, low_over = guess, over
        else:
            high, high_over = guess, over
        if high_over is not None and (tries >= MAX_TRIES or -high_over <= CLOSE_ENOUGH * excess):
            break
        if high_over is not None:  # between the nearest on both sides, a little below the target
            aim = low_over + 0.5 * CLOSE_ENOUGH * excess
            guess = min(max(low + int((high - low) * aim / (low_over - high_over)), low + 1), high - 1)
        elif tries >= MAX_TRIES - 1:
            guess = high
        else:  # as much per code as up to now, and a tenth more
            guess = min(low + 1 + int(1.1 * low * low_over / max(excess - low_over, 1)), high)
    cost = candidates.cost[:high].sum(dtype=torch.float64).item()
    done = Pruning(high, len(candidates), cost, before, target_bytes + high_over, tries)
    return candidates.without(high), done
