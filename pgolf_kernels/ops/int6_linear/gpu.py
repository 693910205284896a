"""int6_linear on a GPU: which of three ways for how many rows of x, and the calls.

    "cuda"        csrc/int6_linear/int6_linear_cuda.cu: a launch that reads the codes once for 16 rows, and is done
    "triton"      triton_kernel.forward: the same for up to 64 rows, in bfloat16 and float16
    "dequantize"  triton_kernel.dequantize, then PyTorch's product: two launches, and W in 16 bits

The surprise is how late the third must win: a launch costs as much as reading ten megabytes, more than a layer of the
models this library is for has.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import extension, tiles
from ...dispatch import autocast_dtype, self_check, why_not_counted, why_not_triton
from . import cpu, reference

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/bindings_cuda.cpp has them


class Borders(NamedTuple):
    """The most rows of x up to which "cuda" is the fastest, and "triton" after it."""

    cuda: int
    triton: int


@torch.compiler.assume_constant_result  # a compiler would follow it into the files
def borders(device: torch.device) -> Borders:
    """From the GPU's table (pgolf_kernels/tiles).

    The shipped ones are reasoned from bytes and measured on no GPU yet, so all have the same. Up to 16 rows, the tensor
    cores' tile, the CUDA kernel does nothing twice. Up to 64 one tile of Triton's covers x and W is read once, 0.75
    bytes a weight in one launch; dequantising moves 0.75 + 2 + 2 in two, but its product decodes nothing and has the
    vendor's tiles.
    """
    return tiles.tile(tiles.gpu(device), "int6_linear", "borders", Borders)


def order(x: Tensor) -> tuple[str, ...]:
    """The ways, fastest first for that many rows of x."""
    rows, border = x.numel() // max(1, x.shape[-1]), borders(x.device)
    if rows <= border.cuda:
        return "cuda", "triton", "dequantize"
    if rows <= border.triton:
        return "triton", "cuda", "dequantize"
    return "dequantize", "triton", "cuda"


def compute_dtype(x: Tensor) -> torch.dtype:
    """The product's dtype: autocast's, if it is on and takes x's."""
    return (None if x.dtype is torch.float64 else autocast_dtype(x.device)) or x.dtype


def why_not_cuda(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> str | None:
    """None if the CUDA kernel can run these arguments."""
    dtype = compute_dtype(x)
    if not x.is_cuda or dtype not in _DTYPES:
        return f"the CUDA kernel needs CUDA tensors in float32, bfloat16 or float16, got {dtype} on {x.device}"
    if cpu.in_transform():
        return "the CUDA kernel has no rule for forward-mode derivatives and torch.func's transforms"
    if reason := extension.why_not_cuda(x.device):
        return reason
    most = extension.cuda.INT6_MAX_SIZE
    if max(x.shape[-1], scale.shape[0]) > most:
        return f"the CUDA kernel needs N and K of at most {most}, got {scale.shape[0]} and {x.shape[-1]}"
    return None


def why_not_tiles(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> str | None:
    """None if Triton's linear layer can run these arguments."""
    if reason := why_not_triton(x, packed):
        return reason
    if compute_dtype(x) not in (torch.bfloat16, torch.float16):
        return f"the Triton kernel covers bfloat16 and float16, got {compute_dtype(x)}"
    if cpu.in_transform():
        return "the Triton kernel has no rule for forward-mode derivatives and torch.func's transforms"
    return why_not_counted(rows=x.numel() // x.shape[-1], features=max(x.shape[-1], scale.shape[0]))


def why_not_dequantize(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> str | None:
    """None if W can be dequantised by Triton; the product after it takes any x."""
    return why_not_triton(packed)


def run_cuda(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y as reference.forward has it, differentiable in x and bias, one node to torch.compile."""
    x, bias = _cast(x, bias)
    if cpu.is_plain(x, bias):
        return forward(x, packed, scale, bias)
    return torch.ops.pgolf.int6_linear_cuda(x, packed, scale, bias)


def run_tiles(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y as reference.forward has it, differentiable in x and bias, one node to torch.compile."""
    x, bias = _cast(x, bias)
    if cpu.is_plain(x, bias):
        return forward_tiles(x, packed, scale, bias)
    return torch.ops.pgolf.int6_linear_triton(x, packed, scale, bias)


def run_dequantize(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y as reference.forward has it: W is one node to torch.compile, the product PyTorch's."""
    x, bias = _cast(x, bias)
    return F.linear(x, torch.ops.pgolf.int6_dequantize(packed, scale, x.shape[-1], x.dtype), bias)


def _cast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype = compute_dtype(x)
    return (x, bias) if x.dtype is dtype else (x.to(dtype), None if bias is None else bias.to(dtype))


def forward(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias by the CUDA kernel, in x's dtype."""
    *batch, K = x.shape
    N = scale.shape[0]
    y = x.new_empty(*batch, N)
    if K == 0 or y.numel() == 0:
        return y.zero_() if bias is None else y.copy_(bias)
    x, scale, bias = x.contiguous(), scale.contiguous(), None if bias is None else bias.contiguous()
    device = x.get_device() if x.is_cuda else 0
    extension.cuda.int6_linear(
        x.data_ptr(),
        packed.data_ptr(),
        packed.numel(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        y.numel() // N,
        N,
        K,
        _DTYPES[x.dtype],
        device,
        torch._C._cuda_getCurrentRawStream(device) if x.is_cuda else 0,
    )
    return y


def forward_tiles(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias by Triton, in x's dtype."""
    from . import triton_kernel  # Triton may be missing, and takes a second to import

    self_check("int6_linear", x.device, lambda: _probe(x.device))
    return triton_kernel.forward(x, packed, scale, bias)


def _probe(device: torch.device) -> tuple[Tensor, Tensor]:
    """A layer of a few tiles by Triton and in float64."""
    from . import triton_kernel

    codes = torch.randint(-31, 32, (64, 256), device=device, dtype=torch.int8)
    packed, scale = reference.pack(codes), torch.rand(64, device=device).half() + 0.5
    x = torch.randn(32, 256, device=device).bfloat16()
    exact = reference.forward(x.double(), packed, scale, None)
    return triton_kernel.forward(x, packed, scale, None), exact


def dequantize_by_triton(packed: Tensor, scale: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    """W [N, num_columns] in dtype."""
    from . import triton_kernel

    return triton_kernel.dequantize(packed, scale, num_columns, dtype)


def dequantize(packed: Tensor, scale: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    """reference.dequantize, on a GPU in one launch where Triton is."""
    if packed.is_cuda and why_not_triton(packed) is None:
        return torch.ops.pgolf.int6_dequantize(packed, scale, num_columns, dtype)
    return reference.dequantize(packed, scale, num_columns, dtype)
