"""A linear layer of a 512-wide GPT with int6 weights, against dense weights and torch's int8 and int4 products.

One row is decoding, 16 and 64 are batches of it, 2048 is reading a prompt. A layer's weights leave the caches between
two uses, so "cold" samples rotate through as many matrices as a model has: on a CPU dense bfloat16 weights then come
from the last-level cache or memory. "hot" ones use one matrix again and again. The limit counts 6 bits per weight.

On a GPU a layer takes two microseconds, less than the launch of a graph. So a sample there is NUM_CALLS layers, one
after another in one graph, and its time is theirs together; the cache is emptied before each sample, so of different
matrices every one comes from memory.
"""

import functools
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case
from pgolf_kernels.ops.int6_linear import Int6Weight, int6_linear, op, quantize_int6, reference

NUM_MATRICES = 22
NUM_CALLS = 32
INT4_GROUP = 256


def _inputs(M, N, K, dtype, device):
    """x, the weight, and what the peers take: dense in x's dtype and in float32, codes and scales; x in float32."""
    weight = quantize_int6(torch.randn(N, K, device=device))
    x = torch.randn(M, K, device=device).to(dtype)
    return x, weight, weight.dequantize(dtype), weight.codes(), weight.scale.to(dtype), x.float(), weight.dequantize()


def _peers(M, dtype):
    peers = {
        "torch linear": lambda x, weight, dense, *_: F.linear(x, dense),
        "torch linear float32": lambda x, weight, dense, codes, scale, x32, dense32: F.linear(x32, dense32),
    }
    if M <= 16:  # at 2048 rows it takes 20 times as long
        peers["torch int8"] = lambda x, weight, dense, codes, scale, *_: torch._weight_int8pack_mm(x, codes, scale)
    else:
        peers["dequantise, torch linear"] = lambda x, weight, *_: F.linear(x, weight.dequantize(dtype))
    return peers


def _cpu_cases(sizes, rows, dtype):
    for N, K in sizes:
        for M in rows:
            x, weight, *_ = _inputs(M, N, K, dtype, "cpu")
            able = [i.name for i in op.IMPLS if i.why_not(x, weight.packed, weight.scale, None) is None]
            for caches, buffers in (("hot", 1), ("cold", NUM_MATRICES)):
                yield Case(
                    shape=f"{M}x{N}x{K} {caches}",
                    dtype=dtype,
                    inputs=partial(_inputs, M, N, K, dtype, "cpu"),
                    ours={name: lambda x, w, *_, name=name: int6_linear(x, w, impl=name) for name in able[:-1] or able},
                    peers=_peers(M, dtype),
                    exact=lambda x, weight, *_: F.linear(x.double(), weight.dequantize(torch.float64)),
                    flops=2 * M * N * K,
                    bytes=0.75 * N * K + 2 * N + dtype.itemsize * M * (N + K),
                    buffers=buffers,
                )


def _weight_of_16_levels(N, K, device):
    """An int6 weight that int4 holds too, every fourth code, with scales that bfloat16 holds; and its levels."""
    levels = torch.randint(0, 16, (N, K), device=device)
    scale = torch.randint(4, 8, (N,), device=device).div(256).half()
    return Int6Weight.from_codes((4 * levels - 30).to(torch.int8), scale), levels


def _int4(weight, levels):
    """The weight as torch's int4 product takes it, or None where it cannot: 4 scale (level - 8) + 2 scale."""
    try:
        nibbles = (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
        steps = weight.scale.bfloat16()[:, None].expand(-1, levels.shape[1] // INT4_GROUP)
        return packed, torch.stack((4 * steps, 2 * steps), 2).transpose(0, 1).contiguous()
    except (RuntimeError, AttributeError) as error:
        _no_int4(str(error))
        return None


@functools.cache
def _no_int4(reason):
    print(f"int6_linear: no int4 peer: {reason[:100]}", file=sys.stderr)


def _int4_linear(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, packed, INT4_GROUP, scales_and_zeros)


def _gpu_inputs(M, N, K, dtype, device, num_matrices):
    """x, and for each matrix the int6 weight, dense in x's dtype, and as int4."""
    x, layers = torch.randn(M, K, device=device).to(dtype), []
    for _ in range(num_matrices):
        weight, levels = _weight_of_16_levels(N, K, device)
        layers.append((weight, weight.dequantize(dtype), _int4(weight, levels)))
    return x, layers


def _each(call):
    """call(x, int6 weight, dense, int4) for NUM_CALLS layers."""
    return lambda x, layers: tuple(call(x, *layers[i % len(layers)]) for i in range(NUM_CALLS))


def _gpu_peers(x, layers):
    peers = {"torch linear": lambda x, weight, dense, int4: F.linear(x, dense)}
    compiled = torch.compile(
        lambda x, packed, scale: F.linear(x, reference.dequantize(packed, scale, x.shape[-1], x.dtype)), dynamic=False
    )
    peers["torch.compile"] = lambda x, weight, dense, int4: compiled(x, weight.packed, weight.scale)
    _, dense, int4 = layers[0]
    if int4 is not None:
        found, want = _int4_linear(x, *int4), F.linear(x, dense)
        if (found - want).norm() < 0.02 * want.norm():
            peers["torch int4"] = lambda x, weight, dense, int4: _int4_linear(x, *int4)
        else:  # its layout is torch's own affair and may change
            _no_int4("torch reads another layout than was written")
    return {name: _each(call) for name, call in peers.items()}


def _gpu_cases(sizes, rows, dtype, device):
    for N, K in sizes:
        for M in rows:
            x, layers = _gpu_inputs(M, N, K, dtype, device, 1)
            few = {"cuda": M <= 64, "triton": M <= 64, "dequantize": M >= 16}  # what the borders are chosen from
            able = [i.name for i in op.IMPLS if i.why_not(x, layers[0][0].packed, layers[0][0].scale, None) is None]
            names = [name for name in able if few.get(name)] or able[-1:]
            for caches, num_matrices in (("hot", 1), ("cold", NUM_CALLS)):
                yield Case(
                    shape=f"{M}x{N}x{K} x{NUM_CALLS} {caches}",
                    dtype=dtype,
                    inputs=partial(_gpu_inputs, M, N, K, dtype, device, num_matrices),
                    ours={
                        name: _each(lambda x, weight, dense, int4, name=name: int6_linear(x, weight, impl=name))
                        for name in names
                    },
                    peers=_gpu_peers(x, layers),
                    exact=_each(lambda x, weight, *_: F.linear(x.double(), weight.dequantize(torch.float64))),
                    flops=NUM_CALLS * 2 * M * N * K,
                    bytes=NUM_CALLS * (0.75 * N * K + 2 * N + dtype.itemsize * M * (N + K)),
                    buffers=1,
                )


def cases(device, quick):
    """Matrices of the model at each number of rows, hot and cold; --quick takes a small one."""
    dtype = torch.bfloat16
    if device == "cpu":
        sizes, rows = ([(96, 64)], (1,)) if quick else ([(1536, 512), (512, 1536)], (1, 16, 2048))
        yield from _cpu_cases(sizes, rows, dtype)
    else:
        sizes, rows = ([(96, 64)], (1, 64)) if quick else ([(1536, 512), (512, 1536), (512, 512)], (1, 16, 64, 2048))
        yield from _gpu_cases(sizes, rows, dtype, device)
