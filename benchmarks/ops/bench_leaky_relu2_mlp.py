"""The MLP of a 512-wide GPT, forward and forward + backward, against the same formula in eager and compiled PyTorch.

On a CPU inference also meets torch.compile with frozen weights, which packs them once as ours does; training packs them
in every call. The limit counts the products alone (2 of them forward, 6 in all) and each of x, the weights and y once.
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


class _FrozenMLP(torch.nn.Module):
    def __init__(self, w_up, w_down):
        super().__init__()
        self.w_up, self.w_down = (torch.nn.Parameter(w, requires_grad=False) for w in (w_up, w_down))

    def forward(self, x):
        return _eager(x, self.w_up, self.w_down)


def _frozen():
    """torch.compile with frozen weights: a graph of its own for each weight it meets."""
    graphs = {}

    def forward(x, w_up, w_down):
        with torch._dynamo.config.patch(recompile_limit=64), torch._inductor.config.patch(freezing=True):
            if w_up.data_ptr() not in graphs:
                graphs[w_up.data_ptr()] = torch.compile(_FrozenMLP(w_up, w_down), dynamic=False)
            return graphs[w_up.data_ptr()](x)

    return forward


def _shapes(device, quick):
    """(M, D, H, dtype): eight-GPU share of a 786,432-token batch, or what a CPU does in milliseconds."""
    if quick:
        return [(256, 64, 192, torch.bfloat16)]
    if device == "cuda":
        return [(98304, 512, H, torch.bfloat16) for H in (1536, 2048)]
    return [(M, 512, 1536, dtype) for M in (2048, 16384) for dtype in (torch.float32, torch.bfloat16)]


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
        inference = peers | ({"torch.compile frozen": _frozen()} if device == "cpu" and not quick else {})
        for what, run, num_products, rivals in (("fwd", _infer, 2, inference), ("fwd+bwd", _train, 6, peers)):
            yield Case(
                shape=f"{what} {M}x{D}x{H}",
                dtype=dtype,
                inputs=partial(_inputs, M, D, H, dtype, device),
                ours={name: partial(run, partial(leaky_relu2_mlp, impl=name)) for name in able[:-1] or able},
                peers={name: partial(run, forward) for name, forward in rivals.items()},
                exact=lambda *tensors, run=run: run(_eager, *(t.double() for t in tensors)),
                flops=num_products * 2 * M * D * H,
                bytes=(2 * M * D + 2 * D * H) * dtype.itemsize * num_products // 2,
                buffers=1 if device == "cuda" else 3,  # far larger than any cache
            )
