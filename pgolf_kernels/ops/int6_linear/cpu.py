"""int6_linear in C++ (csrc/int6_linear): hands tensors over as pointers. `isa` forces an instruction set, for tests.

The surprise: at one row of x the product takes seven microseconds, as long as a registered op takes to be called. So a
call that nobody needs to see goes straight to the kernel, and every attribute that is read on the way counts.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ... import extension

_DTYPES = (torch.bfloat16, torch.float32)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The product's dtype: autocast's, if it is on and takes x's."""
    if torch.is_autocast_enabled("cpu") and x.dtype is not torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def why_not(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> str | None:
    """None if the C++ kernel can run these arguments."""
    if not x.is_cpu or compute_dtype(x) not in _DTYPES:
        return f"the C++ kernel needs CPU tensors and a product in float32 or bfloat16, got {_describe(x)}"
    if in_transform():
        return "the C++ kernel has no rule for forward-mode derivatives and torch.func's transforms"
    return extension.WHY_NOT_CPU


def in_transform() -> bool:
    """Whether a forward-mode derivative or a transform of torch.func is under way, for which no op has a rule."""
    return not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _describe(x: Tensor) -> str:
    cast = f" in {compute_dtype(x)}" if x.is_cpu and compute_dtype(x) is not x.dtype else ""
    return f"{x.dtype} on {x.device}{cast}"


def run(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y as reference.forward has it, differentiable in x and bias, one node to torch.compile."""
    dtype = compute_dtype(x)
    if x.dtype is not dtype:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if is_plain(x, bias):
        return forward(x, packed, scale, bias)
    return torch.ops.pgolf.int6_linear_cpu(x, packed, scale, bias)


def is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether no compiler, gradient, subclass or mode has to see the call."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and torch._C._len_torch_dispatch_stack() == 0
    )


def forward(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, isa: str = "") -> Tensor:
    """Return x W^T + bias in x's dtype, float32 or bfloat16."""
    *batch, k = x.shape
    n = scale.numel()
    x, scale = x.contiguous(), scale.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    y = x.new_empty(*batch, n)
    extension.cpu.int6_linear(
        x.data_ptr(),
        packed.data_ptr(),
        packed.numel(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // k if k else y.numel() // max(n, 1),
        n,
        k,
        x.dtype is torch.bfloat16,
        torch.get_num_threads(),
        isa,
    )
    return y
