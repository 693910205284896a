"""A linear layer of a 512-wide GPT with int6 weights, against dense weights and torch's int8 product.

One row is decoding, 16 a small batch of it, 2048 reading a prompt. A layer's weights leave the caches between two
uses, so samples rotate through as many matrices as a model has. The limit counts 6 bits per weight.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.bench import Case
from pgolf_kernels.ops.int6_linear import int6_linear, op, quantize_int6

NUM_MATRICES = 22


def _inputs(M, N, K, dtype, device):
    weight = quantize_int6(torch.randn(N, K, device=device))
    codes, scale = weight.codes(), weight.scale.to(dtype)
    return torch.randn(M, K, device=device).to(dtype), weight, weight.dequantize(dtype), codes, scale


def cases(device, quick):
    """Both matrices of an MLP at each number of rows; --quick takes a small one."""
    dtype = torch.bfloat16
    for N, K in [(96, 64)] if quick else [(1536, 512), (512, 1536)]:
        for M in (1,) if quick else (1, 16, 2048):
            x, weight, *_ = _inputs(M, N, K, dtype, device)
            able = [i.name for i in op.IMPLS if i.why_not(x, weight.packed, weight.scale, None) is None]
            peers = {"torch linear": lambda x, weight, dense, codes, scale: F.linear(x, dense)}
            if device == "cpu":
                peers["torch int8"] = lambda x, weight, dense, codes, scale: torch._weight_int8pack_mm(x, codes, scale)
            yield Case(
                shape=f"{M}x{N}x{K}",
                dtype=dtype,
                inputs=partial(_inputs, M, N, K, dtype, device),
                ours={name: lambda x, w, *_, name=name: int6_linear(x, w, impl=name) for name in able[:-1] or able},
                peers=peers,
                exact=lambda x, weight, *_: F.linear(x.double(), weight.dequantize(torch.float64)),
                flops=2 * M * N * K,
                bytes=0.75 * N * K + 2 * N + dtype.itemsize * M * (N + K),
                buffers=NUM_MATRICES,
            )
