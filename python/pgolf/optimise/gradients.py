"""All gradients in one flat buffer per dtype: one all-reduce, one norm, one zeroing, however many parameters.

Those that an optimiser reduces by itself come first, and the all-reduce begins behind them.

That is one float32 buffer, `flat`, and a bfloat16 one beside it if the config keeps tables in bfloat16.
"""

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import nn


class GradientBuffer:
    """Every parameter's `.grad` is a view of a buffer, so that backward accumulates into it.

    Args:
        not_reduced: parameters whose gradients `all_reduce` leaves as this rank has them.
    """

    def __init__(self, model: nn.Module, not_reduced: Collection[nn.Parameter] = ()):
        apart = {id(p) for p in not_reduced}
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {torch.float32: []}
        for p in sorted(model.parameters(), key=lambda p: id(p) not in apart):
            by_dtype.setdefault(p.dtype, []).append(p)
        self.buffers = [_buffer(dtype, parameters) for dtype, parameters in by_dtype.items()]
        self.flat = self.buffers[0]
        self._reduced = [
            buffer[sum(p.numel() for p in parameters if id(p) in apart) :]
            for buffer, parameters in zip(self.buffers, by_dtype.values(), strict=True)
        ]

    def zero(self) -> None:
        for buffer in self.buffers:
            buffer.zero_()

    def all_reduce(self, process_group) -> None:
        """Sum over ranks; the loss is already divided by the global token count."""
        if process_group is not None:
            for gradients in self._reduced:
                dist.all_reduce(gradients, group=process_group)

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale to global norm `max_norm` at most (0: never). Returns the norm before, as a tensor on the device."""
        norm = self.flat.norm()
        for buffer in self.buffers[1:]:
            norm = torch.hypot(norm, buffer.float().norm())
        if max_norm > 0:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for buffer in self.buffers:
                buffer.mul_(scale)
        return norm


def _buffer(dtype: torch.dtype, parameters: list[nn.Parameter]) -> torch.Tensor:
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=parameters[0].device)
    for p, piece in zip(parameters, flat.split(sizes), strict=True):
        p.grad = piece.view_as(p)
    return flat
