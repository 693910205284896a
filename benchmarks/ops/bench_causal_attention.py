"""Causal GQA attention with XSA, forward and backward, at the width of a 512-wide GPT, against repeated heads.

The limit counts the causal half of the two forward and five backward products.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.bench import Case
from pgolf_kernels.ops.causal_attention import causal_attention, op

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64


def _repeated_heads(q, k, v):
    """What a loop without GQA or the grouped reshape writes."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)
    v_unit = F.normalize(v, dim=-1)
    return y - (y * v_unit).sum(-1, keepdim=True) * v_unit


def _with_gradients(attention):
    def call(q, k, v, dy):
        y = attention(q, k, v)
        return y, *torch.autograd.grad(y, (q, k, v), dy)

    return call


def _shapes(device, quick):
    """(sequences, tokens, dtype)."""
    if quick:
        return [(1, 128, torch.bfloat16)]
    if device == "cuda":
        return [(48, 2048, torch.bfloat16)]
    return [(4, 512, torch.bfloat16), (1, 2048, torch.bfloat16), (4, 512, torch.float32)]


def _inputs(batch, tokens, dtype, device):
    shapes = [(batch, tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, dy = (torch.randn(s, device=device).to(dtype) for s in shapes)
    return *(t.requires_grad_() for t in (q, k, v)), dy


def _exact(q, k, v, dy):
    sequences = []  # one at a time: without a float64 flash kernel the scores are materialised
    for one in zip(*(t.detach().double().split(1) for t in (q, k, v, dy)), strict=True):
        sequences.append(_with_gradients(_repeated_heads)(*(t.requires_grad_() for t in one[:3]), one[3]))
    return tuple(torch.cat(parts) for parts in zip(*sequences, strict=True))


def _ours(impl, q, k, v):
    return causal_attention(q, k, v, exclude_self=True, impl=impl)


def cases(device, quick):
    """A training batch of the device's size; --quick takes a small one."""
    peers = {
        "torch eager": _with_gradients(_repeated_heads),
        "grouped SDPA": _with_gradients(partial(_ours, "reference")),
    }
    if not quick:
        peers["torch.compile"] = _with_gradients(torch.compile(_repeated_heads, dynamic=False))
    for batch, tokens, dtype in _shapes(device, quick):
        example = _inputs(1, 1, dtype, device)[:3]
        able = [i.name for i in op.IMPLS if i.why_not(*example, True) is None]
        yield Case(
            shape=f"fwd+bwd {batch}x{tokens}x{HEADS}/{KV_HEADS}x{HEAD_DIM}",
            dtype=dtype,
            inputs=partial(_inputs, batch, tokens, dtype, device),
            ours={name: _with_gradients(partial(_ours, name)) for name in able[:-1] or able},
            peers=peers,
            exact=_exact,
            flops=7 * batch * HEADS * tokens**2 * HEAD_DIM,
            bytes=2 * dtype.itemsize * batch * tokens * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM,
        )
