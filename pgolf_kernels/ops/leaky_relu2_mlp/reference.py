"""The LeakyReLU^2 MLP: y = leaky(x w_up^T)^2 w_down^T, where leaky(p) = p for p > 0 and s p otherwise.

With p = x w_up^T and a = leaky(p)^2 the gradients are
    da/dp = 2 p (p > 0), 2 s^2 p (p <= 0)          da/dp = 2 sqrt(a) (p > 0), -2 |s| sqrt(a) (p <= 0)
    dp = (dy w_down) * da/dp      dx = dp w_up      dw_up = dp^T x      dw_down = dy^T a
so `a` and the sign of `p` are all that backward needs; ReLU^2 kernels that keep sqrt(a) alone lose the sign.
Source: So et al., "Primer", https://arxiv.org/abs/2109.08668 (squared ReLU); the leaky form is the small-GPT variant.

Plain formulas in the dtype of the input: float64 in is the exact answer, bfloat16 in the accuracy a kernel must match.
"""

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, w_up: Tensor, w_down: Tensor, negative_slope: float) -> Tensor:
    p = F.linear(x, w_up)  # [..., H]
    return F.linear(F.leaky_relu(p, negative_slope).square(), w_down)
