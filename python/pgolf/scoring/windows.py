"""Which windows see which tokens, and which of them each window scores: every target exactly once, or the legacy rule.

A window holds inputs [start, start + length) and their next tokens as targets; it scores its targets from `score_from`
on and has the earlier ones as context only. With stride = seq_len windows do not overlap and all of each is scored.
The legacy rule of most published systems lists windows to the very end of the stream, so the last `stride` targets are
scored seq_len / stride times, with ever less context: 1,984 targets too many at 64 of 2,048.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Window:
    start: int
    length: int
    score_from: int


def make_windows(num_targets: int, seq_len: int, stride: int, rule: str = "exact") -> list[Window]:
    """The first window scores all it holds, every later one its last `stride` targets.

    Args:
        rule: "exact" ends with the window that holds the last target first; "legacy" goes on to the end of the stream;
            "legacy-full" is that without windows shorter than the stride.

    Raises:
        InputError: there is nothing to score.
    """
    if num_targets < 1:
        raise InputError(
            f"nothing to score: the validation split has {num_targets + 1} tokens, two are needed at least"
        )
    if rule != "exact":
        windows = []
        for start in range(0, num_targets, stride):
            length = min(seq_len, num_targets - start)
            if rule == "legacy" or length >= stride or start == 0:
                windows.append(Window(start, length, max(length - stride, 0) if start else 0))
        return windows
    windows = []
    for start in range(0, max(num_targets - (seq_len - stride), 1), stride):
        length = min(seq_len, num_targets - start)
        windows.append(Window(start, length, 0 if start == 0 else seq_len - stride))
    return windows


def gather_batch(tokens: Tensor, windows: list[Window], seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets (padded with 0 behind short windows) and the mask of scored targets, each [windows, seq_len].

    Args:
        tokens: the whole stream, [N + 1] int64.
    """
    x = torch.zeros(len(windows), seq_len, dtype=torch.int64)
    y = torch.zeros_like(x)
    scored = torch.zeros_like(x, dtype=torch.bool)
    for i, w in enumerate(windows):
        x[i, : w.length] = tokens[w.start : w.start + w.length]
        y[i, : w.length] = tokens[w.start + 1 : w.start + w.length + 1]
        scored[i, w.score_from : w.length] = True
    return x, y, scored
