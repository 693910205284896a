"""SLOT on a batch of windows, 8 AdamW steps on the context and the scores of the last 64 tokens.

Peers: the published systems' loop (the head's two products in every step, through autograd), eager and with a compiled
loss, and our closed form in PyTorch. The limit counts what nobody can avoid: one product with the head.
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.bench import Case
from pgolf_kernels.ops.slot import AdamW, op, reference, slot_fit, slot_score

STEPS, SCORED, SOFTCAP = 8, 64, 30.0
ADAMW = AdamW(lr=0.01)


def _nll(hidden, weight, targets, x, form):
    """[B, rows] as the published systems compute it: the shifted states through the head in their own dtype."""
    shifted = hidden if form == "bias" else hidden + x.to(hidden.dtype)
    if form == "before":
        shifted = F.rms_norm(shifted, shifted.shape[-1:], eps=reference.RMS_EPS)
    logits = (shifted @ weight.T).to(x.dtype)
    logits = logits + x if form == "bias" else logits
    capped = SOFTCAP * torch.tanh(logits / SOFTCAP)
    return F.cross_entropy(capped.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _published(loss, form, hidden, weight, targets, mask):
    """delta [B, D] or bias [B, V], and the scores [B * SCORED], after STEPS of torch.optim.AdamW through autograd."""
    size = len(weight) if form == "bias" else hidden.shape[2]
    x = torch.zeros(len(hidden), 1, size, device=hidden.device, requires_grad=True)
    adamw = torch.optim.AdamW([x], lr=ADAMW.lr, betas=ADAMW.betas, eps=ADAMW.eps, weight_decay=ADAMW.weight_decay)
    for _ in range(STEPS):
        adamw.zero_grad(set_to_none=True)
        loss(hidden[:, :-SCORED], weight, targets[:, :-SCORED], x, form).mean(1).sum().backward()
        adamw.step()
    with torch.no_grad():
        nll = _nll(hidden[:, -SCORED:], weight, targets[:, -SCORED:], x, form)
    return x.detach()[:, 0], nll.flatten()


def _ours(impl, form, hidden, weight, targets, mask):
    norm, parameters = ("after", "bias") if form == "bias" else (form, "delta")
    fit = slot_fit(
        hidden, weight, targets, mask, norm=norm, parameters=parameters, optimizer=ADAMW, steps=STEPS, impl=impl
    )
    nll = slot_score(hidden, weight, targets, fit, norm=norm, rows=~mask, impl=impl)
    return fit.bias if form == "bias" else fit.delta, nll


def _inputs(B, T, D, V, dtype, device, form):
    """Hidden states that half predict a Zipf-like stream of targets, with something left for delta to learn.

    Drawn on the CPU: after a graph capture that failed, as the public op's does, the GPU's generator refuses to work.
    """
    weight = 0.15 * torch.randn(V, D)
    frequency = 1 / (torch.arange(V) + 5.0)
    targets = torch.multinomial(frequency, B * T, replacement=True).view(B, T)
    hidden = F.rms_norm(torch.randn(B, T, D) + 0.8 * weight[targets], (D,))
    hidden = 7 * hidden if form == "before" else hidden
    mask = (torch.arange(T) < T - SCORED).expand(B, T)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), mask.to(device)


def _shapes(device, quick):
    """(B, T, D, V, dtype, form). Form: delta "after" or "before" the final norm, or a "bias"."""
    if quick:
        return [(2, 192, 64, 320, torch.bfloat16, "after"), (2, 192, 64, 320, torch.bfloat16, "bias")]
    if device == "cuda":
        cases = [(512, 1024, "bias"), (2048, 1024, "bias"), (2048, 1024, "after"), (2048, 4096, "before")]
        return [(32, T, 512, V, torch.bfloat16, form) for T, V, form in cases]
    cases = [(V, torch.bfloat16, form) for V in (1024, 4096) for form in ("after", "bias")]
    cases += [(1024, torch.bfloat16, "before"), (1024, torch.float32, "after")]
    return [(4, 2048, 512, *case) for case in cases]


def cases(device, quick):
    """A bias, and both places where delta can join, at the published vocabularies."""
    for B, T, D, V, dtype, form in _shapes(device, quick):
        hidden, weight = torch.empty(0, dtype=dtype, device=device), torch.empty(V, 0)
        example = SimpleNamespace(hidden=hidden, weight=weight, optimizer=ADAMW)
        able = [i.name for i in op.FIT_IMPLS if i.why_not(example) is None]
        ours = {name: partial(_ours, name, form) for name in able[:-1] or able}
        peers = {"torch eager": partial(_published, _nll, form)}
        if not quick:
            peers["torch.compile"] = partial(_published, torch.compile(_nll, dynamic=False), form)
        if "reference" not in ours:
            peers["closed form in torch"] = partial(_ours, "reference", form)
        yield Case(
            shape=f"{form} {B}x{T}x{D}x{V}",
            dtype=dtype,
            inputs=partial(_inputs, B, T, D, V, dtype, device, form),
            ours=ours,
            peers=peers,
            exact=lambda h, w, y, m, form=form: _ours("reference", form, h.double(), w.double(), y, m),
            flops=2 * B * T * D * V,
            bytes=(B * T * D + V * D) * dtype.itemsize,
            buffers=1,  # larger than any cache, once its base logits count
        )
