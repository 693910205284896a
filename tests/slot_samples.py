"""SLOT problems with something to learn, and the definition written out, for the tests of every implementation."""

import torch
import torch.nn.functional as F

from pgolf_kernels.ops.slot.reference import RMS_EPS

B, T, D, V = 5, 61, 37, 77


def make(norm="after", dtype=torch.float64, device="cpu", batch=B):
    """A problem with something to learn: targets that the hidden states half predict. Weights of 0 and in (0, 1)."""
    weight = torch.randn(V, D) * 0.4
    targets = torch.randint(V, (batch, T))
    hidden = torch.randn(batch, T, D) + weight[targets]
    hidden = F.rms_norm(hidden, (D,)) * (7 if norm == "before" else 1)
    mask = torch.rand(batch, T) * (torch.rand(batch, T) < 0.7)
    mask[0] = 0
    mask[0, 17] = 0.3  # one row
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), mask.to(device)


def naive_nll(hidden, weight, targets, delta, bias, softcap, norm):
    """The definition, [B, T]; delta [B or 1, D] and bias [B or 1, V] may be None."""
    h = hidden if delta is None else hidden + delta[:, None]
    h = h if norm == "after" else h * (h.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()
    z = h @ weight.T if bias is None else h @ weight.T + bias[:, None]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def naive_parameters(parameters, groups, like):
    delta, bias = (torch.zeros(groups, n, dtype=like.dtype, requires_grad=True) for n in (D, V))
    return [p for p, name in ((delta, "delta"), (bias, "bias")) if parameters in (name, "both")], (
        delta if parameters != "bias" else None,
        bias if parameters != "delta" else None,
    )
