"""Choose the implementation of an op: an ordered list, fastest first, where each entry says why it cannot run.

The same sentence explains an error, skips a test and fills `explain`. The last entry, `reference`, always runs.
Ops register under the `pgolf` namespace through LIBRARY (Library.define/impl: a quarter of custom_op's overhead per
call, and one opaque node for torch.compile).
"""

import contextlib
import functools
import importlib.util
import logging
import numbers
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LIBRARY = torch.library.Library("pgolf", "DEF")

# Which implementation each op ran last, for logs and reports.
CHOSEN: dict[str, str] = {}

# Triton's own switch, read once because Triton reads it when a kernel is defined.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Why no Triton kernel can run here, or None; a bundled program that holds none says so here.
TRITON_MISSING = None if importlib.util.find_spec("triton") else "the package `triton` is not installed"


class Impl(NamedTuple):
    """One way to compute an op. `why_not(*args)`: None if it can run these arguments, else the reason as a sentence."""

    name: str
    run: Callable
    why_not: Callable[..., str | None]


ASK = object()  # given as `impl`, makes an op check its arguments and raise Asked instead of computing


class Asked(Exception):
    """What `choose` was asked: `impls` and the arguments they would get. For `explain`."""

    def __init__(self, impls: tuple[Impl, ...], arguments: tuple):
        super().__init__()
        self.impls, self.arguments = impls, arguments


_forced = ["auto"]  # what impl="auto" means, innermost last


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Within it impl="auto" means `name` in every op: forced("reference") shows what the kernels are worth."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def meant(name: str) -> str:
    """The implementation an op is asked for: `name`, or what "auto" means here."""
    return _forced[-1] if name == "auto" else name


def always(*_args) -> None:
    """The `why_not` of a reference: it runs everywhere."""


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("pgolf_kernels").warning(message)


@torch.compiler.assume_constant_result
def record(op: str, name: str) -> None:
    """Note a choice in CHOSEN. While torch.compile traces, this runs once and leaves nothing in the graph: written
    there directly, CHOSEN would be guarded, and the first op that joins it would compile every graph again.
    """
    CHOSEN[op] = name


def choose(op: str, impls: tuple[Impl, ...], name: str, *args) -> Impl:
    """Return the first implementation that can run `args`, or the one called `name`.

    Raises:
        ValueError: `name` is unknown, or cannot run these arguments (the message says why).
    """
    if name is ASK:
        raise Asked(impls, args)
    name = meant(name)
    skipped = []
    # Nobody expects a GPU kernel on a CPU, or the reverse: such a refusal is no reason to warn.
    flat = [t for arg in args for t in (arg if isinstance(arg, list) else (arg,))]
    flat = [t for t in flat if not isinstance(t, int | float)]  # a compiler may hold these as symbols
    on_gpu = any(getattr(getattr(t, "device", None), "type", None) == "cuda" for t in flat)
    elsewhere = ("cpu",) if on_gpu else ("cuda", "triton", "dequantize")
    for impl in impls:
        if name not in ("auto", impl.name):
            continue
        reason = impl.why_not(*args)
        if reason is None:
            if impl is impls[-1] and skipped and not torch.compiler.is_compiling():
                _warn_once(f"{op}: running the reference implementation ({'; '.join(skipped)})")
            record(op, impl.name)
            return impl
        if name != "auto":
            raise ValueError(f"{op}: impl={name!r} cannot run here: {reason}")
        if impl.name.partition("_")[0] not in elsewhere:
            skipped.append(f"{impl.name}: {reason}")
    raise ValueError(f"{op}: unknown impl {name!r}; expected 'auto' or one of {[i.name for i in impls]}")


def why_not_triton(*tensors: Tensor) -> str | None:
    """None if Triton can run on these tensors. TRITON_INTERPRET=1 runs kernels on the CPU, slowly, for tests."""
    if TRITON_MISSING:
        return TRITON_MISSING
    for t in tensors:
        if t.numel() == 0:
            return f"Triton kernels need non-empty tensors, got shape {tuple(t.shape)}"
        if not t.is_cuda and not TRITON_INTERPRETED:
            return f"Triton needs CUDA tensors, got {t.device}"
    return None


# What 32-bit numbers of programs, rows and columns hold, a tile beyond the last one included.
MAX_COUNT = 2**31 - 2**16
MAX_GRID_ROWS = 2**16 - 1  # programs along the second dimension of a grid


def why_not_counted(limit: int = MAX_COUNT, **counts: int) -> str | None:
    """None if none of these is beyond `limit`. Offsets in memory are 64 bits wide everywhere, and need no limit."""
    for name, count in counts.items():
        if count > limit:
            return f"the kernels number {name.replace('_', ' ')} up to {limit}, got {count}"
    return None


# Releases in which products of a transposed accumulator came out wrong on Hopper, silently:
# https://github.com/fla-org/flash-linear-attention/issues/640
_SUSPECT_TRITON = ((3, 4), (3, 8))
_checked: set[tuple[str, torch.device]] = set()


def _suspect(device: torch.device) -> bool:
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return on_hopper and _SUSPECT_TRITON[0] <= version < _SUSPECT_TRITON[1]


def self_check(op: str, device: torch.device, probe: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Before the first launch of an op on a device where Triton has miscompiled: let probe() return (ours, float64's).

    Raises:
        RuntimeError: ours is off by more than 2 %, a hundred times what 16 bits cost or less.
    """
    if (op, device) in _checked:
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return  # nothing can be read back here; the next launch outside a graph is checked
    _checked.add((op, device))  # the probe launches, too
    if not _suspect(device):
        return
    ours, exact = probe()
    error = float((ours.double() - exact).norm() / exact.norm())
    if not error <= 0.02:
        _checked.discard((op, device))
        import triton

        raise RuntimeError(
            f"{op}: Triton {triton.__version__} compiles this kernel wrongly on {torch.cuda.get_device_name(device)} "
            f"(relative error {error:.1e} on a small problem); use impl='reference', or another release of Triton"
        )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast asks for on a device; None where it is off, or unknown as on "meta"."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def require_tensors(op: str, **values: object) -> None:
    """Raise ValueError unless all of them are tensors."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            require(False, op, f"{name} must be a tensor", type(value).__name__, "see torch.as_tensor")


def require_numbers(op: str, **values: object) -> None:
    """Raise ValueError unless all of them are numbers, of Python's or NumPy's types."""
    for name, value in values.items():
        if type(value) not in (int, float) and not isinstance(value, numbers.Real):
            require(False, op, f"{name} must be a number", type(value).__name__)


def require_one_device(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on one device."""
    first, *others = tensors.values()
    if any(t.device != first.device for t in others):
        places = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        require(False, op, f"{', '.join(tensors)} must be on one device", places, "move them with .to(device)")


def require(condition: bool, op: str, must: str, got: object, advice: str = "") -> None:
    """Raise ValueError('op: must, got ...; advice') unless `condition`."""
    if not condition:
        raise ValueError(f"{op}: {must}, got {got}" + (f"; {advice}" if advice else ""))
