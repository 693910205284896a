"""Newton-Schulz in C++ (csrc/newton_schulz): hands tensors over as pointers, and chooses the blocks of steps.

The surprise: bfloat16 is more accurate here than in the reference, in spite of blocks of several steps: the kernel
splits multiples of the identity off and keeps what roundings lose. `isa` forces an instruction set, for tests.
"""

import functools

import torch
from torch import Tensor

from ... import extension
from .schedule import Steps, blocks_of, single_steps

DTYPES = (torch.float32, torch.bfloat16)
GRAM_FORM_RATIO = 1.25  # long / short from which blocks of several steps need less arithmetic
GRAM_FORM_ROWS = 64  # of `short`; fewer cost little anyway, and lose more accuracy
MANY_ROWS = 512  # of `short`; errors of the Gram matrix fall with it


def why_not(g: Tensor, _steps: Steps, _row_normalize: bool, _eps: float, dtype: torch.dtype) -> str | None:
    """None if the C++ kernel can run these arguments."""
    if g.device.type != "cpu" or g.dtype not in DTYPES or dtype not in DTYPES:
        return f"the C++ kernel takes and gives float32 or bfloat16 on the CPU, got {g.dtype} on {g.device} for {dtype}"
    if g.requires_grad and torch.is_grad_enabled():
        return "the C++ kernel has no backward, and g requires a gradient"
    return extension.WHY_NOT_CPU


@functools.cache
def blocks(steps: Steps, short: int, long: int, dtype: torch.dtype) -> tuple[Steps, ...]:
    """Steps between two products with X, such that no spectrum loses much more accuracy than in the plain loop.

    The bounds on growth are measured, on spectra of a few large singular values and the rest at 1e-3 to 0.1, where
    blocks do worst. What bfloat16 loses to rounding the kernel keeps; float32 has nothing finer to keep it in.
    """
    if short < GRAM_FORM_ROWS or long < GRAM_FORM_RATIO * short:
        return single_steps(steps)
    if dtype == torch.bfloat16:
        return blocks_of(steps)
    return blocks_of(steps, 40.0, 64.0) if short >= MANY_ROWS else blocks_of(steps, 16.0, 16.0)


def forward(g: Tensor, steps: Steps, row_normalize: bool, eps: float, dtype: torch.dtype, isa: str = "") -> Tensor:
    """As reference.forward."""
    out = torch.empty(g.shape, dtype=dtype)
    if g.numel() == 0:
        return out
    *_, m, n = g.shape
    bank = g.reshape(-1, m, n)
    if bank.stride(2) != 1 and bank.stride(1) != 1:
        bank = bank.contiguous()
    lines_are_rows = bank.stride(2) == 1
    extension.cpu.newton_schulz(
        bank.data_ptr(),
        sizes=bank.shape,
        strides=(bank.stride(0), bank.stride(1 if lines_are_rows else 2)),
        lines_are_rows=lines_are_rows,
        g_bf16=g.dtype == torch.bfloat16,
        out=out.data_ptr(),
        bf16=dtype == torch.bfloat16,
        steps=steps,
        blocks=[len(block) for block in blocks(tuple(steps), min(m, n), max(m, n), dtype)],
        row_normalize=row_normalize,
        eps=eps,
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return out
