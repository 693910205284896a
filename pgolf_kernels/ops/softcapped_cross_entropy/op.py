"""softcapped_cross_entropy: argument checks, choice of implementation, registration, autograd. Maths: reference.py.

`kept` ops, one in Triton and one in C++, hold d(logits) for backward, where dhidden and dweight are products that the
compiler sees. `chunked`, Triton's for large heads, computes dhidden and dweight in the forward, one block of rows after
the other, so that logits exist for one block only; it also serves evaluation. All write the gradient for an incoming
gradient of 1.
"""

import math

import torch
from torch import Tensor

from ... import extension
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
    why_not_counted,
    why_not_triton,
)
from ...matmul import matmul
from . import cpu, reference

OP = "softcapped_cross_entropy"
MAX_SOFTCAP = 40.0  # exp(-2 softcap) stays a normal float32, which is what spares the kernels the maximum
KEPT_LOGITS = 2**28  # 512 MiB: up to here backward keeps d(logits), beyond it the forward works in chunks
CHUNK_LOGITS = 2**27


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return autocast_dtype(hidden.device) or hidden.dtype


def _why_not_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int, reduction: str
) -> str | None:
    if reason := why_not_triton(hidden, weight, targets):
        return reason
    if _compute_dtype(hidden) != torch.bfloat16:
        return f"the Triton kernel covers bfloat16 (a mean's gradient needs its range), got {_compute_dtype(hidden)}"
    if softcap > MAX_SOFTCAP:
        return f"the Triton kernel needs softcap <= {MAX_SOFTCAP}, got {softcap}"
    return why_not_counted(tokens=targets.numel(), words=weight.shape[0])


def _why_not_cpu(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int, reduction: str
) -> str | None:
    dtype = _compute_dtype(hidden)
    if any(t.device.type != "cpu" for t in (hidden, weight, targets)) or dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernel computes in float32 or bfloat16 on the CPU, got {dtype} on {hidden.device}"
    if softcap > MAX_SOFTCAP:
        return f"the C++ kernel needs softcap <= {MAX_SOFTCAP}, got {softcap}"
    return extension.WHY_NOT_CPU


def _matrices(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """hidden [T, D], weight and targets [T] as the kernels take them, and whether a gradient is wanted."""
    dtype, T = _compute_dtype(hidden), targets.numel()
    h = hidden.reshape(T, weight.shape[1]).to(dtype).contiguous()
    w, y = weight.to(dtype).contiguous(), targets.reshape(T).contiguous()
    return h, w, y, torch.is_grad_enabled() and (h.requires_grad or w.requires_grad)


def _cpu(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int, reduction: str) -> Tensor:
    h, w, y, needs_grad = _matrices(hidden, weight, targets)
    loss, _ = torch.ops.pgolf.softcapped_ce_kept_cpu(h, w, y, softcap, ignore_index, reduction, needs_grad)
    return loss.view(targets.shape) if reduction == "none" else loss


def _triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int, reduction: str
) -> Tensor:
    h, w, y, needs_grad = _matrices(hidden, weight, targets)
    T, V = h.shape[0], w.shape[0]
    if needs_grad and (reduction == "none" or T * V <= KEPT_LOGITS):
        loss, _ = torch.ops.pgolf.softcapped_ce_kept(h, w, y, softcap, ignore_index, reduction)
    else:
        needs = needs_grad and h.requires_grad, needs_grad and w.requires_grad
        loss, _, _ = torch.ops.pgolf.softcapped_ce_chunked(h, w, y, softcap, ignore_index, reduction, *needs)
    return loss.view(targets.shape) if reduction == "none" else loss


_HEAD = "Tensor hidden, Tensor weight, Tensor targets, float softcap, int ignore_index, str reduction"
LIBRARY.define(f"softcapped_ce_kept({_HEAD}) -> (Tensor, Tensor)")
LIBRARY.define(f"softcapped_ce_kept_cpu({_HEAD}, bool needs_grad) -> (Tensor, Tensor)")
LIBRARY.define(f"softcapped_ce_chunked({_HEAD}, bool needs_dhidden, bool needs_dweight) -> (Tensor, Tensor, Tensor)")


def _row_weight(targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """What each counted row weighs in the loss, as one float32 on the device: 1 / num_targets for a mean."""
    if reduction == "mean":
        return (targets != ignore_index).sum().float().reciprocal()
    return torch.ones((), device=targets.device)


def _reduce(losses: Tensor, row_weight: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else losses.sum() * row_weight


def _empty_logits(hidden: Tensor, num_rows: int, V: int) -> Tensor:
    """[num_rows, V] in rows of whole 32-byte sectors: for any V, cuBLAS and the row kernel stay on their fast paths."""
    return hidden.new_empty(num_rows, (V + 15) // 16 * 16)[:, :V]


def _kept(hidden, weight, targets, softcap, ignore_index, reduction) -> tuple[Tensor, Tensor]:
    from . import triton_kernel  # Triton may be missing, and takes a second to import

    losses = hidden.new_empty(len(targets), dtype=torch.float32)
    row_weight = _row_weight(targets, ignore_index, reduction)
    logits = torch.mm(hidden, weight.T, out=_empty_logits(hidden, len(targets), len(weight)))
    triton_kernel.loss_and_grad(logits, targets, losses, row_weight, softcap, ignore_index)
    return _reduce(losses, row_weight, reduction), logits


def _chunked(
    hidden, weight, targets, softcap, ignore_index, reduction, needs_dhidden, needs_dweight
) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_kernel

    T, V = len(targets), len(weight)
    losses = hidden.new_empty(T, dtype=torch.float32)
    row_weight = _row_weight(targets, ignore_index, reduction)
    dhidden = torch.empty_like(hidden) if needs_dhidden else hidden.new_empty(0)
    # Summed over the chunks in float32; each chunk's share is rounded to the dtype of the weight, as the total is.
    dweight = torch.zeros_like(weight, dtype=torch.float32) if needs_dweight else weight.new_empty(0)
    rows = min(T, max(128, CHUNK_LOGITS // V // 128 * 128))
    buffer = _empty_logits(hidden, rows, V)
    for start in range(0, T, rows):
        at = slice(start, min(start + rows, T))
        h, logits = hidden[at], buffer[: min(rows, T - start)]
        torch.mm(h, weight.T, out=logits)
        weight_or_none = row_weight if needs_dhidden or needs_dweight else None
        triton_kernel.loss_and_grad(logits, targets[at], losses[at], weight_or_none, softcap, ignore_index)
        if needs_dhidden:
            torch.mm(logits, weight, out=dhidden[at])
        if needs_dweight:
            dweight += logits.T @ h
    return _reduce(losses, row_weight, reduction), dhidden, dweight.to(weight.dtype)


def _kept_cpu(hidden, weight, targets, softcap, ignore_index, reduction, needs_grad) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(len(targets), dtype=torch.float32)
    row_weight = _row_weight(targets, ignore_index, reduction)
    dlogits = _empty_logits(hidden, len(targets) if needs_grad else 0, len(weight))
    if len(targets):
        kept = dlogits if needs_grad else None
        cpu.loss_and_grad(hidden, weight, targets, losses, kept, softcap, ignore_index, row_weight.item())
    return _reduce(losses, row_weight, reduction), dlogits


LIBRARY.impl("softcapped_ce_kept_cpu", _kept_cpu, "CPU")
for _device in ("CUDA", *("CPU",) * TRITON_INTERPRETED):
    LIBRARY.impl("softcapped_ce_kept", _kept, _device)
    LIBRARY.impl("softcapped_ce_chunked", _chunked, _device)


def _empty_loss(targets: Tensor, reduction: str) -> Tensor:
    return targets.new_empty(targets.shape if reduction == "none" else (), dtype=torch.float32)


@torch.library.register_fake("pgolf::softcapped_ce_kept", lib=LIBRARY)
def _(hidden, weight, targets, softcap, ignore_index, reduction):
    return _empty_loss(targets, reduction), _empty_logits(hidden, hidden.shape[0], weight.shape[0])


@torch.library.register_fake("pgolf::softcapped_ce_kept_cpu", lib=LIBRARY)
def _(hidden, weight, targets, softcap, ignore_index, reduction, needs_grad):
    logits = _empty_logits(hidden, hidden.shape[0] if needs_grad else 0, weight.shape[0])
    return _empty_loss(targets, reduction), logits


@torch.library.register_fake("pgolf::softcapped_ce_chunked", lib=LIBRARY)
def _(hidden, weight, targets, softcap, ignore_index, reduction, needs_dhidden, needs_dweight):
    dhidden = torch.empty_like(hidden) if needs_dhidden else hidden.new_empty(0)
    dweight = torch.empty_like(weight) if needs_dweight else weight.new_empty(0)
    return _empty_loss(targets, reduction), dhidden, dweight


def _setup_kept(ctx, inputs, output) -> None:
    hidden, weight = inputs[:2]
    ctx.reduction, ctx.num_inputs = inputs[5], len(inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or a zero gradient of the logits' size would be allocated and filled
    ctx.save_for_backward(hidden, weight, output[1])


def _backward_kept(ctx, dloss: Tensor | None, _dlogits):
    if dloss is None:
        return (None,) * ctx.num_inputs
    hidden, weight, dlogits = ctx.saved_tensors
    needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
    dtype = hidden.dtype
    if ctx.reduction == "none":  # one float32 factor per row, applied where the tensor is small
        g = dloss[:, None]
        dhidden = (matmul(dlogits, weight) * g).to(dtype) if needs_dhidden else None
        dweight = matmul(dlogits.T, (hidden * g).to(dtype)).to(dtype) if needs_dweight else None
    else:  # dloss is nearly always a power of two (1, a loss scale, 1 / num_accumulated), so weight * dloss is exact
        dhidden = matmul(dlogits, weight * dloss).to(dtype) if needs_dhidden else None
        dweight = (matmul(dlogits.T, hidden) * dloss).to(dtype) if needs_dweight else None
    return dhidden, dweight, *(None,) * (ctx.num_inputs - 2)


def _setup_chunked(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward_chunked(ctx, dloss: Tensor | None, _dhidden, _dweight):
    if dloss is None:
        return (None,) * 8
    dhidden, dweight = ctx.saved_tensors
    needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
    dhidden = dhidden * dloss if needs_dhidden else None
    return dhidden, dweight * dloss if needs_dweight else None, *(None,) * 6


_AUTOGRAD = torch.library.register_autograd
_AUTOGRAD("pgolf::softcapped_ce_kept", _backward_kept, setup_context=_setup_kept, lib=LIBRARY)
_AUTOGRAD("pgolf::softcapped_ce_kept_cpu", _backward_kept, setup_context=_setup_kept, lib=LIBRARY)
_AUTOGRAD("pgolf::softcapped_ce_chunked", _backward_chunked, setup_context=_setup_chunked, lib=LIBRARY)

IMPLS = (  # fastest first; the last always runs
    Impl("triton", _triton, _why_not_triton),
    Impl("cpu", _cpu, _why_not_cpu),
    Impl("reference", reference.forward, always),
)


def softcapped_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 30.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of the logits softcap * tanh(hidden weight^T / softcap) against targets; head and loss in one op.

    Args:
        hidden: final hidden states [..., D], floating point.
        weight: head [V, D], the dtype of hidden (under autocast any mixture is allowed).
        targets: int64 [...], each in [0, V) or equal to ignore_index.
        softcap: bound on the logits' magnitude, in nats; > 0.
        ignore_index: target value whose position counts neither in the loss nor in the mean.
        reduction: "mean" over the positions not ignored, "sum", or "none" (0 at ignored positions).
        impl: "auto", or the name of one implementation.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or [...] for "none". Differentiable in hidden and weight.
        A target out of range makes the loss NaN where raising would need a device sync (CUDA, torch.compile).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, softcap <= 0, unknown reduction, a CPU target out of range, or
            the requested impl cannot run these arguments.

    Source: softcap from https://arxiv.org/abs/2408.00118, section 2.
    """
    require_tensors(OP, hidden=hidden, weight=weight, targets=targets)
    require_numbers(OP, softcap=softcap, ignore_index=ignore_index)
    is_float = hidden.dim() >= 1 and hidden.is_floating_point()
    require(is_float, OP, "hidden must be floating point [..., D]", _say(hidden))
    D = hidden.shape[-1]
    is_head = weight.dim() == 2 and weight.shape[1] == D and weight.shape[0] > 0
    require(is_head, OP, f"weight must be [V, D={D}] with V > 0", _say(weight), "F.linear's layout")
    alike = weight.dtype == hidden.dtype or autocast_dtype(hidden.device) is not None
    require(alike, OP, f"weight must be {hidden.dtype} as hidden is", _say(weight), "cast one or use autocast")
    expected = hidden.shape[:-1]
    require(targets.shape == expected, OP, f"targets must have hidden's shape {list(expected)}", _say(targets))
    require(targets.dtype == torch.int64, OP, "targets must be int64", _say(targets), "use targets.long()")
    require_one_device(OP, hidden=hidden, weight=weight, targets=targets)
    require(0 < softcap < math.inf, OP, "softcap must be positive and finite", softcap)
    require(reduction in ("mean", "sum", "none"), OP, "reduction must be 'mean', 'sum' or 'none'", repr(reduction))
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and targets.numel():
        _check_targets(targets, weight.shape[0], ignore_index)
    args = (hidden, weight, targets, softcap, ignore_index, reduction)
    return choose(OP, IMPLS, impl, *args).run(*args)


def _check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    wrong = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if wrong.any():
        require(False, OP, f"targets must be in [0, {vocab_size}) or {ignore_index}", targets[wrong][0].item())


def _say(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"
