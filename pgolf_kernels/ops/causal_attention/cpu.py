"""Causal attention in C++ (csrc/causal_attention): hands tensors over as pointers.

Backward needs the softmax's normaliser, which is saved, and y; where the own value is excluded, y as it was before,
because the excluded part has a gradient through both y and v. `isa` forces an instruction set, for tests.
"""

import torch
from torch import Tensor

from ... import extension


def why_not(q: Tensor, k: Tensor, v: Tensor, exclude_self: bool) -> str | None:
    """None if the C++ kernel can run these arguments."""
    if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernel needs float32 or bfloat16 CPU tensors, got {q.dtype} on {q.device}"
    if k.device != q.device or v.device != q.device:
        return f"the C++ kernel needs q, k and v on one device, got {q.device}, {k.device} and {v.device}"
    return extension.WHY_NOT_CPU


def _problem(q: Tensor, k: Tensor, exclude_self: bool):
    B, T, H, d = q.shape
    return extension.cpu.CausalAttention(
        sizes=(B, T, H, k.shape[2], d), bf16=q.dtype == torch.bfloat16, exclude_self=exclude_self
    )


def forward(q: Tensor, k: Tensor, v: Tensor, exclude_self: bool, isa: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, T, H, d), y with the own value still in it (empty unless excluded), and lse (B, H, T) float32.

    lse: log2 of the softmax's normaliser.
    """
    B, T, H, d = q.shape
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    y, lse = torch.empty_like(q), torch.empty(B, H, T)
    with_self = torch.empty_like(q) if exclude_self else q.new_empty(0)
    if q.numel():
        _problem(q, k, exclude_self).forward(
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            y=y.data_ptr(),
            y_with_self=with_self.data_ptr(),
            lse=lse.data_ptr(),
            threads=torch.get_num_threads(),
            isa=isa,
        )
    return y, with_self, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y_with_self: Tensor, lse: Tensor, exclude_self: bool, isa: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv. y_with_self: forward's second result, or its first if nothing was excluded."""
    dy, q, k, v = dy.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel():
        _problem(q, k, exclude_self).backward(
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            dy=dy.data_ptr(),
            y_with_self=y_with_self.data_ptr(),
            lse=lse.data_ptr(),
            dq=dq.data_ptr(),
            dk=dk.data_ptr(),
            dv=dv.data_ptr(),
            threads=torch.get_num_threads(),
            isa=isa,
        )
    else:
        dk.zero_(), dv.zero_()  # keys without queries: d or the number of heads is 0
    return dq, dk, dv
