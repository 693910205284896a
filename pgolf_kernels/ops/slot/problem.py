"""What a fit and a score are made of: the checked arguments (Fit, Score) and the result (SlotFit).

The surprise: `Fit.weights` is fit_mask already divided by the normaliser, so no implementation knows about
normalize="window" or "batch", and a window whose weights are all zero is simply left alone.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import require
from .optimizers import LBFGS, AdamW


class SlotFit(NamedTuple):
    """The fitted parameters; G is the number of windows for share="window", 1 for share="batch"."""

    delta: Tensor | None  # [G, D] shift of the hidden states; None if not fitted
    bias: Tensor | None  # [G, V] added to the logits before the softcap; None if not fitted
    loss_per_step: Tensor  # [steps, G] the objective before each step; [steps, 1] for LBFGS(joint=True)


@dataclass(frozen=True)
class Fit:
    """Checked arguments of slot_fit."""

    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [B, T] int64
    weights: Tensor  # [B, T] fit_mask / normaliser, in the dtype of the arithmetic
    num_rows: list[int]  # per window: how many weights are positive
    start: Tensor  # [G, P] parameters side by side: delta, then bias
    softcap: float | None
    norm: str
    parameters: str
    optimizer: AdamW | LBFGS
    steps: int

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def groups(self) -> list[range]:
        """The windows behind each row of the parameters."""
        num_windows, num_groups = len(self.hidden), len(self.start)
        return [range(num_windows)] if num_groups != num_windows else [range(i, i + 1) for i in range(num_windows)]

    def split(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """delta [..., D] and bias [..., V] out of parameters [..., P]."""
        if self.parameters == "both":
            return x[..., : self.weight.shape[1]], x[..., self.weight.shape[1] :]
        return (x, None) if self.parameters == "delta" else (None, x)


@dataclass(frozen=True)
class Score:
    """Checked arguments of slot_score."""

    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [B, T] int64
    rows: Tensor  # [B, T] bool
    num_rows: list[int]
    delta: Tensor | None  # [1 or B, D]
    bias: Tensor | None  # [1 or B, V]
    softcap: float | None
    norm: str

    @property
    def device(self) -> torch.device:
        return self.hidden.device


def address(tensor: Tensor | None) -> int:
    """What the compiled kernels take for a tensor; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def window_stride(parameter: Tensor | None) -> int:
    """Elements from one window's delta or bias to the next one's; 0 if all windows share it or there is none."""
    return 0 if parameter is None or len(parameter) == 1 else parameter.shape[1]


def accumulate_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of everything but the base logits."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _one_of(op: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    require(value in allowed, op, f"{name} must be one of {allowed}", repr(value))


def _check_model(op: str, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, softcap, norm) -> None:
    """The arguments both ops share; `rows` [B, T] marks the targets that will be read."""
    shape = tuple(hidden.shape)
    require(
        hidden.ndim == 3 and hidden.is_floating_point() and shape[2] > 0,
        op,
        "hidden must be floating point [B, T, D], D > 0",
        f"{hidden.dtype} {shape}",
    )
    require(
        weight.ndim == 2 and weight.shape[1] == shape[2] and weight.shape[0] > 0,
        op,
        f"weight must be [V, D] with D = {shape[2]} and V > 0",
        tuple(weight.shape),
    )
    require(
        weight.dtype == hidden.dtype,
        op,
        f"weight must have hidden's dtype {hidden.dtype}",
        weight.dtype,
        "cast one of them",
    )
    require(
        targets.dtype == torch.int64 and targets.shape == shape[:2],
        op,
        f"targets must be int64 {shape[:2]}",
        f"{targets.dtype} {tuple(targets.shape)}",
    )
    require(rows.shape == shape[:2], op, f"the row mask must have targets' shape {shape[:2]}", tuple(rows.shape))
    devices = {t.device for t in (hidden, weight, targets, rows)}
    require(len(devices) == 1, op, "all tensors must be on one device", sorted(map(str, devices)))
    require(
        softcap is None or (math.isfinite(softcap) and softcap > 0),
        op,
        "softcap must be a finite number > 0, or None for no cap",
        softcap,
    )
    _one_of(op, "norm", norm, ("after", "before"))


def _read_rows(op: str, targets: Tensor, rows: Tensor, counted: Tensor, valid: Tensor, vocab_size: int) -> list[int]:
    """Check values and count rows in one read from the device; each further read would drain a GPU's queue again.

    Args:
        rows: [B, T] bool; targets at these must lie in the vocabulary.
        counted: [B, T] bool, what the result counts in each window.
        valid: [] bool, whether the mask's weights are finite and not negative.
    """
    if not targets.numel():
        return [0] * len(targets)
    limits = torch.iinfo(torch.int64)
    lowest, highest = targets.where(rows, limits.max).min(), targets.where(rows, limits.min).max()
    facts = (counted.sum(1), lowest[None], highest[None], valid.long()[None])
    *num_rows, low, high, is_valid = torch.cat(facts).tolist()
    require(bool(is_valid), op, "fit_mask must be finite and >= 0", "a negative, infinite or NaN weight")
    require(
        low >= 0 and high < vocab_size,
        op,
        f"targets of the used rows must be in [0, {vocab_size})",
        f"{low} to {high}",
        "leave padding out of the mask",
    )
    return num_rows


def _window_totals(mask: Tensor) -> Tensor:
    """Sum of each row of mask [B, T], halves added to halves: an order that does not depend on the batch."""
    width = 1 << max(mask.shape[1] - 1, 0).bit_length()
    total = torch.nn.functional.pad(mask, (0, width - mask.shape[1]))
    while width > 1:
        width //= 2
        total = total[:, :width] + total[:, width:]
    return total[:, 0]


def _check_optimizer(optimizer: AdamW | LBFGS, share: str) -> None:
    op = "slot_fit"
    require(
        isinstance(optimizer, AdamW | LBFGS),
        op,
        "optimizer must be an AdamW or LBFGS of pgolf_kernels.ops.slot",
        type(optimizer).__name__,
    )
    require(math.isfinite(optimizer.lr) and optimizer.lr >= 0, op, "lr must be finite and >= 0", optimizer.lr)
    if isinstance(optimizer, AdamW):
        betas = optimizer.betas
        require(len(betas) == 2 and all(0 <= b < 1 for b in betas), op, "betas must be two numbers in [0, 1)", betas)
        require(optimizer.eps > 0, op, "eps must be > 0", optimizer.eps)
        require(optimizer.weight_decay >= 0, op, "weight_decay must be >= 0", optimizer.weight_decay)
        return
    require(optimizer.max_iter >= 1, op, "max_iter must be >= 1", optimizer.max_iter)
    require(optimizer.history >= 1, op, "history must be >= 1", optimizer.history)
    require(
        share == "window" or not optimizer.joint,
        op,
        "LBFGS(joint=True) needs share='window'",
        repr(share),
        "share='batch' is one problem already",
    )


def _start(init: SlotFit | None, num_groups: int, sizes: dict[str, int], like: Tensor) -> Tensor:
    """The initial parameters [G, P]: zeros, or init's, its leading 1 repeated for every group."""
    parts = []
    for name in ("delta", "bias"):
        given = None if init is None else getattr(init, name)
        if name not in sizes:
            require(
                given is None,
                "slot_fit",
                f"init.{name} must be None, since parameters leaves it out",
                "a tensor",
                "pass init._replace(...) or parameters='both'",
            )
        elif init is None:
            parts.append(like.new_zeros(num_groups, sizes[name]))
        else:
            allowed = {(1, sizes[name]), (num_groups, sizes[name])}
            require(
                given is not None and tuple(given.shape) in allowed and given.device == like.device,
                "slot_fit",
                f"init.{name} must be {' or '.join(map(str, sorted(allowed)))} on {like.device}",
                None if given is None else f"{tuple(given.shape)} on {given.device}",
            )
            parts.append(given.to(like.dtype).expand(num_groups, -1))
    return torch.cat(parts, dim=1)


def check_fit(hidden, weight, targets, fit_mask, softcap, norm, share, normalize, parameters, optimizer, steps, init):
    """Check slot_fit's arguments and return them as a Fit."""
    op = "slot_fit"
    require(
        fit_mask.dtype == torch.bool or fit_mask.is_floating_point(),
        op,
        "fit_mask must be bool or floating point",
        fit_mask.dtype,
    )
    _one_of(op, "share", share, ("window", "batch"))
    _one_of(op, "normalize", normalize, ("window", "batch"))
    _one_of(op, "parameters", parameters, ("delta", "bias", "both"))
    require(isinstance(steps, int) and steps >= 0, op, "steps must be an int >= 0", repr(steps))
    _check_optimizer(optimizer, share)
    mask = fit_mask.detach().to(torch.float64)
    _check_model(op, hidden, weight, targets, mask, softcap, norm)

    totals = _window_totals(mask)
    denominator = totals if normalize == "window" else totals.sum().expand(len(mask))
    dtype = accumulate_dtype(hidden)
    weights = (mask / denominator.where(denominator > 0, 1.0)[:, None]).to(dtype)
    valid = ((mask >= 0) & (mask < math.inf)).all()
    num_rows = _read_rows(op, targets, mask > 0, weights > 0, valid, len(weight))
    sizes = {"delta": weight.shape[1], "bias": weight.shape[0]}
    sizes = sizes if parameters == "both" else {parameters: sizes[parameters]}
    num_groups = 1 if share == "batch" else len(hidden)
    return Fit(
        hidden=hidden.detach(),
        weight=weight.detach(),
        targets=targets,
        weights=weights,
        num_rows=num_rows,
        start=_start(init, num_groups, sizes, weights),
        softcap=softcap,
        norm=norm,
        parameters=parameters,
        optimizer=optimizer,
        steps=steps,
    )


def _fitted(fit: SlotFit | None, name: str, size: int, hidden: Tensor) -> Tensor | None:
    """One of fit's parameters, [1 or B, size]; None if it was not fitted."""
    value = None if fit is None else getattr(fit, name)
    if value is None:
        return None
    allowed = {(1, size), (len(hidden), size)}
    require(
        tuple(value.shape) in allowed and value.device == hidden.device,
        "slot_score",
        f"fit.{name} must be {' or '.join(map(str, sorted(allowed)))} on {hidden.device}",
        f"{tuple(value.shape)} on {value.device}",
    )
    return value.detach().to(accumulate_dtype(hidden))


def check_score(hidden, weight, targets, fit, softcap, norm, rows) -> Score:
    """Check slot_score's arguments and return them as a Score."""
    require(rows.dtype == torch.bool, "slot_score", "rows must be a bool mask [B, T]", rows.dtype)
    _check_model("slot_score", hidden, weight, targets, rows, softcap, norm)
    num_rows = _read_rows("slot_score", targets, rows, rows, rows.new_ones(()), len(weight))
    return Score(
        hidden=hidden.detach(),
        weight=weight.detach(),
        targets=targets,
        rows=rows,
        num_rows=num_rows,
        delta=_fitted(fit, "delta", weight.shape[1], hidden),
        bias=_fitted(fit, "bias", weight.shape[0], hidden),
        softcap=softcap,
        norm=norm,
    )
