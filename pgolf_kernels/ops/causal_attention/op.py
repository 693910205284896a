"""causal_attention: argument checks and choice of implementation. The maths is in reference.py.

The reference is PyTorch's scaled_dot_product_attention: a flash kernel on GPUs, and on the CPU too (float32, bfloat16,
float64; with enable_gqa as fast as with repeated heads), so it is no slow fallback.
"""

from torch import Tensor

from ...dispatch import Impl, always, choose, require
from . import reference

IMPLS = (Impl("reference", reference.forward, always),)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    require(
        q.dim() == k.dim() == v.dim() == 4, "causal_attention", "q, k and v must be (batch, tokens, heads, d)", shapes
    )
    require(k.shape == v.shape, "causal_attention", "k and v must have one shape", shapes)
    same = q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    require(same, "causal_attention", "q and k must agree in batch, tokens and head dimension", shapes)
    grouped = k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0
    require(grouped, "causal_attention", "the heads of q must be a multiple of the heads of k and v", shapes)
    dtypes = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
    require(q.dtype == k.dtype == v.dtype, "causal_attention", "q, k and v must have one dtype", dtypes)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, exclude_self: bool = False, impl: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d), positions <= t) v per head; query head h reads key/value head h // (H / Hkv).

    Args:
        q: (B, T, H, d), floating point.
        k, v: (B, T, Hkv, d), same dtype; Hkv divides H.
        exclude_self: remove from each output its component along the position's own value vector (XSA).
        impl: "auto", or the name of an implementation (tests and benchmarks use this).

    Returns:
        (B, T, H, d) in the dtype of q. Differentiable in q, k and v.

    Raises:
        ValueError: shapes or dtypes do not fit together, or `impl` cannot run these arguments.

    Source: arXiv:2305.13245 (GQA), arXiv:2603.09078 (XSA).
    """
    _check(q, k, v)
    return choose("causal_attention", IMPLS, impl, q, k, v, exclude_self).run(q, k, v, exclude_self)
