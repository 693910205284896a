"""All gradients in one flat float32 buffer: one all-reduce, one norm, one zeroing, however many parameters."""

import torch
import torch.distributed as dist
from torch import nn


class GradientBuffer:
    """Every parameter's `.grad` is a view of `flat`, so that backward accumulates into it."""

    def __init__(self, model: nn.Module):
        parameters = list(model.parameters())
        self.flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        for p, piece in zip(parameters, self.flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = piece.view_as(p)

    def zero(self) -> None:
        self.flat.zero_()

    def all_reduce(self, process_group) -> None:
        """Sum over ranks; the loss is already divided by the global token count."""
        if process_group is not None:
            dist.all_reduce(self.flat, group=process_group)

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale to global norm `max_norm` at most (0: never). Returns the norm before, as a tensor on the device."""
        norm = self.flat.norm()
        if max_norm > 0:
            self.flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
