"""Head and loss of a 512-wide GPT, forward + backward, against the same formula in eager and compiled PyTorch.

The limit counts the three products and each of hidden, weight and their gradients once: no traffic of logits.
"""

from functools import partial

import torch

from benchmarks.bench import Case
from pgolf_kernels.ops.softcapped_cross_entropy import op, reference, softcapped_cross_entropy

SOFTCAP, IGNORE = 30.0, -100


def _train(forward, hidden, weight, targets):
    """The mean loss and the gradients of hidden and weight."""
    leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
    loss = forward(*leaves, targets)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def _eager(hidden, weight, targets):
    return reference.forward(hidden, weight, targets, SOFTCAP, IGNORE, "mean")


def _shapes(device, quick):
    """(T, D, V, dtype): eight-GPU share of a 786,432-token batch, or what a CPU does in milliseconds."""
    if quick:
        return [(256, 64, 320, torch.bfloat16)]
    if device == "cuda":
        return [(98304, 512, V, torch.bfloat16) for V in (1024, 4096, 8192)]
    return [
        (4096, 512, V, dtype) for V, dtype in ((1024, torch.bfloat16), (4096, torch.bfloat16), (1024, torch.float32))
    ]


def _inputs(T, D, V, dtype, device):
    hidden, weight = torch.randn(T, D, device=device), 4 * torch.randn(V, D, device=device) / D**0.5
    return hidden.to(dtype), weight.to(dtype), torch.randint(V, (T,), device=device)


def cases(device, quick):
    """Training at each vocabulary size."""
    for T, D, V, dtype in _shapes(device, quick):
        hidden, weight = torch.empty(T, D, dtype=dtype, device=device), torch.empty(V, D, dtype=dtype, device=device)
        example = (hidden, weight, torch.zeros(T, dtype=torch.int64, device=device), SOFTCAP, IGNORE, "mean")
        able = [i.name for i in op.IMPLS if i.why_not(*example) is None]
        peers = {"torch eager": _eager}
        if not quick:
            peers["torch.compile"] = torch.compile(_eager, dynamic=False)
        yield Case(
            shape=f"fwd+bwd {T}x{D}x{V}",
            dtype=dtype,
            inputs=partial(_inputs, T, D, V, dtype, device),
            ours={name: partial(_train, partial(softcapped_cross_entropy, impl=name)) for name in able[:-1] or able},
            peers={name: partial(_train, forward) for name, forward in peers.items()},
            exact=lambda h, w, y: _train(_eager, h.double(), w.double(), y),
            flops=3 * 2 * T * D * V,
            bytes=2 * (T * D + V * D) * dtype.itemsize,
            buffers=1 if device == "cuda" else 3,  # far larger than any cache
        )
