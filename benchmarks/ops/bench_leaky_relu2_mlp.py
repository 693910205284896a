"""The MLP of a 512-wide GPT, forward and forward + backward, against the same formula in eager and compiled PyTorch.

The limit counts the products alone (2 of them forward, 6 in all) and each of x, the weights and y once.
"""

from functools import partial

import torch

from benchmarks.bench import Case
from pgolf_kernels.ops.leaky_relu2_mlp import leaky_relu2_mlp, op, reference

SLOPE = 0.5


def _train(forward, x, w_up, w_down, dy):
    """y and the gradients of x and both weights."""
    leaves = [t.detach().requires_grad_() for t in (x, w_up, w_down)]
    y = forward(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def _infer(forward, x, w_up, w_down, dy):
    with torch.no_grad():
        return forward(x, w_up, w_down)


def _eager(x, w_up, w_down):
    return reference.forward(x, w_up, w_down, SLOPE)


def _shapes(device, quick):
    """(M, D, H, dtype): eight-GPU share of a 786,432-token batch, or what a CPU does in milliseconds."""
    if quick:
        return [(256, 64, 192, torch.bfloat16)]
    if device == "cuda":
        return [(98304, 512, H, torch.bfloat16) for H in (1536, 2048)]
    return [(2048, 512, 1536, dtype) for dtype in (torch.float32, torch.bfloat16)]


def _inputs(M, D, H, dtype, device):
    normal = partial(torch.randn, device=device)
    sizes = (normal(M, D), normal(H, D) / D**0.5, normal(D, H) / H**0.5, normal(M, D))
    return tuple(t.to(dtype) for t in sizes)


def cases(device, quick):
    """Inference and training at each shape."""
    for M, D, H, dtype in _shapes(device, quick):
        example = tuple(torch.empty(s, dtype=dtype, device=device) for s in ((M, D), (H, D), (D, H)))
        able = [i.name for i in op.IMPLS if i.why_not(*example, SLOPE) is None]
        peers = {"torch eager": _eager}
        if not quick:
            peers["torch.compile"] = torch.compile(_eager, dynamic=False)
        for what, run, num_products in (("fwd", _infer, 2), ("fwd+bwd", _train, 6)):
            yield Case(
                shape=f"{what} {M}x{D}x{H}",
                dtype=dtype,
                inputs=partial(_inputs, M, D, H, dtype, device),
                ours={name: partial(run, partial(leaky_relu2_mlp, impl=name)) for name in able[:-1] or able},
                peers={name: partial(run, forward) for name, forward in peers.items()},
                exact=lambda *tensors, run=run: run(_eager, *(t.double() for t in tensors)),
                flops=num_products * 2 * M * D * H,
                bytes=(2 * M * D + 2 * D * H) * dtype.itemsize * num_products // 2,
                buffers=1 if device == "cuda" else 3,  # far larger than any cache
            )
