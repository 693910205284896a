"""How close is close enough: at most twice the error of plain PyTorch in the same dtype, both against float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from pgolf_kernels import extension

# Instruction sets that this CPU can run, for kernels in C++.
LEVELS = extension.cpu.isa_levels() if extension.cpu else ["generic"]
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def forward_and_grads(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    """fn(*inputs) and the gradients of (fn(*inputs) * dy).sum() in every floating-point input."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    y = fn(*leaves)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)


def assert_as_accurate(ours: Tensor, baseline: Tensor, exact: Tensor, scale: float, factor: float = 2.0) -> None:
    """Max error of `ours` <= factor * max error of `baseline` + one rounding at `scale`.

    ours, baseline: same dtype. exact: the reference evaluated in float64. All one shape.
    scale: the largest magnitude added on the way to the result; a small result of cancelling terms cannot be more exact
        than eps * scale, and the baseline may be lucky.
    """
    assert ours.dtype == baseline.dtype, f"{ours.dtype} against {baseline.dtype}"
    assert ours.shape == baseline.shape == exact.shape, f"{ours.shape}, {baseline.shape}, {exact.shape}"
    assert torch.isfinite(ours).all(), "non-finite output"
    if not ours.numel():
        return
    error, allowed = (ours.double() - exact).abs().max(), (baseline.double() - exact).abs().max()
    floor = torch.finfo(ours.dtype).eps * scale
    assert error <= factor * allowed + floor, f"max error {error:.3e} > {factor} x {allowed:.3e} + {floor:.1e}"
