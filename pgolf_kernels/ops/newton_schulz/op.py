"""newton_schulz and newton_schulz_banks: argument checks, registration and choice of implementation.

The maths is in reference.py. A list of banks is orthogonalised one by one, but for "triton_megakernel", which takes all
of them in one launch. No GPU has timed it yet, so "auto" prefers "triton", which has been.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...dispatch import (
    ASK,
    LIBRARY,
    MAX_GRID_ROWS,
    TRITON_INTERPRETED,
    Impl,
    always,
    choose,
    require,
    require_numbers,
    require_tensors,
    self_check,
    why_not_counted,
    why_not_triton,
)
from . import cpu, reference

NAMED = {"quintic": reference.QUINTIC, "polar_express": reference.POLAR_EXPRESS}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _why_not_triton(
    g: Tensor,
    coefficients: reference.Coefficients,
    _rows: bool,
    _eps: float,
    dtype: torch.dtype,
    _plain: bool = False,
) -> str | None:
    if reason := why_not_triton(g):
        return reason
    if dtype not in (torch.bfloat16, torch.float16) or g.dtype == torch.float64:
        return f"the Triton kernels compute in 16 bits, got {g.dtype} and a result in {dtype}"
    if not coefficients:
        return "without a step there is nothing for the Triton kernels to do"
    if g.requires_grad and torch.is_grad_enabled():
        return "the Triton kernels have no backward, and g requires a gradient"
    rows, cols = g.shape[-2:]
    if reason := why_not_counted(MAX_GRID_ROWS, matrices=g.numel() // (rows * cols)):
        return reason
    return why_not_counted(rows=rows, columns=cols)


def _flat(coefficients: reference.Coefficients) -> list[float]:
    """As the schema of a registered op can hold them."""
    return [value for triple in coefficients for value in triple]


def _triples(flat: list[float]) -> reference.Coefficients:
    return tuple(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))


def _triton(
    g: Tensor,
    coefficients: reference.Coefficients,
    row_normalize: bool,
    eps: float,
    dtype: torch.dtype,
    plain: bool = False,
) -> Tensor:
    return torch.ops.pgolf.newton_schulz_triton(g, _flat(coefficients), row_normalize, eps, dtype, plain)


LIBRARY.define(
    "newton_schulz_triton(Tensor g, float[] coefficients, bool row_normalize, float eps, ScalarType dtype, "
    "bool plain=False) -> Tensor"
)


def _launch(
    g: Tensor, coefficients: list[float], row_normalize: bool, eps: float, dtype: torch.dtype, plain: bool = False
) -> Tensor:
    from . import triton_kernel  # Triton may be missing, and takes a second to import

    self_check("newton_schulz", g.device, lambda: _probe(triton_kernel.forward, g.device))
    return triton_kernel.forward(g, _triples(coefficients), row_normalize, eps, dtype, plain)


LIBRARY.define(
    "newton_schulz_megakernel(Tensor[] banks, float[] coefficients, bool row_normalize, float eps, ScalarType dtype, "
    "bool plain=False) -> Tensor[]"
)


def _launch_all(
    banks: list[Tensor],
    coefficients: list[float],
    row_normalize: bool,
    eps: float,
    dtype: torch.dtype,
    plain: bool = False,
) -> list[Tensor]:
    from . import megakernel

    def forward(g: Tensor, *args) -> Tensor:
        return megakernel.forward([g], *args)[0]

    self_check("newton_schulz_banks", banks[0].device, lambda: _probe(forward, banks[0].device))
    return megakernel.forward(banks, _triples(coefficients), row_normalize, eps, dtype, plain)


def _probe(forward: Callable[..., Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Banks of a few tiles, wide enough for the Gram form, by Triton and in float64."""
    g, steps = torch.randn(2, 64, 192, device=device), schedule("quintic", 5)
    args = steps, True, 1e-7
    return forward(g, *args, torch.bfloat16), reference.forward(g.double(), *args, torch.float64)


@torch.library.register_fake("pgolf::newton_schulz_megakernel", lib=LIBRARY)
def _(
    banks: list[Tensor],
    coefficients: list[float],
    row_normalize: bool,
    eps: float,
    dtype: torch.dtype,
    plain: bool = False,
) -> list[Tensor]:
    return [torch.empty(g.shape, dtype=dtype, device=g.device) for g in banks]


for _device in ("CUDA", *("CPU",) * TRITON_INTERPRETED):
    LIBRARY.impl("newton_schulz_triton", _launch, _device)
    LIBRARY.impl("newton_schulz_megakernel", _launch_all, _device)


LIBRARY.define(
    "newton_schulz_cpu(Tensor g, float[] coefficients, bool row_normalize, float eps, ScalarType dtype) -> Tensor"
)


def _cpu(
    g: Tensor,
    coefficients: reference.Coefficients,
    row_normalize: bool,
    eps: float,
    dtype: torch.dtype,
    _plain: bool = False,
) -> Tensor:
    return torch.ops.pgolf.newton_schulz_cpu(g, _flat(coefficients), row_normalize, eps, dtype)


@torch.library.impl(LIBRARY, "newton_schulz_cpu", "CPU")
def _(g: Tensor, coefficients: list[float], row_normalize: bool, eps: float, dtype: torch.dtype) -> Tensor:
    return cpu.forward(g, _triples(coefficients), row_normalize, eps, dtype)


@torch.library.register_fake("pgolf::newton_schulz_cpu", lib=LIBRARY)
@torch.library.register_fake("pgolf::newton_schulz_triton", lib=LIBRARY)
def _(
    g: Tensor, coefficients: list[float], row_normalize: bool, eps: float, dtype: torch.dtype, plain: bool = False
) -> Tensor:
    return torch.empty(g.shape, dtype=dtype, device=g.device)


def _why_not_cpu(g: Tensor, steps, row_normalize: bool, eps: float, dtype: torch.dtype, plain: bool = False):
    if plain:
        return "the C++ kernel keeps what roundings lose, and has no plain form"
    return cpu.why_not(g, steps, row_normalize, eps, dtype)


def _reference(g: Tensor, steps, row_normalize: bool, eps: float, dtype: torch.dtype, _plain: bool = False) -> Tensor:
    return reference.forward(g, steps, row_normalize, eps, dtype)


IMPLS = (  # fastest first
    Impl("triton", _triton, _why_not_triton),
    Impl("cpu", _cpu, _why_not_cpu),
    Impl("reference", _reference, always),
)


def _each(impl: Impl) -> Impl:
    """The same for a list of banks, one after another."""

    def why_not(banks: list[Tensor], *args) -> str | None:
        return next(filter(None, (impl.why_not(g, *args) for g in banks)), None)

    return Impl(impl.name, lambda banks, *args: [impl.run(g, *args) for g in banks], why_not)


def _megakernel(
    banks: list[Tensor],
    coefficients: reference.Coefficients,
    row_normalize: bool,
    eps: float,
    dtype: torch.dtype,
    plain: bool,
) -> list[Tensor]:
    return torch.ops.pgolf.newton_schulz_megakernel(banks, _flat(coefficients), row_normalize, eps, dtype, plain)


_TRITON, _CPU, _REFERENCE = map(_each, IMPLS)
# "auto" takes the first that can run: the megakernel goes first once a GPU has shown it to be faster.
BANKS_IMPLS = (_TRITON, Impl("triton_megakernel", _megakernel, _TRITON.why_not), _CPU, _REFERENCE)


def schedule(
    coefficients: str | Sequence[float] | Sequence[Sequence[float]], steps: int
) -> tuple[tuple[float, float, float], ...]:
    """The (a, b, c) of each of `steps` steps: the list's first ones, its last one repeated when the list is shorter."""
    if isinstance(coefficients, str):
        require(
            coefficients in NAMED, "newton_schulz", f"coefficients must be one of {list(NAMED)}", repr(coefficients)
        )
        triples = NAMED[coefficients]
    elif not isinstance(coefficients, Sequence):
        require(False, "newton_schulz", "coefficients must be a name or a list of triples (a, b, c)", coefficients)
    elif len(coefficients) == 3 and all(isinstance(value, int | float) for value in coefficients):
        triples = (tuple(coefficients),)  # one triple for every step, torch.optim.Muon's way
    else:
        triples = tuple(tuple(triple) for triple in coefficients)
    valid = len(triples) > 0 and all(len(triple) == 3 for triple in triples)
    require(valid, "newton_schulz", "coefficients must be a name or a list of triples (a, b, c)", coefficients)
    require(isinstance(steps, int) and steps >= 0, "newton_schulz", "steps must be an int >= 0", steps)
    return tuple(triples[min(step, len(triples) - 1)] for step in range(steps))


def newton_schulz(
    g: Tensor,
    steps: int = 5,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "quintic",
    row_normalize: bool = False,
    eps: float = 1e-7,
    *,
    dtype: torch.dtype | None = None,
    plain: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Orthogonalise matrices approximately: G = U S V^T -> U S' V^T with every s' near 1 (about 0.7 to 1.2 in 5 steps).

    Args:
        g: (..., m, n), floating point, any strides; never written. A zero matrix gives zeros.
        steps: number of iterations; 0 only normalises.
        coefficients: "quintic", "polar_express", one (a, b, c), or a list of them, one per step. A list that is shorter
            than `steps` repeats its last entry, a longer one is cut.
        row_normalize: divide each row by max(its norm, eps) first (MuonEq-R).
        eps: guards the division by the Frobenius norm, and by the row norms.
        dtype: cast to this after the normalisation, compute and return it; None: g's dtype. Kernels may use a more
            accurate format of the same width inside.
        impl: "auto", or the name of an implementation (tests and benchmarks use this).

    Returns:
        (..., m, n) in `dtype`, contiguous.

    Raises:
        ValueError: g is no floating-point matrix, the coefficients are malformed, or `impl` cannot run these arguments.

    Source: https://kellerjordan.github.io/posts/muon
    """
    require_tensors("newton_schulz", g=g)
    require_numbers("newton_schulz", eps=eps)
    require(g.dim() >= 2, "newton_schulz", "g must be a matrix or a batch of matrices", f"shape {tuple(g.shape)}")
    require(g.dtype in DTYPES, "newton_schulz", "g must be floating point", g.dtype)
    dtype = dtype or g.dtype
    require(dtype in DTYPES, "newton_schulz", "dtype must be floating point", dtype)
    require(eps >= 0, "newton_schulz", "eps must be >= 0", eps)
    args = (g, schedule(coefficients, steps), row_normalize, eps, dtype, plain)
    return choose("newton_schulz", IMPLS, impl, *args).run(*args)


def newton_schulz_banks(
    banks: Sequence[Tensor],
    steps: int = 5,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "quintic",
    row_normalize: bool = False,
    eps: float = 1e-7,
    *,
    dtype: torch.dtype | None = None,
    plain: bool = False,
    impl: str = "auto",
) -> list[Tensor]:
    """[newton_schulz(g, ...) for g in banks], in one launch if impl is "triton_megakernel".

    Args:
        banks: any number of (..., m, n), of any shapes, one dtype, on one device.
        steps, coefficients, row_normalize, eps, dtype, plain: as in `newton_schulz`, the same for all banks.
        impl: "auto", or the name of an implementation. "triton_megakernel" must have run once with these shapes before
            a CUDA graph of it is captured.

    Returns:
        One (..., m, n) per bank, in `dtype`, contiguous.

    Raises:
        ValueError: as `newton_schulz`, or the banks differ in dtype or device.
    """
    name = "newton_schulz_banks"
    require(isinstance(banks, Sequence | Tensor), name, "banks must be a list of tensors", type(banks).__name__)
    banks = list(banks)
    require_tensors(name, **{f"banks[{i}]": g for i, g in enumerate(banks)})
    require_numbers(name, eps=eps)
    if not banks:
        return []
    kinds = {(g.dtype, g.device) for g in banks}
    require(len(kinds) == 1, name, "banks must have one dtype and be on one device", sorted(map(str, kinds)))
    for g in banks:
        require(g.dim() >= 2, name, "every bank must be a matrix or a batch of matrices", f"shape {tuple(g.shape)}")
    require(banks[0].dtype in DTYPES, name, "banks must be floating point", banks[0].dtype)
    dtype = dtype or banks[0].dtype
    require(dtype in DTYPES, name, "dtype must be floating point", dtype)
    filled = [g for g in banks if g.numel()]
    args = (filled or banks, schedule(coefficients, steps), row_normalize, eps, dtype, plain)
    some = filled or impl is ASK
    results = iter(choose(name, BANKS_IMPLS, impl, *args).run(*args) if some else ())
    return [next(results) if g.numel() else torch.empty(g.shape, dtype=dtype, device=g.device) for g in banks]
