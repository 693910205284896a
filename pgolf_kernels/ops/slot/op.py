"""slot_fit and slot_score: checks and choice of implementation. The maths is in reference.py.

Neither is differentiable (the model is frozen; the fit owns its closed-form gradient), so nothing is registered for
autograd, and torch.compile leaves both calls to eager Python.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...dispatch import MAX_GRID_ROWS, Impl, always, choose, why_not_counted, why_not_triton
from . import cpu, cuda_kernel, reference
from .optimizers import AdamW, Steered
from .problem import Fit, Score, SlotFit, check_fit, check_score

TRITON_MAX_VOCAB = 8192


def _why_not_triton(p: Fit | Score) -> str | None:
    if reason := why_not_triton(p.hidden, p.weight):
        return reason
    if p.hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"the Triton kernels need float32 or bfloat16, got {p.hidden.dtype}"
    if len(p.weight) > TRITON_MAX_VOCAB:
        return f"the Triton kernels need a vocabulary of at most {TRITON_MAX_VOCAB}, got {len(p.weight)}"
    return why_not_counted(MAX_GRID_ROWS, windows=len(p.hidden)) or why_not_counted(features=p.hidden.shape[2])


def _why_not_triton_fit(p: Fit) -> str | None:
    if not isinstance(p.optimizer, AdamW):
        return f"the Triton kernels fit with AdamW only, got {type(p.optimizer).__name__}"
    return _why_not_triton(p)


def _triton_fit(p: Fit) -> tuple[Tensor, Tensor]:
    from . import triton_kernel  # Triton may be missing, and takes a second to import

    return triton_kernel.fit(p)


def _triton_score(p: Score) -> Tensor:
    from . import triton_kernel

    return triton_kernel.score(p)


# Fastest first; the last always runs. "cuda" has been measured on an H200 with AdamW and launches per step; its L-BFGS,
# which has no measured rival, and its single launch (off: cuda_kernel.ONE_LAUNCH) not yet. "triton" has been measured
# nowhere, so it only stands in for a CUDA extension that is missing.
FIT_IMPLS = (
    Impl("cuda", cuda_kernel.fit, cuda_kernel.why_not_fit),
    Impl("triton", _triton_fit, _why_not_triton_fit),
    Impl("cpu", cpu.fit, cpu.why_not),
    Impl("reference", reference.fit, always),
)
SCORE_IMPLS = (
    Impl("cuda", cuda_kernel.score, cuda_kernel.why_not),
    Impl("triton", _triton_score, _why_not_triton),
    Impl("cpu", cpu.score, cpu.why_not),
    Impl("reference", reference.score, always),
)


@torch.compiler.disable
@torch.no_grad()
def _fit(impl: str, *arguments) -> SlotFit:
    problem = check_fit(*arguments)
    x, losses = choose("slot_fit", FIT_IMPLS, impl, problem).run(problem)
    return SlotFit(*problem.split(x), losses)


@torch.compiler.disable
@torch.no_grad()
def _score(impl: str, *arguments) -> Tensor:
    problem = check_score(*arguments)
    return choose("slot_score", SCORE_IMPLS, impl, problem).run(problem)


def slot_fit(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    fit_mask: Tensor,
    *,
    softcap: float | None = 30.0,
    norm: Literal["after", "before"] = "after",
    share: Literal["window", "batch"] = "window",
    normalize: Literal["window", "batch"] = "window",
    parameters: Literal["delta", "bias", "both"] = "delta",
    optimizer: AdamW | Steered,
    steps: int,
    init: SlotFit | None = None,
    num_rows: Sequence[int] | None = None,
    impl: str = "auto",
) -> SlotFit:
    """Fit delta [D] and/or bias [V] in softcap * tanh(((h + delta) W^T + bias) / softcap) to the masked targets.

    Args:
        hidden: [B, T, D] float32, bfloat16 or float64, frozen. norm="after": the output of the final norm, what the
            head multiplies. norm="before": un-normalised; delta joins before the final weightless RMSNorm (eps 2^-23).
        weight: [V, D], hidden's dtype: the head.
        targets: [B, T] int64; read where fit_mask is positive only, so padding may hold anything.
        fit_mask: [B, T] bool, or non-negative float weights. A score stays causal if no masked target comes at or after
            the first target it is used to score. A window (share="batch": a batch) whose mask is empty keeps its
            parameters at init.
        softcap: c in nats; None for no cap.
        share: one delta and bias per "window", or one for the whole "batch".
        normalize: divide the loss by the total weight of the "window" or of the "batch"; matters through AdamW's eps.
        parameters: fit "delta", "bias" (added to the logits before the softcap) or "both".
        optimizer: AdamW(...), HypergradientAdamW(...) or LBFGS(...).
        steps: optimiser steps; for LBFGS calls of up to max_iter iterations each.
        init: a SlotFit to start from (leading dimension 1 or G), e.g. the previous batch's; None for zeros.
        num_rows: for each window, how many targets fit_mask keeps, or more, if the caller knows: then a GPU is asked
            nothing, and the host need not wait for it. None: it is asked.
        impl: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        SlotFit(delta [G, D] or None, bias [G, V] or None, loss_per_step [steps, G]), float32 (float64 for float64
        input); G is B for share="window", 1 for share="batch". With share="window" and normalize="window" every
        window's result is bitwise independent of the rest of the batch. With num_rows on a GPU, a window with more rows
        than that, an impossible weight or a used target out of range gives NaN where ValueError would have to wait.

    Raises:
        ValueError: an argument is out of its range, or the requested impl cannot run these arguments.

    Source: Hu et al., SLOT, https://arxiv.org/abs/2505.12392; the closed form is derived in reference.py.
    """
    arguments = (hidden, weight, targets, fit_mask, softcap, norm, share, normalize, parameters, optimizer, steps, init,
                 num_rows)  # fmt: skip
    return _fit(impl, *arguments)


def slot_score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    fit: SlotFit | None,
    *,
    softcap: float | None = 30.0,
    norm: Literal["after", "before"] = "after",
    rows: Tensor,
    num_rows: Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Negative log-likelihood of the targets at `rows` under the adapted head.

    Args:
        hidden, weight, targets, softcap, norm: as in slot_fit.
        fit: what slot_fit returned; None scores the frozen model.
        rows: [B, T] bool: which positions to score.
        num_rows: for each window, how many positions that is, if the caller knows: then a GPU is asked nothing, and the
            host need not wait for it. None: it is asked.
        impl: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        [rows.sum()] float32 (float64 for float64 input), nats, in the order of targets[rows]: window by window. With
        num_rows on a GPU, sum(num_rows) of them: NaN in the places that no row fills, and in all places of a window
        with more rows than that or with a target out of range.

    Raises:
        ValueError: an argument is out of its range, or the requested impl cannot run these arguments.
    """
    return _score(impl, hidden, weight, targets, fit, softcap, norm, rows, num_rows)
