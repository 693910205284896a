"""Moving averages of weights that an optimiser keeps up to date: a <- a + (1 - decay) (p - a) at the end of a step.

The surprise is where they are computed: a GPU's update has p in a register already, so the average costs its own bytes
and no launch.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..dispatch import require


class Averages:
    """`of` maps parameters to the tensors that follow them; empty: nothing is averaged."""

    def __init__(self, op: str, params: Iterable[Tensor], of: Mapping[Tensor, Tensor], decay: float) -> None:
        require(0 <= decay <= 1, op, "the average's decay must be in [0, 1]", decay)
        owned = set(params)
        for p, a in of.items():
            require(p in owned, op, "averages must follow parameters of this optimiser", f"one of {tuple(p.shape)}")
            fits = a.shape == p.shape and a.device == p.device and a.dtype in (torch.float32, p.dtype)
            must = f"the average of {p.dtype} {tuple(p.shape)} on {p.device} must be alike, or float32"
            require(fits, op, must, f"{a.dtype} {tuple(a.shape)} on {a.device}")
        self.of, self.decay = dict(of), decay

    def dtype(self, p: Tensor) -> torch.dtype | None:
        """Of the average of p; None if it has none."""
        return self.of[p].dtype if p in self.of else None

    def follow(self, params: Iterable[Tensor]) -> None:
        """Move the averages of `params`, for an update that did not do so itself."""
        alike: dict[bool, list[Tensor]] = {True: [], False: []}
        for p in params:
            if p in self.of:
                alike[self.of[p].dtype == p.dtype].append(p)
        for p in alike[False]:
            self.of[p].lerp_(p.to(self.of[p].dtype), 1 - self.decay)
        if same := alike[True]:
            torch._foreach_lerp_([self.of[p] for p in same], same, 1 - self.decay)
