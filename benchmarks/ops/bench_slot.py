"""SLOT on a batch of windows: fits on the context with AdamW, or as #675 did, and the scores of the last tokens.

Peers: the published systems' loop (the head's products over all rows in every step, through autograd), eager and with a
compiled loss, and our closed form in PyTorch. The limit counts what nobody can avoid: one product with the head.
On a GPU the caller tells how many rows take part, as an evaluator can, and "cuda one launch" runs all steps of
a window in one launch; `pgolf_kernels.ops.slot.cuda_kernel` counts the launches of both.
"""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.bench import Case
from pgolf_kernels.ops.slot import LBFGS, AdamW, cuda_kernel, op, reference, slot_fit, slot_score
from pgolf_kernels.ops.slot.problem import SlotFit, check_fit

SOFTCAP = 30.0
ONE_LAUNCH = "cuda one launch"


@dataclass(frozen=True)
class Form:
    """What is fitted, and to which rows: all before the last `scored`, or, as some systems did, to these themselves."""

    name: str
    norm: str = "after"
    parameters: str = "delta"
    optimizer: AdamW | LBFGS = AdamW(lr=0.01)
    steps: int = 8
    scored: int = 64
    leaks: bool = False

    @property
    def normalize(self) -> str:
        return "batch" if isinstance(self.optimizer, LBFGS) else "window"


FORMS = {
    form.name: form
    for form in (
        Form("bias", parameters="bias"),
        Form("after"),
        Form("before", norm="before"),
        # Few rows and many steps, #1313's proportions.
        Form("both, 96 rows", parameters="both", optimizer=AdamW(lr=0.012, lr_min=0.001), steps=24, scored=96,
             leaks=True),
        # #675: one problem over the batch.
        Form("L-BFGS", parameters="both", optimizer=LBFGS(lr=0.1, max_iter=5, history=10, joint=True), scored=96,
             leaks=True),
    )
}  # fmt: skip


def _nll(hidden, weight, targets, delta, bias, before):
    """[B, rows] as the published systems compute it: the shifted states through the head in their own dtype."""
    shifted = hidden if delta is None else hidden + delta.to(hidden.dtype)
    if before:
        shifted = F.rms_norm(shifted, shifted.shape[-1:], eps=reference.RMS_EPS)
    logits = (shifted @ weight.T).to(torch.float32)
    logits = logits if bias is None else logits + bias
    capped = SOFTCAP * torch.tanh(logits / SOFTCAP)
    return F.cross_entropy(capped.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _published(nll, form, hidden, weight, targets, mask):
    """What _ours returns, by torch.optim through autograd."""
    (B, T, D), V, o = hidden.shape, len(weight), form.optimizer
    delta, bias = (torch.zeros(B, 1, n, device=hidden.device, requires_grad=True) for n in (D, V))
    delta, bias = delta if form.parameters != "bias" else None, bias if form.parameters != "delta" else None
    x, scored = [p for p in (delta, bias) if p is not None], slice(T - form.scored, T)
    fitted = slice(0, T) if form.leaks else slice(0, T - form.scored)  # who leaks computes every row, and masks
    own = hidden[:, fitted], weight, targets[:, fitted], delta, bias, form.norm == "before"

    def loss():
        losses = nll(*own)
        losses = (losses * mask).sum(1) / form.scored if form.leaks else losses.mean(1)
        return losses.mean() if form.normalize == "batch" else losses.sum()

    def closure():
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value

    if isinstance(o, LBFGS):
        optimizer = torch.optim.LBFGS(
            x, lr=o.lr, max_iter=o.max_iter, history_size=o.history, line_search_fn="strong_wolfe"
        )
        for _ in range(form.steps):
            optimizer.step(closure)
    else:
        optimizer = torch.optim.AdamW(x, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        for lr in o.learning_rates(form.steps):
            optimizer.param_groups[0]["lr"] = lr
            closure()
            optimizer.step()
    with torch.no_grad():
        scores = _nll(hidden[:, scored], weight, targets[:, scored], delta, bias, form.norm == "before").flatten()
    return _results(form, [p.detach()[:, 0] for p in x], scores)


def _results(form, parameters, nll):
    """The fitted parameters and the scores; of L-BFGS the scores alone, since its line search branches on rounding."""
    return nll if isinstance(form.optimizer, LBFGS) else (*parameters, nll)


def _ours(impl, form, hidden, weight, targets, mask):
    (B, T, _), scored = hidden.shape, form.scored
    told = None if hidden.device.type == "cpu" else [scored if form.leaks else T - scored] * B
    options = {"norm": form.norm, "normalize": form.normalize, "parameters": form.parameters}
    options |= {"optimizer": form.optimizer, "steps": form.steps, "num_rows": told}
    if impl == ONE_LAUNCH:
        with torch.no_grad():
            p = check_fit(hidden, weight, targets, mask, SOFTCAP, share="window", init=None, **options)
            x, losses = cuda_kernel.fit(p, one_launch=True)
            fit = SlotFit(*p.split(x), losses)
    else:
        fit = slot_fit(hidden, weight, targets, mask, softcap=SOFTCAP, impl=impl, **options)
    rows, told = mask if form.leaks else ~mask, None if told is None else [scored] * B
    scorer = "cuda" if impl == ONE_LAUNCH else impl
    nll = slot_score(
        hidden, weight, targets, fit, softcap=SOFTCAP, norm=form.norm, rows=rows, num_rows=told, impl=scorer
    )
    return _results(form, [v for v in fit[:2] if v is not None], nll)


def _inputs(B, T, D, V, dtype, device, form):
    """Hidden states that half predict a Zipf-like stream of targets, with something left for delta to learn.

    Drawn on the CPU: after a graph capture that failed, as a published loop's does, the GPU's generator fails.
    """
    weight = 0.15 * torch.randn(V, D)
    frequency = 1 / (torch.arange(V) + 5.0)
    targets = torch.multinomial(frequency, B * T, replacement=True).view(B, T)
    hidden = F.rms_norm(torch.randn(B, T, D) + 0.8 * weight[targets], (D,))
    hidden = 7 * hidden if form.norm == "before" else hidden
    context = torch.arange(T) < T - form.scored
    mask = (~context if form.leaks else context).expand(B, T).contiguous()
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), mask.to(device)


def _shapes(device, quick):
    """(B, T, D, V, dtype, form)."""
    bf16 = torch.bfloat16
    if quick:
        return [(2, 192, 64, 320, bf16, name) for name in ("after", "bias")]
    if device == "cuda":
        cases = [(512, 1024, "bias"), (2048, 1024, "bias"), (2048, 1024, "after"), (2048, 4096, "bias")]
        cases += [(2048, 4096, "after"), (2048, 4096, "before"), (2048, 1024, "both, 96 rows")]
        cases += [(2048, 1024, "L-BFGS"), (2048, 4096, "L-BFGS")]
        return [(32, T, 512, V, bf16, name) for T, V, name in cases]
    cases = [(V, bf16, name) for V in (1024, 4096) for name in ("after", "bias")]
    cases += [(1024, bf16, "before"), (1024, torch.float32, "after")]
    return [(4, 2048, 512, *case) for case in cases]


def cases(device, quick):
    """A bias, both places where delta can join, few rows, and L-BFGS, at the published vocabularies."""
    for B, T, D, V, dtype, name in _shapes(device, quick):
        form = FORMS[name]
        hidden, weight = torch.empty((), dtype=dtype, device=device).expand(B, T, D), torch.empty(V, 1, device=device)
        example = SimpleNamespace(hidden=hidden, weight=weight, optimizer=form.optimizer, device=hidden.device)
        able = [i.name for i in op.FIT_IMPLS if i.why_not(example) is None]
        able = able[:-1] or able
        if "cuda" in able and form.norm == "after" and isinstance(form.optimizer, AdamW):
            able.append(ONE_LAUNCH)
        peers = {"torch eager": partial(_published, _nll, form)}
        if not quick:
            peers["torch.compile"] = partial(_published, torch.compile(_nll, dynamic=False), form)
        if "reference" not in able:
            peers["closed form in torch"] = partial(_ours, "reference", form)
        yield Case(
            shape=f"{name} {B}x{T}x{D}x{V}",
            dtype=dtype,
            inputs=partial(_inputs, B, T, D, V, dtype, device, form),
            ours={impl: partial(_ours, impl, form) for impl in able},
            peers=peers,
            exact=lambda h, w, y, m, form=form: _ours("reference", form, h.double(), w.double(), y, m),
            flops=2 * B * T * D * V * ((form.scored / T) if form.leaks else 1),
            bytes=(B * T * D * ((form.scored / T) if form.leaks else 1) + V * D) * dtype.itemsize,
            buffers=1,  # larger than any cache, once its base logits count
        )
