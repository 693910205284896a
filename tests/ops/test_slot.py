"""SLOT against autograd, torch.optim and the published systems' own numbers; every implementation that can run here.

Shapes: V = 77 and D = 37 are no multiple of any vector length; T = 61 leaves a tail in every block of rows; windows
with one row and with none stand beside full ones. The golden arrays come from the published code, on V = 128, D = 32.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import DEVICES
from slot_samples import B, D, T, V, make, naive_nll, naive_parameters

from pgolf_kernels.dispatch import TRITON_INTERPRETED
from pgolf_kernels.ops.slot import LBFGS, AdamW, HypergradientAdamW, SlotFit, op, slot_fit, slot_score
from pgolf_kernels.ops.slot.reference import freeze, loss_and_gradient

HOME = {"triton": "cuda"}  # under the interpreter it has small tests of its own, at the end
NATIVE = [(i.name, device) for i in op.FIT_IMPLS[:-1] for device in DEVICES if device == HOME.get(i.name, i.name)]
WHERE = NATIVE + [("reference", device) for device in DEVICES]


def or_skip(call, *args, **kwargs):
    """call(...), or skip with the sentence that says why the implementation asked for cannot run."""
    try:
        return call(*args, **kwargs)
    except ValueError as refusal:
        if "cannot run here" not in str(refusal):
            raise
        pytest.skip(str(refusal))


def fit_slot(*args, **kwargs):
    return or_skip(slot_fit, *args, **kwargs)


def score_slot(*args, **kwargs):
    return or_skip(slot_score, *args, **kwargs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [30.0, 4.0, None])
@pytest.mark.parametrize("norm", ["after", "before"])
def test_closed_form_gradient_is_autograds(norm, softcap, device):
    hidden, weight, targets, mask = make(norm, device=device)
    delta = torch.randn(D, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(V, dtype=torch.float64, device=device, requires_grad=True)
    exact = (naive_nll(hidden[1:2], weight, targets[1:2], delta[None], bias[None], softcap, norm) * mask[1]).sum()
    want = torch.autograd.grad(exact, (delta, bias))
    with torch.no_grad():
        rows = freeze(hidden[1], weight, targets[1], mask[1] > 0, norm, mask[1].double())
        loss, *got = loss_and_gradient(rows, weight, delta, bias, softcap)
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-13, atol=0)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("share, normalize", [("window", "window"), ("window", "batch"), ("batch", "batch")])
@pytest.mark.parametrize("parameters", ["delta", "bias", "both"])
@pytest.mark.parametrize("norm", ["after", "before"])
def test_adamw_is_torchs(norm, parameters, share, normalize):
    hidden, weight, targets, mask = make(norm)
    config = AdamW(lr=0.03, betas=(0.3, 0.9), eps=1e-4, weight_decay=0.01, lr_min=0.001)
    fit = slot_fit(hidden, weight, targets, mask, norm=norm, parameters=parameters, share=share, normalize=normalize,
                   optimizer=config, steps=6, impl="reference")  # fmt: skip

    leaves, (delta, bias) = naive_parameters(parameters, B if share == "window" else 1, hidden)
    adamw = torch.optim.AdamW(leaves, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.01)
    total = mask.sum(1) if normalize == "window" else mask.sum()
    for k in range(6):
        losses = (naive_nll(hidden, weight, targets, delta, bias, 30.0, norm) * mask).sum(1) / total
        for group in adamw.param_groups:
            group["lr"] = 0.001 + 0.5 * 0.029 * (1 + np.cos(np.pi * k / 6))
        adamw.zero_grad()
        losses.sum().backward()
        adamw.step()
        want = losses if share == "window" else losses.sum()[None]
        torch.testing.assert_close(fit.loss_per_step[k], want.detach(), rtol=1e-6, atol=1e-7)
    for got, want in ((fit.delta, delta), (fit.bias, bias)):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-7)


# torch gained the cap on a line search's evaluations in 2.10.
LINE_SEARCH = None if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10) else 25


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("norm", ["after", "before"])
def test_lbfgs_is_torchs(norm, joint):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # a line search branches on rounding: one problem for all runs, one that does not
        hidden, weight, targets, mask = make(norm)
    config = LBFGS(lr=0.3, max_iter=4, history=3, joint=joint, max_line_search=LINE_SEARCH)
    fit = slot_fit(hidden, weight, targets, mask, norm=norm, parameters="both", share="window" if joint else "batch",
                   normalize="batch", optimizer=config, steps=3, impl="reference")  # fmt: skip

    leaves, (delta, bias) = naive_parameters("both", B if joint else 1, hidden)
    lbfgs = torch.optim.LBFGS(leaves, lr=0.3, max_iter=4, history_size=3, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = (naive_nll(hidden, weight, targets, delta, bias, 30.0, norm) * mask).sum() / mask.sum()
        loss.backward()
        return loss

    want = torch.stack([lbfgs.step(closure).detach() for _ in range(3)])
    torch.testing.assert_close(fit.loss_per_step[:, 0], want, rtol=1e-6, atol=0)
    torch.testing.assert_close(fit.delta, delta.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fit.bias, bias.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("rate, bounds", [(0.5, (0.0, 10.0)), (0.5, (0.0, 0.0301)), (-0.5, (0.0299, 1.0))], ids=str)
def test_hypergradient_adamw_is_torchs_with_that_rate(rate, bounds, joint):
    """One window at a time, or all with one learning rate: what the products of torch's own gradients make of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # the bounds below are reached on this problem
        hidden, weight, targets, mask = make()
    mask = mask.double()  # its float32 sum is off by 1e-8, which five steps of a growing rate magnify
    low, high = bounds
    config = HypergradientAdamW(lr=0.03, rate=rate, lr_min=low, lr_max=high, weight_decay=0.01, joint=joint)
    fit = slot_fit(hidden, weight, targets, mask, parameters="both", normalize="batch", optimizer=config, steps=5,
                   impl="reference")  # fmt: skip
    rates = []
    for windows in [range(B)] if joint else [[i] for i in range(B)]:
        h, y, m = (t[list(windows)] for t in (hidden, targets, mask))
        leaves, (delta, bias) = naive_parameters("both", len(windows), hidden)
        adamw = torch.optim.AdamW(leaves, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.01)
        previous = None
        for _ in range(5):
            adamw.zero_grad()
            ((naive_nll(h, weight, y, delta, bias, 30.0, "after") * m).sum() / mask.sum()).backward()
            gradients = torch.cat([p.grad.flatten() for p in leaves])
            if previous is not None:
                lr = adamw.param_groups[0]["lr"] + rate * float(gradients @ previous)
                adamw.param_groups[0]["lr"] = min(max(lr, low), high)
            rates.append(adamw.param_groups[0]["lr"])
            previous = gradients
            adamw.step()
        for got, want in ((fit.delta, delta), (fit.bias, bias)):
            torch.testing.assert_close(got[list(windows)], want.detach(), rtol=1e-6, atol=1e-9)
    assert high in rates or low in rates or (high == 10.0 and len(set(rates)) == 1 + len(rates) * 4 // 5)
    assert fit.loss_per_step.shape == (5, 1 if joint else B)


GOLDEN = np.load(Path(__file__).parent.parent / "golden/slot.npz")
PUBLISHED = {  # share, normalize="batch" always; the rest as the system of that pull request ran it
    "a": ("batch", AdamW(lr=0.003), {}),  # 1128
    "b": ("batch", AdamW(lr=0.005), {}),  # 1217
    "c1": ("window", AdamW(lr=0.005), {}),  # 1217 with a delta per window
    "c2": ("window", AdamW(lr=0.005), {}),  # and a strictly causal mask
    "d": ("batch", AdamW(lr=0.008, betas=(0.3, 0.9)), {"norm": "before"}),  # 1333
    "e": ("window", AdamW(lr=0.012, lr_min=0.001), {"parameters": "both"}),  # 1313
    "f": ("window", LBFGS(lr=0.1, max_iter=5, history=10, joint=True), {"parameters": "both"}),  # 675
    "g": ("batch", LBFGS(lr=1.0, max_iter=25, history=20), {"parameters": "bias"}),  # 1350
}


def golden_mask(variant, window_start, window_len, scored_start, tokens, stride):
    """Which positions each published system fits; [B, T]."""
    t = torch.arange(tokens, device=window_start.device)[None]
    context = t < scored_start.where(window_start > 0, 0)[:, None]
    scored = (t >= scored_start[:, None]) & (t < window_len[:, None])
    by_position = {"a": tokens - 1, "b": tokens - stride - 1, "c1": tokens - stride - 1}
    if variant in by_position:
        return (t < by_position[variant]).expand(len(window_start), -1)
    return scored if variant in "ef" else context


@pytest.mark.parametrize("impl, device", WHERE)
@pytest.mark.parametrize("case", sorted({name.split("/")[0] for name in GOLDEN.files if "/" in name}))
def test_published_numbers(case, impl, device):
    variant, softcap, stride = case[:-1], 15.0, 20
    share, optimizer, options = PUBLISHED[variant]
    dtype = torch.float64 if variant in "fg" else torch.float32  # line searches branch on rounding

    def golden(name):
        return torch.from_numpy(GOLDEN[f"{case}/{name}"]).to(device)

    def inputs(name):
        return torch.from_numpy(GOLDEN[str(GOLDEN[f"{case}/{name}"])]).to(device)

    hidden, weight, targets = inputs("H").to(dtype), inputs("W").to(dtype), inputs("y").long()
    if variant == "g":  # its bias joins after the softcap: the same as an uncapped head on the capped logits
        hidden = softcap * torch.tanh(hidden @ weight.T / softcap)
        weight, softcap = torch.eye(len(weight), dtype=dtype, device=device), None
    spans = [inputs(name) for name in ("window_start", "window_len", "scored_start")]
    mask = golden_mask(variant, *spans, targets.shape[1], stride)
    steps = {"f": 8, "g": 1}.get(variant) or len(golden("lr"))
    fit = fit_slot(hidden, weight, targets, mask, softcap=softcap, share=share, normalize="batch", optimizer=optimizer,
                   steps=steps, impl=impl, **options)  # fmt: skip

    tolerance = max(1e-6, 100 * float(golden("sensitivity"))) if variant in "fg" else 1e-5
    close = {"rtol": 0, "atol": tolerance}
    for name in ("delta", "bias"):
        if f"{case}/{name}" in GOLDEN.files:
            torch.testing.assert_close(getattr(fit, name), golden(name), **close)
    torch.testing.assert_close(fit.loss_per_step.sum(1), golden("losses").to(dtype), **close)
    if variant == "g":
        fit = fit._replace(bias=fit.bias.clamp(-5, 5))
    rows = torch.arange(targets.shape[1], device=device)[None] < spans[1][:, None]
    nll = score_slot(hidden, weight, targets, fit, softcap=softcap, norm=options.get("norm", "after"), rows=rows,
                     impl=impl)  # fmt: skip
    torch.testing.assert_close(nll, golden("nll")[rows], **close)


# AdamW divides by |g| + eps: with the usual eps of 1e-5, coordinates whose g is all rounding step by chance. (Steps at
# the usual eps are compared with the published numbers.)
SMOOTH_ADAMW = AdamW(lr=0.1, eps=0.01)


@pytest.mark.parametrize("softcap", [30.0, 8.0, 80.0, None])  # usual, saturating, beyond what needs no row maximum
@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl, device", NATIVE)
def test_as_accurate_as_the_reference(impl, device, dtype, norm, softcap):
    """At most twice the reference's root mean square error over 30 windows; the errors of one window are correlated."""
    options = {"softcap": softcap, "norm": norm}
    squares = {"parameters": [], "losses": [], "nll": []}  # ours, the reference's
    largest_logit = 0.0
    for parameters in 2 * ("delta", "bias", "both"):
        hidden, weight, targets, mask = make(norm, dtype, device)
        mask[0] = mask[1]
        rows = torch.rand(B, T, device=device) < 0.5

        def run(hidden, weight, impl, parameters=parameters, targets=targets, mask=mask, rows=rows):
            fit = fit_slot(hidden, weight, targets, mask, **options, parameters=parameters, optimizer=SMOOTH_ADAMW,
                           steps=8, impl=impl)  # fmt: skip
            nll = score_slot(hidden, weight, targets, fit, **options, rows=rows, impl=impl)
            return {"parameters": torch.cat([x for x in fit[:2] if x is not None], 1), "losses": fit[2], "nll": nll}

        exact = run(hidden.double(), weight.double(), "reference")
        largest_logit = max(largest_logit, float((hidden.double() @ weight.double().T).abs().max()))
        for found in (run(hidden, weight, impl), run(hidden, weight, "reference")):
            for name, value in found.items():
                assert value.dtype == torch.float32 and value.shape == exact[name].shape
                squares[name].append((value.double() - exact[name]).square().mean())
    for name, errors in squares.items():
        ours, baseline = torch.tensor(errors).view(-1, 2).mean(0).sqrt().tolist()
        scale = 1.0 if name == "parameters" else largest_logit
        assert ours <= 2 * baseline + 1.2e-7 * scale, f"{name}: {ours:.2e} against {baseline:.2e}"


@pytest.mark.parametrize(
    "optimizer", [AdamW(lr=0.02), LBFGS(max_iter=3), HypergradientAdamW(rate=0.1)], ids=["adamw", "lbfgs", "hyper"]
)
@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl, device", WHERE)
def test_a_window_does_not_see_its_batch(impl, device, dtype, norm, optimizer):
    hidden, weight, targets, mask = make(norm, dtype, device, batch=8)
    rows = torch.rand(8, T, device=device) < 0.5

    def run(first, last):
        own = hidden[first:last], weight, targets[first:last]
        fit = fit_slot(*own, mask[first:last], norm=norm, parameters="both", optimizer=optimizer, steps=3, impl=impl)
        nll = score_slot(*own, fit, norm=norm, rows=rows[first:last], impl=impl)
        return [*fit, *nll.split(rows[first:last].sum(1).tolist())]

    whole, again, five, one = run(0, 8), run(0, 8), run(3, 8), run(5, 6)
    for ours, width in ((again, 8), (five, 5), (one, 1)):
        at = 5 if width == 1 else 8 - width
        for name, part in zip(("delta", "bias"), ours[:2], strict=True):
            assert torch.equal(part, whole[("delta", "bias").index(name)][at : at + width]), name
        assert torch.equal(ours[2], whole[2][:, at : at + width])
        for i, scores in enumerate(ours[3:]):
            assert torch.equal(scores, whole[3 + at + i])


@pytest.mark.parametrize(
    "optimizer",
    [AdamW(weight_decay=0.5), LBFGS(max_iter=2), LBFGS(max_iter=2, joint=True), HypergradientAdamW(joint=True)],
    ids=str,
)
@pytest.mark.parametrize("impl, device", WHERE)
def test_a_window_without_rows_keeps_its_start(impl, device, optimizer):
    hidden, weight, targets, mask = make(dtype=torch.float32, device=device)
    mask[2] = 0
    start = SlotFit(torch.randn(B, D, device=device), torch.randn(1, V, device=device), torch.empty(0))
    fit = fit_slot(
        hidden, weight, targets, mask, parameters="both", optimizer=optimizer, steps=2, init=start, impl=impl
    )
    assert torch.equal(fit.delta[2], start.delta[2]) and torch.equal(fit.bias[2], start.bias[0])
    assert not torch.equal(fit.delta[1], start.delta[1])
    if fit.loss_per_step.shape[1] == B:
        assert (fit.loss_per_step[:, 2] == 0).all() and (fit.loss_per_step[:, 1] > 0).all()


@pytest.mark.parametrize("share", ["window", "batch"])
@pytest.mark.parametrize("impl, device", WHERE)
def test_the_first_loss_is_the_score_of_init(impl, device, share):
    hidden, weight, targets, _ = make(dtype=torch.float32, device=device)
    groups = B if share == "window" else 1
    start = SlotFit(torch.randn(groups, D, device=device), torch.randn(groups, V, device=device), torch.empty(0))
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    fit = fit_slot(hidden, weight, targets, mask, share=share, parameters="both", optimizer=AdamW(), steps=1,
                   init=start, impl=impl)  # fmt: skip
    nll = score_slot(hidden, weight, targets, start, rows=mask, impl=impl).view(B, T)
    want = nll.mean(1) if share == "window" else nll.mean(1).sum()[None]
    torch.testing.assert_close(fit.loss_per_step[0], want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl, device", WHERE)
def test_only_rows_with_weight_are_read(impl, device):
    """NaN and impossible targets outside the mask change nothing, and an output is never left unwritten."""
    hidden, weight, targets, mask = make(dtype=torch.float32, device=device)
    spoiled, wild = hidden.clone(), targets.clone()
    spoiled[mask == 0], wild[mask == 0] = torch.nan, -100
    options = {"optimizer": AdamW(), "steps": 2, "impl": impl}
    fit, same = (fit_slot(h, weight, y, mask, **options) for h, y in ((hidden, targets), (spoiled, wild)))
    assert torch.equal(fit.delta, same.delta) and torch.isfinite(fit.delta).all()
    for h, y in ((hidden, targets), (spoiled, wild)):
        nll = score_slot(h, weight, y, fit, rows=mask > 0, impl=impl)
        assert nll.shape == (int((mask > 0).sum()),) and torch.isfinite(nll).all()
    doubled = fit_slot(hidden, weight, targets, 2 * mask, **options)
    torch.testing.assert_close(doubled.delta, fit.delta)  # normalised weights


@pytest.mark.parametrize("impl, device", WHERE)
def test_zero_sizes(impl, device):
    _, weight, _, _ = make(dtype=torch.float32, device=device)
    for batch, tokens in ((0, 4), (2, 0)):
        hidden = torch.empty(batch, tokens, D, device=device)
        targets = torch.empty(batch, tokens, dtype=torch.int64, device=device)
        mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        for share in ("window", "batch"):
            fit = fit_slot(hidden, weight, targets, mask, share=share, optimizer=AdamW(), steps=2, impl=impl)
            groups = 1 if share == "batch" else batch
            assert torch.equal(fit.delta, torch.zeros(groups, D, device=device)) and fit.loss_per_step.shape == (
                2,
                groups,
            )
            assert score_slot(hidden, weight, targets, fit, rows=mask, impl=impl).shape == (0,)


def test_inputs_are_untouched_and_compiled_callers_work():
    inputs = make(dtype=torch.float32)
    copies = [t.clone() for t in inputs]

    def score(hidden, weight, targets, mask):
        fit = slot_fit(hidden * 1, weight, targets, mask, optimizer=AdamW(), steps=2)
        return slot_score(hidden, weight, targets, fit, rows=mask > 0).sum() + 1

    assert torch.equal(torch.compile(score, backend="eager")(*inputs), score(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.ones(2, 3)}, r"hidden must be floating point \[B, T, D\], D > 0, got torch.float32 \(2, 3\)"),
        ({"weight": torch.ones(V, D + 1)}, r"weight must be \[V, D\] with D = 37 .* got \(77, 38\)"),
        ({"weight": torch.ones(V, D).bfloat16()}, r"weight must have hidden's dtype .* got torch.bfloat16; cast"),
        ({"targets": torch.zeros(B, T)}, r"targets must be int64 \(5, 61\), got torch.float32"),
        ({"targets": torch.full((B, T), V)}, r"must be in \[0, 77\), got 77 to 77; leave padding out"),
        ({"fit_mask": -torch.ones(B, T)}, r"fit_mask must be finite and >= 0, got a negative"),
        ({"fit_mask": torch.ones(B, T).long()}, r"fit_mask must be bool or floating point, got torch.int64"),
        ({"fit_mask": torch.ones(B, 1)}, r"row mask must have targets' shape \(5, 61\), got \(5, 1\)"),
        ({"softcap": -1.0}, r"softcap must be a finite number > 0, or None for no cap, got -1"),
        ({"norm": "both"}, r"norm must be one of \('after', 'before'\), got 'both'"),
        ({"share": "all"}, r"share must be one of"),
        ({"normalize": "none"}, r"normalize must be one of"),
        ({"parameters": "gamma"}, r"parameters must be one of"),
        ({"steps": -1}, r"steps must be an int >= 0, got -1"),
        ({"optimizer": torch.optim.AdamW}, r"optimizer must be an AdamW, HypergradientAdamW or LBFGS"),
        ({"optimizer": AdamW(betas=(0.9, 1.0))}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        (
            {"optimizer": LBFGS(joint=True), "share": "batch"},
            r"needs share='window', got 'batch'; share='batch' is one",
        ),
        ({"optimizer": HypergradientAdamW(lr_min=0.1)}, r"0 <= lr_min <= lr_max, got \(0.1, 0.024\)"),
        ({"init": SlotFit(torch.ones(2, D), None, None)}, r"init.delta must be \(1, 37\) or \(5, 37\) on cpu, got \(2"),
        ({"init": SlotFit(None, torch.ones(1, V), None)}, r"init.delta must be .* got None"),
        ({"impl": "gpu"}, r"unknown impl 'gpu'; expected 'auto' or one of \[.*'reference'\]"),
    ],
)
def test_errors_say_what_must_hold_and_what_came(change, message):
    hidden, weight, targets, mask = make(dtype=torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "fit_mask": mask, "optimizer": AdamW()}
    with pytest.raises(ValueError, match=f"slot_fit: .*{message}"):
        slot_fit(**{**arguments, "steps": 1, **change})


def test_errors_of_slot_score():
    hidden, weight, targets, mask = make()
    with pytest.raises(ValueError, match=r"slot_score: rows must be a bool mask \[B, T\], got torch.float32"):
        slot_score(hidden, weight, targets, None, rows=mask)
    fit = SlotFit(torch.ones(2, D), None, torch.empty(0))
    with pytest.raises(ValueError, match=r"slot_score: fit.delta must be \(1, 37\) or \(5, 37\) on cpu, got \(2, 37\)"):
        slot_score(hidden, weight, targets, fit, rows=mask > 0)
    with pytest.raises(ValueError, match=r"impl='cpu' cannot run here: .* got torch.float64 on cpu"):
        slot_score(hidden, weight, targets, None, rows=mask > 0, impl="cpu")


TRITON = ["cuda"] * torch.cuda.is_available() + ["cpu"] * TRITON_INTERPRETED
on_triton = pytest.mark.skipif(not TRITON, reason="Triton needs a GPU or TRITON_INTERPRET=1")


def small(norm, dtype, device, batch=2, size=(35, 12, 24)):
    """35 rows are one segment and a tail; 24 columns leave a block of 32 unfilled."""
    (T, D, V), rows = size, torch.rand(batch, size[0]) < 0.8
    weight, targets = torch.randn(V, D) * 0.8, torch.randint(V, (batch, T))
    hidden = F.rms_norm(torch.randn(batch, T, D) + weight[targets], (D,)) * (7 if norm == "before" else 1)
    mask = torch.rand(batch, T) * rows
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), mask.to(device)


@on_triton
@pytest.mark.parametrize("softcap", [30.0, 4.0, 80.0, None])
@pytest.mark.parametrize("parameters, share", [("delta", "window"), ("bias", "window"), ("both", "batch")])
@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("device", TRITON or ["none"])
def test_triton_is_as_accurate_as_the_reference(device, norm, parameters, share, softcap):
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets, mask = small(norm, dtype, device)
        rows, options = torch.rand(mask.shape, device=device) < 0.3, {"softcap": softcap, "norm": norm}

        def run(hidden, weight, impl, targets=targets, mask=mask, rows=rows, options=options):
            fit = slot_fit(hidden, weight, targets, mask, **options, parameters=parameters, share=share,
                           normalize=share, optimizer=SMOOTH_ADAMW, steps=2, impl=impl)  # fmt: skip
            nll = slot_score(hidden, weight, targets, fit, **options, rows=rows, impl=impl)
            return {"parameters": torch.cat([x for x in fit[:2] if x is not None], 1), "losses": fit[2], "nll": nll}

        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
        ours = run(hidden, weight, "triton")
        torch.use_deterministic_algorithms(before)
        exact, baseline = (run(h, w, "reference") for h, w in ((hidden.double(), weight.double()), (hidden, weight)))
        scale = float((hidden.double() @ weight.double().T).abs().max())
        for name in exact:
            errors = [(v[name].double() - exact[name]).square().mean().sqrt().item() for v in (ours, baseline)]
            floor = 1.2e-7 * (1.0 if name == "parameters" else scale)
            assert errors[0] <= 2 * errors[1] + floor, f"{dtype} {name}: {errors}"


@on_triton
@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("device", TRITON or ["none"])
def test_triton_windows_do_not_see_their_batch(device, norm):
    hidden, weight, targets, mask = small(norm, torch.bfloat16, device, batch=4)
    mask[1] = 0
    mask[2, 20:] = 0
    start = SlotFit(torch.randn(1, 12, device=device), torch.randn(1, 24, device=device), torch.empty(0))
    rows = torch.rand(mask.shape, device=device) < 0.4

    def run(at, told=False):
        own = hidden[at], weight, targets[at]
        counts = [(m[at].sum(1).tolist() if told else None) for m in (mask > 0, rows)]
        fit = slot_fit(*own, mask[at], norm=norm, parameters="both", optimizer=AdamW(lr=0.02), steps=2, init=start,
                       num_rows=counts[0], impl="triton")  # fmt: skip
        nll = slot_score(*own, fit, norm=norm, rows=rows[at], num_rows=counts[1], impl="triton")
        return [*fit[:2], fit[2].T, nll.split(rows[at].sum(1).tolist())]

    whole = run(slice(0, 4))
    for at, told in ((slice(0, 4), True), (slice(2, 4), False)):
        for ours, all_of_them in zip(run(at, told), whole, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, all_of_them[at], strict=True))
    assert torch.equal(whole[0][1], start.delta[0]) and torch.equal(whole[1][1], start.bias[0])


@on_triton
@pytest.mark.parametrize("device", TRITON or ["none"])
def test_triton_makes_the_impossible_nan(device):
    """Where the caller tells how many rows take part, nobody waits to find out that it cannot be."""
    from pgolf_kernels.ops.slot import triton_kernel
    from pgolf_kernels.ops.slot.problem import Fit, Score

    hidden, weight, targets, mask = small("after", torch.float32, device, batch=4)
    mask[:], targets[1, 3], mask[2, 5] = 1, 24, -1
    p = Fit(hidden, weight, targets, mask, told=[35, 35, 35, 34], initial=None, softcap=30.0, norm="after",
            shared=False, normalize="window", parameters="delta", optimizer=AdamW(), steps=1)  # fmt: skip
    x, losses = triton_kernel.fit(p)
    assert x.isnan().all(1).tolist() == losses.isnan()[0].tolist() == [False, True, True, True]
    assert not x[0].isnan().any()
    rows = mask > 0
    p = Score(hidden, weight, targets, rows, told=[35, 35, 35, 34], delta=None, bias=None, softcap=30.0, norm="after")
    nll = triton_kernel.score(p).split(p.told)
    assert [int(part.isnan().sum()) for part in nll] == [0, 35, 1, 34]


@pytest.mark.parametrize("impl, device", WHERE)
def test_told_rows_are_checked_where_that_costs_nothing(impl, device):
    hidden, weight, targets, mask = make(dtype=torch.float32, device=device)
    counts = (mask > 0).sum(1).tolist()
    options = {"optimizer": AdamW(), "steps": 2, "impl": impl}
    asked, told = (fit_slot(hidden, weight, targets, mask, num_rows=n, **options) for n in (None, counts))
    assert torch.equal(asked.delta, told.delta)
    nll = [score_slot(hidden, weight, targets, told, rows=mask > 0, num_rows=n, impl=impl) for n in (None, counts)]
    assert torch.equal(*nll)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"slot_fit: num_rows\[1\] must be \d+ or more, got 1"):
            slot_fit(hidden, weight, targets, mask, num_rows=[1] * B, **options)
        with pytest.raises(ValueError, match=r"slot_score: num_rows\[0\] must be 1, got 61"):
            slot_score(hidden, weight, targets, told, rows=mask > 0, num_rows=[T] * B, impl=impl)
    with pytest.raises(ValueError, match=r"num_rows must be None or 5 ints in \[0, 61\], got \[62"):
        slot_fit(hidden, weight, targets, mask, num_rows=[62] * B, **options)
