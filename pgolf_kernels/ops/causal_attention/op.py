"""causal_attention: argument checks, choice of implementation, registration, autograd. The maths is in reference.py.

The reference is PyTorch's scaled_dot_product_attention, a flash kernel on GPUs. On CPUs its products run at a tenth of
what the CPU can do, hence a kernel of our own there.
"""

import torch
from torch import Tensor

from ...dispatch import LIBRARY, Impl, always, choose, require, require_one_device, require_tensors
from . import cpu, reference

LIBRARY.define("causal_attention_cpu(Tensor q, Tensor k, Tensor v, bool exclude_self) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    "causal_attention_backward_cpu(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y_with_self, Tensor lse,"
    " bool exclude_self) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("causal_attention_cpu", cpu.forward, "CPU")
LIBRARY.impl("causal_attention_backward_cpu", cpu.backward, "CPU")


@torch.library.register_fake("pgolf::causal_attention_cpu", lib=LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, exclude_self: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _d = q.shape
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with_self = torch.empty_like(y) if exclude_self else q.new_empty(0)
    return y, with_self, q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.register_fake("pgolf::causal_attention_backward_cpu", lib=LIBRARY)
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y_with_self: Tensor, lse: Tensor, exclude_self: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.exclude_self = inputs
    y, with_self, lse = output
    ctx.mark_non_differentiable(with_self, lse)
    ctx.set_materialize_grads(False)  # or zero gradients of the saved tensors would be allocated and filled
    ctx.save_for_backward(q, k, v, with_self if ctx.exclude_self else y, lse)


def _backward(ctx, dy: Tensor | None, _with_self, _lse):
    if dy is None:
        return None, None, None, None
    return *torch.ops.pgolf.causal_attention_backward_cpu(dy, *ctx.saved_tensors, ctx.exclude_self), None


torch.library.register_autograd("pgolf::causal_attention_cpu", _backward, setup_context=_setup_context, lib=LIBRARY)


def _cpu(q: Tensor, k: Tensor, v: Tensor, exclude_self: bool) -> Tensor:
    return torch.ops.pgolf.causal_attention_cpu(q, k, v, exclude_self)[0]


IMPLS = (  # fastest first; the last always runs
    Impl("cpu", _cpu, cpu.why_not),
    Impl("reference", reference.forward, always),
)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    require_tensors("causal_attention", q=q, k=k, v=v)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    require(
        q.dim() == k.dim() == v.dim() == 4, "causal_attention", "q, k and v must be (batch, tokens, heads, d)", shapes
    )
    require(k.shape == v.shape, "causal_attention", "k and v must have one shape", shapes)
    same = q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    require(same, "causal_attention", "q and k must agree in batch, tokens and head dimension", shapes)
    grouped = k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0
    require(grouped, "causal_attention", "the heads of q must be a multiple of the heads of k and v", shapes)
    dtypes = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
    require(q.dtype == k.dtype == v.dtype, "causal_attention", "q, k and v must have one dtype", dtypes)
    require_one_device("causal_attention", q=q, k=k, v=v)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, exclude_self: bool = False, impl: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d), positions <= t) v per head; query head h reads key/value head h // (H / Hkv).

    Args:
        q: (B, T, H, d), floating point.
        k, v: (B, T, Hkv, d), same dtype; Hkv divides H.
        exclude_self: remove from each output its component along the position's own value vector (XSA).
        impl: "auto", or the name of an implementation (tests and benchmarks use this).

    Returns:
        (B, T, H, d) in the dtype of q. Differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or `impl` cannot run these arguments.

    Source: arXiv:2305.13245 (GQA), arXiv:2603.09078 (XSA).
    """
    _check(q, k, v)
    return choose("causal_attention", IMPLS, impl, q, k, v, exclude_self).run(q, k, v, exclude_self)
