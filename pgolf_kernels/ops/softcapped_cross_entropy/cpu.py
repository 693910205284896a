"""Soft-capped cross-entropy in C++ (csrc/softcapped_cross_entropy): hands tensors over as pointers.

The logits keep float32 from the product to the loss, where the reference rounds them to bfloat16 in between. `isa`
forces an instruction set, for tests.
"""

import torch
from torch import Tensor

from ... import extension


def loss_and_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    losses: Tensor,
    dlogits: Tensor | None,
    softcap: float,
    ignore_index: int,
    row_weight: float,
    isa: str = "",
) -> None:
    """Fill losses [T] float32 and, if it is given, dlogits [T, V] with row_weight times the gradient.

    hidden [T, D] and weight [V, D]: float32 or bfloat16; targets [T] int64; all contiguous, and so are the rows of
    dlogits. A row with an unknown target gets NaN in both, one with ignore_index 0 in both.
    """
    extension.cpu.softcapped_cross_entropy(
        hidden=hidden.data_ptr(),
        weight=weight.data_ptr(),
        targets=targets.data_ptr(),
        sizes=(*hidden.shape, len(weight)),
        bf16=hidden.dtype == torch.bfloat16,
        softcap=softcap,
        ignore_index=ignore_index,
        row_weight=row_weight,
        losses=losses.data_ptr(),
        dlogits=0 if dlogits is None else dlogits.data_ptr(),
        pitch=0 if dlogits is None else dlogits.stride(0),
        threads=torch.get_num_threads(),
        isa=isa,
    )
