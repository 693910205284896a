"""Which dtype a machine multiplies fast, and a product that takes heed of it."""

import torch
from torch import Tensor


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are fast (GPUs from Ampere on, CPUs with AMX or AVX-512 BF16), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; of bfloat16 a float32 product of the same numbers where PyTorch is many times faster that way.

    The caller rounds, once it is done with the product. A CPU that has AVX2 only multiplies float32 50 times as fast.
    """
    if a.device.type == "cpu" and a.dtype == b.dtype == torch.bfloat16:
        dtype = default_compute_dtype(a.device)
        return a.to(dtype) @ b.to(dtype)
    return a @ b
