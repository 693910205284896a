"""Newton-Schulz orthogonalisation: push the singular values of G towards 1 with odd polynomials, products only.

    X_0 = G / (|G|_F + eps)                        all singular values in [0, 1]
    A = X X^T;  X <- a X + (b A + c A^2) X         each singular value s becomes a s + b s^3 + c s^5

With rows <= columns (transpose otherwise) A is the smaller Gram matrix. The "quintic" coefficients maximise the slope
at zero, so five steps end between about 0.7 and 1.2, not at 1; "polar_express" changes them per step and ends tighter.
Row normalisation (MuonEq-R) first divides each row of G, one output neuron, by max(its norm, eps).
Sources: https://kellerjordan.github.io/posts/muon, arXiv:2505.16932 (Polar Express), arXiv:2603.28254 (MuonEq).

Norms are taken in float32 (float64 for float64), before the one rounding to `dtype`: the norm of a float16 gradient can
overflow, and the published loops lose a rounding by casting first. Products run in `dtype`, under autocast too.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

QUINTIC = ((3.4445, -4.7750, 2.0315),)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

Coefficients = tuple[tuple[float, float, float], ...]


def normalize(g: Tensor, row_normalize: bool, eps: float) -> Tensor:
    """X_0 in float32 (float64 for float64), never a view of g."""
    x = g.to(torch.promote_types(g.dtype, torch.float32))
    if row_normalize:
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(eps)
    return x / (x.norm(dim=(-2, -1), keepdim=True) + eps)


def forward(g: Tensor, coefficients: Coefficients, row_normalize: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """g (..., m, n) -> (..., m, n) in `dtype`, contiguous; one step per entry of `coefficients`."""
    *batch, m, n = g.shape
    x = normalize(g, row_normalize, eps).to(dtype).reshape(math.prod(batch), m, n)
    if m > n:
        x = x.mT
    device = g.device.type
    with torch.autocast(device, enabled=False) if device in ("cpu", "cuda") else nullcontext():
        for a, b, c in coefficients:
            gram = x @ x.mT  # (batch, min(m, n), min(m, n))
            update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, update, x, beta=a)
    return (x.mT if m > n else x).reshape(g.shape).contiguous()
