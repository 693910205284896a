"""A linear layer of a 512-wide GPT with int6 weights, against dense weights and torch's int8 product.

One row is decoding, 16 a small batch of it, 2048 reading a prompt. A layer's weights leave the caches between two uses,
so "cold" samples rotate through as many matrices as a model has: on a CPU dense bfloat16 weights then come from the
last-level cache or memory. "hot" ones use one matrix again and again. The limit counts 6 bits per weight.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.bench import Case
from pgolf_kernels.ops.int6_linear import int6_linear, op, quantize_int6

NUM_MATRICES = 22


def _inputs(M, N, K, dtype, device):
    """x, the weight, and what the peers take: dense in x's dtype and in float32, codes and scales; x in float32."""
    weight = quantize_int6(torch.randn(N, K, device=device))
    x = torch.randn(M, K, device=device).to(dtype)
    return x, weight, weight.dequantize(dtype), weight.codes(), weight.scale.to(dtype), x.float(), weight.dequantize()


def _peers(M, dtype, device):
    peers = {"torch linear": lambda x, weight, dense, *_: F.linear(x, dense)}
    if device == "cpu":
        peers["torch linear float32"] = lambda x, weight, dense, codes, scale, x32, dense32: F.linear(x32, dense32)
        if M <= 16:  # at 2048 rows it takes 20 times as long
            peers["torch int8"] = lambda x, weight, dense, codes, scale, *_: torch._weight_int8pack_mm(x, codes, scale)
    if M > 16:
        peers["dequantise, torch linear"] = lambda x, weight, *_: F.linear(x, weight.dequantize(dtype))
    return peers


def cases(device, quick):
    """Both matrices of an MLP at each number of rows, hot and cold; --quick takes a small one."""
    dtype = torch.bfloat16
    for N, K in [(96, 64)] if quick else [(1536, 512), (512, 1536)]:
        for M in (1,) if quick else (1, 16, 2048):
            x, weight, *_ = _inputs(M, N, K, dtype, device)
            able = [i.name for i in op.IMPLS if i.why_not(x, weight.packed, weight.scale, None) is None]
            for caches, buffers in (("hot", 1), ("cold", NUM_MATRICES)):
                yield Case(
                    shape=f"{M}x{N}x{K} {caches}",
                    dtype=dtype,
                    inputs=partial(_inputs, M, N, K, dtype, device),
                    ours={name: lambda x, w, *_, name=name: int6_linear(x, w, impl=name) for name in able[:-1] or able},
                    peers=_peers(M, dtype, device),
                    exact=lambda x, weight, *_: F.linear(x.double(), weight.dequantize(torch.float64)),
                    flops=2 * M * N * K,
                    bytes=0.75 * N * K + 2 * N + dtype.itemsize * M * (N + K),
                    buffers=buffers,
                )
