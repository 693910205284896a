"""leaky_relu2_mlp: argument checks, choice of implementation, registration, autograd. The maths is in reference.py.

Two registered ops carry Triton's kernels, forward and dp. The backward around dp is plain products: measurements of
whole-MLP backward functions, opaque to the compiler, had them slower than products it can see. On the CPU it is the
other way round: dp stays in the cache for the products after it, so forward and backward are one op each.
"""

import torch
from torch import Tensor

from ...dispatch import (
    LIBRARY,
    TRITON_INTERPRETED,
    Impl,
    always,
    autocast_dtype,
    choose,
    require,
    require_numbers,
    require_one_device,
    require_tensors,
    self_check,
    why_not_counted,
    why_not_triton,
)
from . import cpu, reference

OP = "leaky_relu2_mlp"


def _compute_dtype(x: Tensor) -> torch.dtype:
    return autocast_dtype(x.device) or x.dtype


def _why_not_triton(x: Tensor, w_up: Tensor, w_down: Tensor, negative_slope: float) -> str | None:
    if reason := why_not_triton(x, w_up, w_down):
        return reason
    if _compute_dtype(x) != torch.bfloat16:
        return f"the Triton kernels cover bfloat16 (the square and its root need its range), got {_compute_dtype(x)}"
    return why_not_counted(rows=x.numel() // x.shape[-1], features=max(w_up.shape))


def _triton(x: Tensor, w_up: Tensor, w_down: Tensor, negative_slope: float) -> Tensor:
    dtype = _compute_dtype(x)
    rows, up, down = (t.to(dtype).contiguous() for t in (x.reshape(-1, x.shape[-1]), w_up, w_down))
    y, _ = torch.ops.pgolf.leaky_relu2_mlp_triton(rows, up, down, negative_slope)
    return y.view(x.shape)


LIBRARY.define("leaky_relu2_mlp_triton(Tensor x, Tensor w_up, Tensor w_down, float negative_slope) -> (Tensor, Tensor)")
LIBRARY.define("leaky_relu2_dp_triton(Tensor dy, Tensor w_down, Tensor a, float negative_slope) -> Tensor")


def _forward(x: Tensor, w_up: Tensor, w_down: Tensor, negative_slope: float) -> tuple[Tensor, Tensor]:
    from . import triton_kernel  # Triton may be missing, and takes a second to import

    self_check(OP, x.device, lambda: triton_kernel.probe(x.device))
    a = triton_kernel.up(x, w_up, negative_slope)
    return a @ w_down.T, a


def _dp(dy: Tensor, w_down: Tensor, a: Tensor, negative_slope: float) -> Tensor:
    from . import triton_kernel

    return triton_kernel.dp(dy, w_down, a, negative_slope)


for _device in ("CUDA", *("CPU",) * TRITON_INTERPRETED):
    LIBRARY.impl("leaky_relu2_mlp_triton", _forward, _device)
    LIBRARY.impl("leaky_relu2_dp_triton", _dp, _device)


@torch.library.register_fake("pgolf::leaky_relu2_mlp_triton", lib=LIBRARY)
def _(x: Tensor, w_up: Tensor, w_down: Tensor, negative_slope: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], w_up.shape[0])


@torch.library.register_fake("pgolf::leaky_relu2_dp_triton", lib=LIBRARY)
def _(dy: Tensor, w_down: Tensor, a: Tensor, negative_slope: float) -> Tensor:
    return torch.empty_like(a)


def _setup_context(ctx, inputs, output) -> None:
    x, w_up, w_down, ctx.negative_slope = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or a zero gradient of `a` would be allocated and filled
    ctx.save_for_backward(x, w_up, w_down, output[1])


def _backward(ctx, dy: Tensor | None, _da):
    if dy is None:
        return None, None, None, None
    x, w_up, w_down, a = ctx.saved_tensors
    dy = dy.contiguous()
    needs_x, needs_up, needs_down, _ = ctx.needs_input_grad
    dp = dx = dw_up = None
    if needs_x or needs_up:
        dp = torch.ops.pgolf.leaky_relu2_dp_triton(dy, w_down, a, ctx.negative_slope)
        dx = dp @ w_up if needs_x else None
        dw_up = dp.T @ x if needs_up else None
    return dx, dw_up, dy.T @ a if needs_down else None, None


torch.library.register_autograd("pgolf::leaky_relu2_mlp_triton", _backward, setup_context=_setup_context, lib=LIBRARY)


def _why_not_cpu(x: Tensor, w_up: Tensor, w_down: Tensor, negative_slope: float) -> str | None:
    return cpu.why_not(_compute_dtype(x), x, w_up, w_down)


def _cpu(x: Tensor, w_up: Tensor, w_down: Tensor, negative_slope: float) -> Tensor:
    dtype = _compute_dtype(x)
    rows, up, down = (t.to(dtype).contiguous() for t in (x.reshape(-1, x.shape[-1]), w_up, w_down))
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_up, w_down))
    y, _ = torch.ops.pgolf.leaky_relu2_mlp_cpu(rows, up, down, negative_slope, save)
    return y.view(x.shape)


LIBRARY.define(
    "leaky_relu2_mlp_cpu(Tensor x, Tensor w_up, Tensor w_down, float negative_slope, bool save) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "leaky_relu2_mlp_cpu_backward(Tensor dy, Tensor x, Tensor w_up, Tensor w_down, Tensor a, float negative_slope, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("leaky_relu2_mlp_cpu", cpu.forward, "CPU")
LIBRARY.impl("leaky_relu2_mlp_cpu_backward", cpu.backward, "CPU")


@torch.library.register_fake("pgolf::leaky_relu2_mlp_cpu", lib=LIBRARY)
def _(x: Tensor, w_up: Tensor, w_down: Tensor, negative_slope: float, save: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], w_up.shape[0]) if save else x.new_empty(0)


@torch.library.register_fake("pgolf::leaky_relu2_mlp_cpu_backward", lib=LIBRARY)
def _(dy, x, w_up, w_down, a, negative_slope, needs) -> tuple[Tensor, Tensor, Tensor]:
    wanted = zip((x, w_up, w_down), needs, strict=True)
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in wanted)


def _setup_context_cpu(ctx, inputs, output) -> None:
    *tensors, ctx.negative_slope, ctx.saved = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    if ctx.saved:
        ctx.save_for_backward(*tensors, output[1])


def _backward_cpu(ctx, dy: Tensor | None, _da):
    if dy is None:
        return None, None, None, None, None
    require(ctx.saved, OP, "the forward of leaky_relu2_mlp_cpu must have been called with save=True", "save=False")
    needs = list(ctx.needs_input_grad[:3])
    *tensors, a = ctx.saved_tensors
    grads = torch.ops.pgolf.leaky_relu2_mlp_cpu_backward(dy.contiguous(), *tensors, a, ctx.negative_slope, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


torch.library.register_autograd(
    "pgolf::leaky_relu2_mlp_cpu", _backward_cpu, setup_context=_setup_context_cpu, lib=LIBRARY
)

IMPLS = (  # fastest first; the last always runs
    Impl("triton", _triton, _why_not_triton),
    Impl("cpu", _cpu, _why_not_cpu),
    Impl("reference", reference.forward, always),
)


def leaky_relu2_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, negative_slope: float = 0.5, impl: str = "auto") -> Tensor:
    """The MLP y = leaky(x w_up^T)^2 w_down^T, leaky(p) = max(p, 0) + negative_slope * min(p, 0).

    Args:
        x: activations [..., D], floating point.
        w_up: up projection [H, D], the dtype of x (under autocast any mixture is allowed).
        w_down: down projection [D, H], likewise.
        negative_slope: slope s of leaky for p <= 0; 0 gives ReLU^2, 1 gives p^2.
        impl: "auto", or the name of one implementation.

    Returns:
        [..., D] in the dtype of the product (x's, or autocast's). Differentiable in x, w_up and w_down.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the requested impl cannot run these arguments.

    Source: squared ReLU of https://arxiv.org/abs/2109.08668 with a leaky negative side.
    """
    require_tensors(OP, x=x, w_up=w_up, w_down=w_down)
    require_numbers(OP, negative_slope=negative_slope)
    is_float = x.dim() >= 1 and x.is_floating_point()
    require(is_float, OP, "x must be floating point [..., D]", _say(x))
    D = x.shape[-1]
    is_up = w_up.dim() == 2 and w_up.shape[1] == D
    require(is_up, OP, f"w_up must be [H, D={D}]", _say(w_up), "F.linear's layout")
    H = w_up.shape[0]
    require(tuple(w_down.shape) == (D, H), OP, f"w_down must be [D={D}, H={H}]", _say(w_down), "F.linear's layout")
    require_one_device(OP, x=x, w_up=w_up, w_down=w_down)
    if autocast_dtype(x.device) is None:
        for name, w in (("w_up", w_up), ("w_down", w_down)):
            require(w.dtype == x.dtype, OP, f"{name} must be {x.dtype} as x is", _say(w), "cast one or use autocast")
    return choose(OP, IMPLS, impl, x, w_up, w_down, negative_slope).run(x, w_up, w_down, negative_slope)


def _say(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"
