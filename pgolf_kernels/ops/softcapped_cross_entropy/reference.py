"""The loss of a soft-capped head: nll_t = lse(z_t) - z_t[y_t], z = c tanh(u / c), u = hidden weight^T.

The product runs in the dtype of its inputs, everything after it in float32 (float64 for float64). Gradient per row:
    du = w_t (softmax(z_t) - onehot(y_t)) * (1 - tanh^2(u_t / c)),   w_t = 1 / num_targets for "mean", else 1
    dhidden = du weight          dweight = du^T hidden
|z| <= c, so exp(z - c) neither overflows nor needs a running maximum: loss and gradient are one sweep over a row.
Source: softcap from Gemma 2, https://arxiv.org/abs/2408.00118, section 2.

A target outside [0, V) that is not ignore_index makes the loss NaN: on a GPU that is the only report without a sync.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int, reduction: str
) -> Tensor:
    u = F.linear(hidden.reshape(targets.numel(), weight.shape[1]), weight)  # [T, V]
    if u.dtype != torch.float64:
        u = u.float()
    z = softcap * (u / softcap).tanh()
    y = targets.flatten()
    wrong = ((y < 0) | (y >= weight.shape[0])) & (y != ignore_index)
    loss = F.cross_entropy(z, y.masked_fill(wrong, ignore_index), ignore_index=ignore_index, reduction=reduction)
    poison = torch.zeros_like(y, dtype=z.dtype).masked_fill(wrong, math.nan)
    return (loss + poison).view(targets.shape) if reduction == "none" else loss + poison.sum()
