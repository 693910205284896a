"""Exponential moving average of the weights, in float32, without bias correction: it starts at the initial weights."""

import torch
from torch import Tensor, nn


class WeightAverage:
    """Args: model: whose parameters are averaged. decay: share kept at each update, in [0, 1)."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._named = dict(model.named_parameters())
        self.average = {name: p.detach().float().clone() for name, p in self._named.items()}

    @torch.no_grad()
    def update(self) -> None:
        weights = [p.float() for p in self._named.values()]  # no copy of those that are float32
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        for name, p in self._named.items():
            p.copy_(self.average[name])

    def load(self, average: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(average[name])
