"""Averages of the weights while they train, in float32: what a run exports, validates last and calibrates GPTQ with.

"ema" is exponential and starts at the initial weights, without bias correction. "swa" is the mean of snapshots taken
every swa_every steps once the learning rate's multiplier is below swa_start; "lawa" that of the last lawa_k snapshots,
one every lawa_every steps. The surprise: the published systems collected SWA's and exported the EMA all the same.
Sources: openai/parameter-golf #1128 (when snapshots are taken); arXiv 1803.05407 (SWA); arXiv 2209.14981 (LAWA).
"""

import torch
from torch import Tensor, nn

from ..config import Config


class ExponentialAverage:
    """Args: model: whose parameters are averaged. decay: share kept at each update, in [0, 1)."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._named = dict(model.named_parameters())
        self.average = {name: p.detach().float().clone() for name, p in self._named.items()}

    @torch.no_grad()
    def update(self, step: int, lr_multiplier: float) -> None:
        """Take in the weights after training step `step`, counted from 1."""
        weights = [p.float() for p in self._named.values()]  # no copy of those that are float32
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.decay)

    @torch.no_grad()
    def copy_to_model(self) -> bool:
        """Replace the weights by their average. Returns False, and leaves them, where there is none yet."""
        for name, p in self._named.items():
            p.copy_(self.average[name])
        return True

    def state_tensors(self) -> dict[str, Tensor]:
        return self.average

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])

    @torch.no_grad()
    def reset(self) -> None:
        """Begin anew, from the weights as they are."""
        for name, p in self._named.items():
            self.average[name].copy_(p)


class SnapshotAverage:
    """The mean of float32 snapshots.

    Args:
        model: whose parameters are averaged.
        every: steps between snapshots.
        below: learning-rate multiplier from which on they are taken.
        keep: only the last so many count; 0: all of them do, and only their sum is held.
    """

    def __init__(self, model: nn.Module, every: int, below: float, keep: int = 0):
        self.every, self.below, self.keep = every, below, keep
        self._named = dict(model.named_parameters())
        self.reset()

    def reset(self) -> None:
        """Forget every snapshot."""
        self.count = 0  # snapshots in the mean
        self.snapshots: list[dict[str, Tensor]] = []  # oldest first; without `keep` their sum alone

    @torch.no_grad()
    def update(self, step: int, lr_multiplier: float) -> None:
        """Take in the weights after training step `step`, counted from 1."""
        if step % self.every or lr_multiplier >= self.below:
            return
        if self.count and not self.keep:
            total = self.snapshots[0]
            torch._foreach_add_(list(total.values()), [self._named[name].float() for name in total])
            self.count += 1
            return
        self.snapshots = self.snapshots[-self.keep + 1 :] if self.keep > 1 else []
        self.snapshots.append({name: p.detach().float().clone() for name, p in self._named.items()})
        self.count = len(self.snapshots)

    @torch.no_grad()
    def copy_to_model(self) -> bool:
        """Replace the weights by their average. Returns False, and leaves them, where there is none yet."""
        for name, p in self._named.items():
            if self.count:
                total = self.snapshots[0][name].clone()
                for snapshot in self.snapshots[1:]:
                    total += snapshot[name]
                p.copy_(total / self.count)
        return self.count > 0

    def state_tensors(self) -> dict[str, Tensor]:
        tensors = {f"{i}.{name}": value for i, s in enumerate(self.snapshots) for name, value in s.items()}
        return tensors | {"count": torch.tensor(self.count)}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        self.count = int(state["count"])
        held = sum(key.endswith(f".{next(iter(self._named))}") for key in state)
        self.snapshots = [
            {name: state[f"{i}.{name}"].to(p.device, copy=True) for name, p in self._named.items()} for i in range(held)
        ]


def make_average(model: nn.Module, cfg: Config) -> ExponentialAverage | SnapshotAverage | None:
    """What cfg.average means; None: the last weights are exported."""
    if not cfg.averages:
        return None
    if cfg.average == "swa":
        return SnapshotAverage(model, cfg.swa_every, cfg.swa_start)
    if cfg.average == "lawa":
        return SnapshotAverage(model, cfg.lawa_every, float("inf"), cfg.lawa_k)
    return ExponentialAverage(model, cfg.ema_decay)
