"""newton_schulz: argument checks, registration and choice of implementation. The maths is in reference.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...dispatch import LIBRARY, TRITON_INTERPRETED, Impl, always, choose, require, why_not_triton
from . import cpu, reference

NAMED = {"quintic": reference.QUINTIC, "polar_express": reference.POLAR_EXPRESS}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _why_not_triton(g: Tensor, coefficients: reference.Coefficients, _rows: bool, _eps: float, dtype: torch.dtype):
    if reason := why_not_triton(g):
        return reason
    if dtype not in (torch.bfloat16, torch.float16) or g.dtype == torch.float64:
        return f"the Triton kernels compute in 16 bits, got {g.dtype} and a result in {dtype}"
    if not coefficients:
        return "without a step there is nothing for the Triton kernels to do"
    if g.requires_grad and torch.is_grad_enabled():
        return "the Triton kernels have no backward, and g requires a gradient"
    return None


def _flat(coefficients: reference.Coefficients) -> list[float]:
    """As the schema of a registered op can hold them."""
    return [value for triple in coefficients for value in triple]


def _triples(flat: list[float]) -> reference.Coefficients:
    return tuple(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))


def _triton(
    g: Tensor, coefficients: reference.Coefficients, row_normalize: bool, eps: float, dtype: torch.dtype
) -> Tensor:
    return torch.ops.pgolf.newton_schulz_triton(g, _flat(coefficients), row_normalize, eps, dtype)


LIBRARY.define(
    "newton_schulz_triton(Tensor g, float[] coefficients, bool row_normalize, float eps, ScalarType dtype) -> Tensor"
)


def _launch(g: Tensor, coefficients: list[float], row_normalize: bool, eps: float, dtype: torch.dtype) -> Tensor:
    from . import triton_kernel  # Triton may be missing, and takes a second to import

    return triton_kernel.forward(g, _triples(coefficients), row_normalize, eps, dtype)


for _device in ("CUDA", *("CPU",) * TRITON_INTERPRETED):
    LIBRARY.impl("newton_schulz_triton", _launch, _device)


LIBRARY.define(
    "newton_schulz_cpu(Tensor g, float[] coefficients, bool row_normalize, float eps, ScalarType dtype) -> Tensor"
)


def _cpu(
    g: Tensor, coefficients: reference.Coefficients, row_normalize: bool, eps: float, dtype: torch.dtype
) -> Tensor:
    return torch.ops.pgolf.newton_schulz_cpu(g, _flat(coefficients), row_normalize, eps, dtype)


@torch.library.impl(LIBRARY, "newton_schulz_cpu", "CPU")
def _(g: Tensor, coefficients: list[float], row_normalize: bool, eps: float, dtype: torch.dtype) -> Tensor:
    return cpu.forward(g, _triples(coefficients), row_normalize, eps, dtype)


@torch.library.register_fake("pgolf::newton_schulz_cpu", lib=LIBRARY)
@torch.library.register_fake("pgolf::newton_schulz_triton", lib=LIBRARY)
def _(g: Tensor, coefficients: list[float], row_normalize: bool, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(g.shape, dtype=dtype, device=g.device)


IMPLS = (  # fastest first
    Impl("triton", _triton, _why_not_triton),
    Impl("cpu", _cpu, cpu.why_not),
    Impl("reference", reference.forward, always),
)


def schedule(
    coefficients: str | Sequence[float] | Sequence[Sequence[float]], steps: int
) -> tuple[tuple[float, float, float], ...]:
    """The (a, b, c) of each of `steps` steps: the list's first ones, its last one repeated when the list is shorter."""
    if isinstance(coefficients, str):
        require(
            coefficients in NAMED, "newton_schulz", f"coefficients must be one of {list(NAMED)}", repr(coefficients)
        )
        triples = NAMED[coefficients]
    elif len(coefficients) == 3 and all(isinstance(value, int | float) for value in coefficients):
        triples = (tuple(coefficients),)  # one triple for every step, torch.optim.Muon's way
    else:
        triples = tuple(tuple(triple) for triple in coefficients)
    valid = len(triples) > 0 and all(len(triple) == 3 for triple in triples)
    require(valid, "newton_schulz", "coefficients must be a name or a list of triples (a, b, c)", coefficients)
    require(steps >= 0, "newton_schulz", "steps must be >= 0", steps)
    return tuple(triples[min(step, len(triples) - 1)] for step in range(steps))


def newton_schulz(
    g: Tensor,
    steps: int = 5,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "quintic",
    row_normalize: bool = False,
    eps: float = 1e-7,
    *,
    dtype: torch.dtype | None = None,
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
    require(g.dim() >= 2, "newton_schulz", "g must be a matrix or a batch of matrices", f"shape {tuple(g.shape)}")
    require(g.dtype in DTYPES, "newton_schulz", "g must be floating point", g.dtype)
    dtype = dtype or g.dtype
    require(dtype in DTYPES, "newton_schulz", "dtype must be floating point", dtype)
    args = (g, schedule(coefficients, steps), row_normalize, eps, dtype)
    return choose("newton_schulz", IMPLS, impl, *args).run(*args)
