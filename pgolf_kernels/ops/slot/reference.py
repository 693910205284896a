"""SLOT in closed form: fit a hidden shift delta [D] and a logit bias beta [V] to frozen hidden states without autograd.

The frozen head allows one matrix product for the whole fit. Per row t of weight m_t:

    norm="after"    L = H W^T          z_t = L_t + W delta + beta
    norm="before"   L = H W^T          s_t = r_t (L_t + W delta),  r_t = (mean((h_t + delta)^2) + eps)^(-1/2)
                                       z_t = s_t + beta
    u_t = tanh(z_t / c)                p_t = softmax(c u_t)                loss = sum_t m_t (lse(c u_t) - c u_t[y_t])
    g_t = dloss/dz_t = m_t (p_t - onehot(y_t)) (1 - u_t^2)                 dloss/dbeta = sum_t g_t
    "after"     dloss/ddelta = W^T sum_t g_t
    "before"    dloss/ddelta = W^T sum_t r_t g_t - sum_t q_t (h_t + delta),  q_t = r_t^2 / D (g_t . s_t)

A step is one element-wise sweep over [rows, V] and two V x D matrix-vector products. The m_t include the division by
the total weight of the window or the batch; rows of weight 0 are left out. Without a softcap (None), c u = z and the
factor 1 - u^2 is 1.

Windows are processed one by one, in tensors of their own: a product or reduction may round differently when the batch
grows, or when a row starts at another alignment (hence the clones), and a window's result must not. Only the base
logits are computed in the dtype of `hidden`; everything after them is float32 (float64 for float64).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import optimizers
from .problem import Fit, Score, accumulate_dtype

RMS_EPS = torch.finfo(torch.float32).eps  # what F.rms_norm adds in float32, whatever the dtype of the input here


class Rows(NamedTuple):
    """The frozen part of one window: the rows that take part."""

    logits: Tensor  # [n, V] H W^T
    hidden: Tensor | None  # [n, D], only where it is needed again: norm="before"
    targets: Tensor  # [n]
    weights: Tensor | None  # [n], fitting only


def freeze(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, norm: str, weights: Tensor | None) -> Rows:
    """Compute the base logits of the rows where `rows` [T] is true. hidden [T, D], weight [V, D], targets [T]."""
    hidden = hidden[rows]  # [n, D]
    dtype = accumulate_dtype(hidden)
    return Rows(
        (hidden @ weight.T).to(dtype),
        hidden.to(dtype) if norm == "before" else None,
        targets[rows],
        None if weights is None else weights[rows],
    )


def shifted_logits(rows: Rows, weight: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """s [n, V], the logits before bias and softcap, and r [n, 1] (None for norm="after")."""
    s = rows.logits if delta is None else rows.logits + weight @ delta
    if rows.hidden is None:
        return s, None
    shifted = rows.hidden if delta is None else rows.hidden + delta
    r = (shifted.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()
    return r * s, r


def cap(s: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = s if bias is None else s + bias
    return z if softcap is None else softcap * (z / softcap).tanh()


def loss_and_gradient(rows: Rows, weight: Tensor, delta: Tensor | None, bias: Tensor | None, softcap: float | None):
    """Loss [], dloss/ddelta [D] and dloss/dbeta [V] of one window (None for a parameter that is None)."""
    s, r = shifted_logits(rows, weight, delta)
    capped, target = cap(s, bias, softcap), rows.targets[:, None]
    loss = rows.weights.dot(capped.logsumexp(-1) - capped.gather(1, target)[:, 0])
    g = capped.softmax(-1).scatter_add_(1, target, -torch.ones_like(target, dtype=s.dtype)) * rows.weights[:, None]
    if softcap is not None:
        g = g * (1 - (capped / softcap).square())  # [n, V]
    d_bias = None if bias is None else g.sum(0)
    if delta is None:
        return loss, None, d_bias
    if r is None:
        return loss, weight.T @ g.sum(0), d_bias
    q = r[:, 0].square() / len(delta) * (g * s).sum(-1)  # [n]
    return loss, weight.T @ (r * g).sum(0) - q @ (rows.hidden + delta), d_bias


def score_rows(rows: Rows, weight: Tensor, delta: Tensor | None, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Negative log-likelihood of each row's target [n]."""
    s, _ = shifted_logits(rows, weight, delta)
    return F.cross_entropy(cap(s, bias, softcap), rows.targets, reduction="none")


class Objective:
    """Loss and gradient of some windows in flat parameters; the base logits are made once, on construction."""

    def __init__(self, p: Fit, windows: list[int]) -> None:
        self.p, self.weight = p, p.weight.to(p.weights.dtype)
        self.windows = [
            freeze(p.hidden[i], p.weight, p.targets[i], p.weights[i] > 0, p.norm, p.weights[i]) for i in windows
        ]

    def _one(self, rows: Rows, x: Tensor) -> tuple[Tensor, Tensor]:
        loss, *gradients = loss_and_gradient(rows, self.weight, *self.p.split(x), self.p.softcap)
        return loss, torch.cat([d for d in gradients if d is not None])

    def shared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One x [P] for all the windows: the sums over the windows, in their order."""
        losses, gradients = zip(*(self._one(rows, x) for rows in self.windows), strict=True)
        return sum(losses[1:], losses[0]), sum(gradients[1:], gradients[0])

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each window's own parameters side by side, x [windows * P]."""
        parts = zip(self.windows, x.view(len(self.windows), -1), strict=True)
        losses, gradients = zip(*(self._one(rows, own) for rows, own in parts), strict=True)
        return sum(losses[1:], losses[0]), torch.cat(gradients)


def minimize(p: Fit, x: Tensor, evaluate: optimizers.Closure) -> tuple[Tensor, Tensor]:
    """Run p.optimizer from x; return the parameters and the losses [steps]."""
    if isinstance(p.optimizer, optimizers.AdamW):
        x, losses = optimizers.adamw(p.optimizer, x, p.steps, evaluate)
        return x, torch.stack(losses) if losses else x.new_zeros(0)
    x, losses = optimizers.drive(optimizers.trials(p.optimizer, x, p.steps), evaluate)
    return x, x.new_tensor(losses)


def fit(p: Fit) -> tuple[Tensor, Tensor]:
    """Return the parameters [G, P] and the losses [steps, G]; a group without rows keeps its start and loses 0."""
    x = p.start
    losses = x.new_zeros(p.steps, len(x))
    if isinstance(p.optimizer, optimizers.Steered) and p.optimizer.joint:
        losses = losses.new_zeros(p.steps, 1)
        if windows := [i for i, n in enumerate(p.num_rows) if n]:
            found, losses[:, 0] = minimize(p, x[windows].flatten(), Objective(p, windows).joint)
            x[windows] = found.view(len(windows), -1)
        return x, losses
    for g, group in enumerate(p.groups()):
        if windows := [i for i in group if p.num_rows[i]]:
            x[g], losses[:, g] = minimize(p, x[g].clone(), Objective(p, windows).shared)
    return x, losses


def score(p: Score) -> Tensor:
    """Return the negative log-likelihoods [number of rows], window by window."""
    weight = p.weight.to(accumulate_dtype(p.hidden))
    own = [(None if v is None else v.expand(len(p.hidden), -1)) for v in (p.delta, p.bias)]
    parts = []
    for i in range(len(p.hidden)):
        delta, bias = (None if v is None else v[i].clone() for v in own)
        rows = freeze(p.hidden[i], p.weight, p.targets[i], p.rows[i], p.norm, None)
        parts.append(score_rows(rows, weight, delta, bias, p.softcap))
    return torch.cat(parts) if parts else weight.new_zeros(0)
