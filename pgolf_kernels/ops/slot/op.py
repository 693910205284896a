"""slot_fit and slot_score: checks and choice of implementation. The maths is in reference.py.

Neither is differentiable (the model is frozen; the fit owns its closed-form gradient), so nothing is registered for
autograd, and torch.compile leaves both calls to eager Python.
"""

from typing import Literal

import torch
from torch import Tensor

from ...dispatch import Impl, always, choose
from . import cpu, cuda_kernel, reference
from .optimizers import LBFGS, AdamW
from .problem import SlotFit, check_fit, check_score

FIT_IMPLS = (  # fastest first; the last always runs
    Impl("cuda", cuda_kernel.fit, cuda_kernel.why_not_fit),
    Impl("cpu", cpu.fit, cpu.why_not),
    Impl("reference", reference.fit, always),
)
SCORE_IMPLS = (
    Impl("cuda", cuda_kernel.score, cuda_kernel.why_not),
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
    optimizer: AdamW | LBFGS,
    steps: int,
    init: SlotFit | None = None,
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
        optimizer: AdamW(...) or LBFGS(...).
        steps: optimiser steps; for LBFGS calls of up to max_iter iterations each.
        init: a SlotFit to start from (leading dimension 1 or G), e.g. the previous batch's; None for zeros.
        impl: "auto", "cuda", "cpu" or "reference".

    Returns:
        SlotFit(delta [G, D] or None, bias [G, V] or None, loss_per_step [steps, G]), float32 (float64 for float64
        input); G is B for share="window", 1 for share="batch". With share="window" and normalize="window" every
        window's result is bitwise independent of the rest of the batch.

    Raises:
        ValueError: an argument is out of its range, or the requested impl cannot run these arguments.

    Source: Hu et al., SLOT, https://arxiv.org/abs/2505.12392; the closed form is derived in reference.py.
    """
    arguments = (hidden, weight, targets, fit_mask, softcap, norm, share, normalize, parameters, optimizer, steps, init)
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
    impl: str = "auto",
) -> Tensor:
    """Negative log-likelihood of the targets at `rows` under the adapted head.

    Args:
        hidden, weight, targets, softcap, norm: as in slot_fit.
        fit: what slot_fit returned; None scores the frozen model.
        rows: [B, T] bool: which positions to score.
        impl: "auto", "cuda", "cpu" or "reference".

    Returns:
        [rows.sum()] float32 (float64 for float64 input), nats, in the order of targets[rows]: window by window.

    Raises:
        ValueError: an argument is out of its range, or the requested impl cannot run these arguments.
    """
    return _score(impl, hidden, weight, targets, fit, softcap, norm, rows)
