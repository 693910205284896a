"""What a fit and a score are made of: the checked arguments (Fit, Score) and the result (SlotFit).

The surprise is what waits: checks of shapes and options come first and cost no launch, but which rows take part, and
whether the mask and the targets are possible, is only known on the device. `Fit.weights` and `num_rows` read it there
when they are first asked for; the CUDA and Triton kernels never ask, and count for themselves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import require, require_numbers, require_tensors
from .optimizers import AdamW, HypergradientAdamW, Steered


class SlotFit(NamedTuple):
    """The fitted parameters; G is the number of windows for share="window", 1 for share="batch"."""

    delta: Tensor | None  # [G, D] shift of the hidden states; None if not fitted
    bias: Tensor | None  # [G, V] added to the logits before the softcap; None if not fitted
    loss_per_step: Tensor  # [steps, G] the objective before each step; [steps, 1] for joint=True


@dataclass(frozen=True)
class Fit:
    """Checked arguments of slot_fit."""

    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] fit_mask
    told: list[int] | None  # per window: the number of rows that take part, or more; None if the caller does not know
    initial: Tensor | None  # [G, P] where to start; None: zeros
    softcap: float | None
    norm: str
    shared: bool  # one row of parameters for all windows
    normalize: str
    parameters: str
    optimizer: AdamW | Steered
    steps: int

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def start(self) -> Tensor:
        """[G, P] a fresh copy of where to start: parameters side by side, delta, then bias."""
        if self.initial is not None:
            return self.initial.clone()
        (V, D), num_groups = self.weight.shape, 1 if self.shared else len(self.hidden)
        size = {"delta": D, "bias": V, "both": D + V}[self.parameters]
        return torch.zeros(num_groups, size, dtype=accumulate_dtype(self.hidden), device=self.device)

    @cached_property
    def weights(self) -> Tensor:
        """[B, T] mask / normaliser, in the dtype of the arithmetic."""
        mask = self.mask.to(torch.float64)
        totals = _window_totals(mask)
        denominator = totals if self.normalize == "window" else totals.sum().expand(len(mask))
        return (mask / denominator.where(denominator > 0, 1.0)[:, None]).to(accumulate_dtype(self.hidden))

    @cached_property
    def num_rows(self) -> list[int]:
        """Of each window, how many weights are positive.

        Raises:
            ValueError: the mask or a target it uses is impossible, or more rows take part than the caller told.
        """
        valid = ((self.mask >= 0) & (self.mask < math.inf)).all()
        facts = _read_rows(self.targets, self.mask > 0, self.weights > 0, valid)
        return check_facts("slot_fit", *facts, len(self.weight), self.told)

    def groups(self) -> list[range]:
        """The windows behind each row of the parameters."""
        num_windows = len(self.hidden)
        return [range(num_windows)] if self.shared else [range(i, i + 1) for i in range(num_windows)]

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
    told: list[int] | None  # per window: the number of rows; None if the caller does not know
    delta: Tensor | None  # [1 or B, D]
    bias: Tensor | None  # [1 or B, V]
    softcap: float | None
    norm: str

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @cached_property
    def num_rows(self) -> list[int]:
        """Of each window, the rows to score.

        Raises:
            ValueError: a target of these rows is impossible, or their number is not what the caller told.
        """
        facts = _read_rows(self.targets, self.rows, self.rows, self.rows.new_ones(()))
        return check_facts("slot_score", *facts, len(self.weight), self.told, exactly=True)


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
    if softcap is not None:
        require_numbers(op, softcap=softcap)
    require(
        softcap is None or (math.isfinite(softcap) and softcap > 0),
        op,
        "softcap must be a finite number > 0, or None for no cap",
        softcap,
    )
    _one_of(op, "norm", norm, ("after", "before"))


def _read_rows(targets: Tensor, rows: Tensor, counted: Tensor, valid: Tensor) -> tuple[list[int], int, int, bool]:
    """What check_facts takes, in one read from the device; each further read would drain a GPU's queue again.

    Args:
        rows: [B, T] bool, the targets that will be used.
        counted: [B, T] bool, what the result counts in each window.
        valid: [] bool, whether the mask's weights are finite and not negative.
    """
    if not targets.numel():
        return [0] * len(targets), 0, 0, True
    limits = torch.iinfo(torch.int64)
    lowest, highest = targets.where(rows, limits.max).min(), targets.where(rows, limits.min).max()
    facts = (counted.sum(1), lowest[None], highest[None], valid.long()[None])
    *num_rows, low, high, is_valid = torch.cat(facts).tolist()
    return num_rows, low, high, bool(is_valid)


def check_facts(
    op: str,
    num_rows: list[int],
    low: int,
    high: int,
    is_valid: bool,
    vocab_size: int,
    told: list[int] | None,
    exactly: bool = False,
) -> list[int]:
    """Return num_rows, the number of rows that take part in each window, or raise ValueError.

    Args:
        low, high: least and greatest of the targets that are used; low > high if there is none.
        is_valid: the mask's weights are finite and not negative.
        told: what the caller said of num_rows: an upper bound, or `exactly` that.
    """
    require(is_valid, op, "fit_mask must be finite and >= 0", "a negative, infinite or NaN weight")
    require(
        low > high or (low >= 0 and high < vocab_size),
        op,
        f"targets of the used rows must be in [0, {vocab_size})",
        f"{low} to {high}",
        "leave padding out of the mask",
    )
    for i, n in enumerate(num_rows):
        fits = told is None or (told[i] == n if exactly else told[i] >= n)
        require(fits, op, f"num_rows[{i}] must be {n}" + " or more" * (not exactly), told and told[i])
    return num_rows


def _window_totals(mask: Tensor) -> Tensor:
    """Sum of each row of mask [B, T], halves added to halves: an order that does not depend on the batch."""
    width = 1 << max(mask.shape[1] - 1, 0).bit_length()
    total = torch.nn.functional.pad(mask, (0, width - mask.shape[1]))
    while width > 1:
        width //= 2
        total = total[:, :width] + total[:, width:]
    return total[:, 0]


def _told(op: str, num_rows: Sequence[int] | None, shape: tuple[int, int]) -> list[int] | None:
    """num_rows as a list, checked as far as no device needs to be asked."""
    if num_rows is None:
        return None
    B, T = shape
    require(isinstance(num_rows, Sequence), op, f"num_rows must be None or {B} ints", type(num_rows).__name__)
    told = list(num_rows)
    fits = len(told) == B and all(isinstance(n, int) and 0 <= n <= T for n in told)
    require(fits, op, f"num_rows must be None or {B} ints in [0, {T}]", told, "one for each window")
    return told


def _check_optimizer(optimizer: AdamW | Steered, share: str) -> None:
    op = "slot_fit"
    require(
        isinstance(optimizer, AdamW | Steered),
        op,
        "optimizer must be an AdamW, HypergradientAdamW or LBFGS of pgolf_kernels.ops.slot",
        type(optimizer).__name__,
    )
    names = ("lr", "eps", "weight_decay", "max_iter", "history", "lr_min", "lr_max")
    fields = {name: value for name in names if (value := getattr(optimizer, name, 0)) is not None or name != "lr_min"}
    require_numbers(op, **{f"optimizer's {name}": value for name, value in fields.items()})
    require(math.isfinite(optimizer.lr) and optimizer.lr >= 0, op, "lr must be finite and >= 0", optimizer.lr)
    if isinstance(optimizer, AdamW | HypergradientAdamW):
        betas = optimizer.betas
        two = isinstance(betas, Sequence) and len(betas) == 2 and all(isinstance(b, int | float) for b in betas)
        require(two and all(0 <= b < 1 for b in betas), op, "betas must be two numbers in [0, 1)", betas)
        require(optimizer.eps > 0, op, "eps must be > 0", optimizer.eps)
        require(optimizer.weight_decay >= 0, op, "weight_decay must be >= 0", optimizer.weight_decay)
    else:
        require(optimizer.max_iter >= 1, op, "max_iter must be >= 1", optimizer.max_iter)
        require(optimizer.history >= 1, op, "history must be >= 1", optimizer.history)
    if isinstance(optimizer, HypergradientAdamW):
        low, high = optimizer.lr_min, optimizer.lr_max
        require(0 <= low <= high < math.inf, op, "lr_min and lr_max must be finite, 0 <= lr_min <= lr_max", (low, high))
    require(
        share == "window" or isinstance(optimizer, AdamW) or not optimizer.joint,
        op,
        f"{type(optimizer).__name__}(joint=True) needs share='window'",
        repr(share),
        "share='batch' is one problem already",
    )


def _initial(init: SlotFit | None, num_groups: int, sizes: dict[str, int], like: Tensor) -> Tensor | None:
    """init's parameters [G, P], its leading 1 repeated for every group."""
    if init is None:
        return None
    require(isinstance(init, SlotFit), "slot_fit", "init must be a SlotFit, or None", type(init).__name__)
    dtype, parts = accumulate_dtype(like), []
    for name in ("delta", "bias"):
        given = getattr(init, name)
        if name not in sizes:
            require(
                given is None,
                "slot_fit",
                f"init.{name} must be None, since parameters leaves it out",
                "a tensor",
                "pass init._replace(...) or parameters='both'",
            )
        else:
            allowed = {(1, sizes[name]), (num_groups, sizes[name])}
            require(
                given is not None and tuple(given.shape) in allowed and given.device == like.device,
                "slot_fit",
                f"init.{name} must be {' or '.join(map(str, sorted(allowed)))} on {like.device}",
                None if given is None else f"{tuple(given.shape)} on {given.device}",
            )
            parts.append(given.detach().to(dtype).expand(num_groups, -1))
    return torch.cat(parts, dim=1)


def check_fit(
    hidden,
    weight,
    targets,
    fit_mask,
    softcap,
    norm,
    share,
    normalize,
    parameters,
    optimizer,
    steps,
    init,
    num_rows=None,
):
    """Check slot_fit's arguments and return them as a Fit; values on a GPU are left to the implementation."""
    op = "slot_fit"
    require_tensors(op, hidden=hidden, weight=weight, targets=targets, fit_mask=fit_mask)
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
    _check_model(op, hidden, weight, targets, fit_mask, softcap, norm)
    sizes = {"delta": weight.shape[1], "bias": weight.shape[0]}
    sizes = sizes if parameters == "both" else {parameters: sizes[parameters]}
    problem = Fit(
        hidden=hidden.detach(),
        weight=weight.detach(),
        targets=targets,
        mask=fit_mask.detach(),
        told=_told(op, num_rows, targets.shape),
        initial=_initial(init, 1 if share == "batch" else len(hidden), sizes, hidden),
        softcap=softcap,
        norm=norm,
        shared=share == "batch",
        normalize=normalize,
        parameters=parameters,
        optimizer=optimizer,
        steps=steps,
    )
    if hidden.device.type == "cpu":
        _ = problem.num_rows  # refuses what is impossible
    return problem


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


def check_score(hidden, weight, targets, fit, softcap, norm, rows, num_rows=None) -> Score:
    """Check slot_score's arguments and return them as a Score; values on a GPU are left to the implementation."""
    op = "slot_score"
    require_tensors(op, hidden=hidden, weight=weight, targets=targets, rows=rows)
    require(isinstance(fit, SlotFit | None), op, "fit must be what slot_fit returned, or None", type(fit).__name__)
    require(rows.dtype == torch.bool, op, "rows must be a bool mask [B, T]", rows.dtype)
    _check_model(op, hidden, weight, targets, rows, softcap, norm)
    problem = Score(
        hidden=hidden.detach(),
        weight=weight.detach(),
        targets=targets,
        rows=rows,
        told=_told(op, num_rows, targets.shape),
        delta=_fitted(fit, "delta", weight.shape[1], hidden),
        bias=_fitted(fit, "bias", weight.shape[0], hidden),
        softcap=softcap,
        norm=norm,
    )
    if hidden.device.type == "cpu":
        _ = problem.num_rows  # refuses what is impossible
    return problem
