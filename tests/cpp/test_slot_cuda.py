"""The CUDA SLOT kernels: on a GPU, and everywhere their source built for the CPU (csrc/common/cuda_emulation.h).

Sizes (T, D, V): 150 rows are two whole segments and a tail; V = 96 has whole vectors of columns, 77 not even those;
2056 and 4104 need teams of four and eight warps, 8192 fills a block; D = 33 is odd, 600 more than one tile of delta.
Windows of up to 256 rows have segments of 16 rows, longer ones of 64; 24 blocks are resident at once in the emulation.
"""

import os
import re
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from cuda_cpu import ROOT, VARIANT, emulated_module
from memory import address_sanitizer
from numerics import assert_as_accurate

from pgolf_kernels import extension
from pgolf_kernels.ops.slot import LBFGS, AdamW, SlotFit, cuda_kernel, reference, slot_fit
from pgolf_kernels.ops.slot.problem import Fit, Score, check_fit, check_score

GPU = torch.cuda.is_available()


@pytest.fixture(params=["cpu", *["cuda"] * GPU])
def device(request, monkeypatch):
    """Where the kernels run; on "cpu" the emulation takes the place of the extension."""
    if request.param == "cpu":
        monkeypatch.setattr(extension, "cuda", emulated_module())
    elif extension.WHY_NOT_CUDA:
        pytest.skip(extension.WHY_NOT_CUDA)
    # Where the form allows it; launches per step have the other forms, and test_one_launch_is_many.
    monkeypatch.setattr(cuda_kernel, "ONE_LAUNCH", True)
    return request.param


def make(size, norm, dtype, device, batch=2):
    T, D, V = size
    weight = torch.randn(V, D) * 2.5 / D**0.5
    targets = torch.randint(V, (batch, T))
    targets[:, ::7] = 3  # a target that many rows of a segment share
    hidden = F.rms_norm(torch.randn(batch, T, D) + weight[targets], (D,)) * (7 if norm == "before" else 1)
    weights = torch.rand(batch, T) * (torch.rand(batch, T) < 0.8)
    return [hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), weights.to(device)]


def double(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def poisoned(call, *args):
    """call(*args) with every fresh tensor full of NaN, or of the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call(*args)
    finally:
        torch.use_deterministic_algorithms(before)


def problems(inputs, rows, fit, norm, softcap, parameters, share="window", steps=5, told=None):
    """Parameters and losses of a fit, and the checked arguments of its score.

    eps = 0.01: with a small one AdamW moves a coordinate whose gradient is all rounding by a full step, by chance.
    """
    p = check_fit(*inputs, softcap, norm, share, "window", parameters, AdamW(lr=0.02, eps=0.01), steps, None,
                  told)  # fmt: skip
    x, losses = fit(p)
    scored = rows.sum(1).tolist() if told else None
    return x, losses, check_score(*inputs[:3], SlotFit(*p.split(x), losses), softcap, norm, rows, scored)


SIZES = [(150, 33, 96), (150, 600, 77), (9, 16, 2056), (9, 16, 4104), (9, 16, 8192)]


@pytest.mark.parametrize("softcap", [30.0, 8.0, 80.0, None])
@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_accurate_as_the_reference(device, size, dtype, norm, softcap):
    if size != SIZES[0] and softcap in (8.0, 80.0):
        pytest.skip("the form of the softcap is independent of the sizes")
    errors, loss_errors = [], []  # ours, the reference's
    forms = [("delta", "window"), ("bias", "window"), ("both", "window"), ("both", "batch")]
    if device == "cpu" and size[2] > 100:  # a second and a half for each product with so large a weight
        forms = [("bias", "window"), ("bias", "batch")]
    elif device == "cpu" and size != SIZES[0]:
        forms = forms[2:]
    for parameters, share in forms:
        inputs = make(size, norm, dtype, device, batch=2 if size[0] > 100 else 5)  # few losses are exact by luck
        rows = torch.rand(inputs[2].shape, device=device) < 0.5
        options = rows, norm, softcap, parameters, share, 3 if device == "cpu" else 5

        def run(inputs, impl, options=options):
            x, losses, scored = problems(inputs, options[0], impl.fit, *options[1:])
            return x, losses, impl.score(scored)

        x, losses, nll = poisoned(run, inputs, cuda_kernel)
        x_pt, losses_pt, nll_pt = run(inputs, reference)
        x_64, losses_64, nll_64 = run(double(inputs), reference)
        scale = float((inputs[0].double() @ inputs[1].double().T).abs().max())
        assert_as_accurate(nll, nll_pt, nll_64, scale=scale)
        assert torch.isfinite(x).all()
        for found, ours, baseline, exact in ((errors, x, x_pt, x_64), (loss_errors, losses, losses_pt, losses_64)):
            found.append([(v.double() - exact).square().mean() for v in (ours, baseline)])
    # In the mean, not the maximum: AdamW divides by |g|, and a coordinate whose g is all rounding is a coin toss.
    for found, floor in ((errors, 0), (loss_errors, 1.2e-7 * scale)):
        ours, baseline = torch.tensor(found).mean(0).sqrt().tolist()
        assert ours <= 2 * baseline + floor, f"{ours:.2e} against {baseline:.2e}"


@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("size", [(150, 64, 96), (70, 33, 77)], ids=str)
def test_a_window_does_not_see_its_batch(device, size, norm):
    inputs = make(size, norm, torch.bfloat16, device, batch=8)
    inputs[3][1] = 0  # no rows
    rows = torch.rand(inputs[2].shape, device=device) < 0.4

    def run(first, last):
        own = [inputs[0][first:last], inputs[1], *(t[first:last] for t in inputs[2:])]
        x, losses, scored = problems(own, rows[first:last], cuda_kernel.fit, norm, 30.0, "both")
        return x, losses.T, cuda_kernel.score(scored).split(scored.num_rows)

    whole = run(0, 8)
    for first, last in ((0, 8), (3, 8), (0, 5), (5, 6), (1, 2)):
        for ours, all_of_them in zip(run(first, last), whole, strict=True):
            for part, want in zip(ours, all_of_them[first:last], strict=True):
                assert torch.equal(part, want)


@pytest.mark.parametrize("parameters", ["delta", "bias", "both"])
@pytest.mark.parametrize("tokens", [40, 300])
def test_one_launch_is_many(device, tokens, parameters):
    """All steps in one launch, of more windows than are resident at once, against several launches per step."""
    inputs = make((tokens, 40, 96), "after", torch.bfloat16, device, batch=9 if tokens == 40 else 6)
    inputs[3][3] = 0  # no rows
    inputs[3][4, 8:] = 0  # a window that one block works on alone
    p = check_fit(*inputs, 30.0, "after", "window", "batch", parameters, AdamW(lr=0.02, eps=0.01), 3, None)
    (one, losses), (many, want) = (poisoned(cuda_kernel.fit, p, one_launch) for one_launch in (True, False))
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-6)
    assert not one[3].any() and not losses[:, 3].any()


def test_more_steps_than_one_launch_lists(device):
    inputs = make((33, 8, 24), "after", torch.float32, device, batch=1)
    p = check_fit(*inputs, 30.0, "after", "window", "window", "bias", AdamW(lr=0.01, eps=0.01), 130, None)
    (one, losses), (many, want) = (poisoned(cuda_kernel.fit, p, one_launch) for one_launch in (True, False))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["after", "before"])
def test_told_rows_change_nothing(device, norm):
    """The same bits with the exact number of rows; with room for more the same values; and no read from the device."""
    inputs = make((150, 64, 96), norm, torch.float32, device, batch=3)
    inputs[3][1] = 0
    rows = torch.rand(inputs[2].shape, device=device) < 0.3
    exact = (inputs[3] > 0).sum(1).tolist()
    options = cuda_kernel.fit, norm, 30.0, "both"
    asked, told, roomy = (problems(inputs, rows, *options, told=n) for n in (None, exact, [150, 150, 150]))
    for ours, want in zip(told[:2], asked[:2], strict=True):
        assert torch.equal(ours, want)
    assert torch.equal(cuda_kernel.score(told[2]), cuda_kernel.score(asked[2]))
    for ours, want in zip(roomy[:2], asked[:2], strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [AdamW(), LBFGS(max_iter=2)], ids=["adamw", "lbfgs"])
@pytest.mark.parametrize("norm", ["after", "before"])
def test_the_impossible_is_nan(device, norm, optimizer):
    """What would be an error if the host waited: a wild target, a negative weight, more rows than told."""
    inputs = make((40, 16, 24), norm, torch.float32, device, batch=5)
    inputs[3][:] = 1
    inputs[2][1, 5], inputs[3][2, 7] = 24, -1.0
    told = [40, 40, 40, 39, 40]
    p = check_fit(*(t.clone() for t in inputs[:3]), torch.ones_like(inputs[3]), 30.0, norm, "window", "window", "both",
                  optimizer, 2, None, [40] * 5) if device != "cpu" else None  # fmt: skip
    assert p is None or not cuda_kernel.fit(p)[0][0].isnan().any()
    p = unchecked_fit(inputs, norm, optimizer, told)
    x, losses = poisoned(cuda_kernel.fit, p)
    wrong = torch.tensor([False, True, True, True, False], device=x.device)
    assert torch.equal(x.isnan().all(1), wrong) and torch.equal(x.isnan().any(1), wrong)
    assert torch.equal(losses.isnan().any(0), wrong)
    with pytest.raises(ValueError, match="fit_mask must be finite"):
        cuda_kernel.fit(unchecked_fit(inputs, norm, optimizer, None))

    rows = inputs[3] > 0
    rows[4, 3] = False
    scored = unchecked_score(inputs, norm, rows, told)
    nll = poisoned(cuda_kernel.score, scored).split(told)
    assert [int(part.isnan().sum()) for part in nll] == [0, 40, 1, 39, 1]
    with pytest.raises(ValueError, match=r"targets of the used rows must be in \[0, 24\), got 0 to 24"):
        inputs[2][0, 0] = 0
        cuda_kernel.score(unchecked_score(inputs, norm, rows, None))


def unchecked_fit(inputs, norm, optimizer, told):
    """A Fit as a GPU's caller gets it, whose values nobody has looked at."""
    return Fit(
        *inputs, told=told, initial=None, softcap=30.0, norm=norm, shared=False, normalize="window",
        parameters="both", optimizer=optimizer, steps=2,
    )  # fmt: skip


def unchecked_score(inputs, norm, rows, told):
    return Score(*inputs[:3], rows, told=told, delta=None, bias=None, softcap=30.0, norm=norm)


@pytest.mark.parametrize("form", ["window", "batch", "joint"])
@pytest.mark.parametrize("parameters", ["delta", "bias", "both"])
@pytest.mark.parametrize("norm", ["after", "before"])
def test_lbfgs_is_the_references(device, norm, parameters, form):
    """A line search branches on rounding: first steps large enough that float32 takes float64's branches."""
    torch.manual_seed(3)
    inputs = make((33, 13, 40), norm, torch.float32, device, batch=3)
    inputs[3][1] = 0
    optimizer = LBFGS(lr=20.0, max_iter=4, history=3, joint=form == "joint")
    share = "batch" if form == "batch" else "window"

    def run(inputs, fit):
        return fit(check_fit(*inputs, 30.0, norm, share, "batch", parameters, optimizer, 2, None))

    x, losses = poisoned(run, inputs, cuda_kernel.fit)
    want, want_losses = run(double(inputs), reference.fit)
    torch.testing.assert_close(losses.double(), want_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.double(), want, rtol=0, atol=2e-5)
    assert (want_losses[-1] < want_losses[0] - 0.01)[want_losses[0] > 0].all()


def test_joint_lbfgs_on_several_blocks(device):
    """20 windows' parameters are more than one block's share."""
    torch.manual_seed(3)
    inputs = make((9, 33, 96), "after", torch.float32, device, batch=20)
    optimizer = LBFGS(lr=20.0, max_iter=4, history=3, joint=True)

    def run(inputs, fit):
        return fit(check_fit(*inputs, 30.0, "after", "window", "batch", "both", optimizer, 2, None))

    (x, losses), (want, want_losses) = poisoned(run, inputs, cuda_kernel.fit), run(double(inputs), reference.fit)
    torch.testing.assert_close(losses.double(), want_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "optimizer, steps",
    [
        (LBFGS(lr=20.0, max_iter=12, history=20), 1),
        (LBFGS(lr=300.0, max_iter=4, max_eval=9, max_line_search=25), 2),  # steps too long: it has to zoom
        (LBFGS(lr=300.0, max_iter=4, history=1), 2),  # and is out of budget in the middle of it
        (LBFGS(lr=5.0, max_iter=5, history=2), 2),  # too short: it has to stretch the bracket
        (LBFGS(lr=20.0, max_iter=1, max_eval=1), 3),
        (LBFGS(lr=20.0, max_iter=20, tolerance_grad=1e-3), 3),  # ends early, and has nothing left to do
    ],
    ids=["plain", "zoom", "budget", "stretch", "one", "early"],
)
def test_line_search_takes_the_references_branches(device, optimizer, steps):
    torch.manual_seed(1)
    inputs = make((33, 13, 40), "after", torch.float32, device, batch=2)

    def run(inputs, fit):
        return fit(check_fit(*inputs, 30.0, "after", "window", "window", "both", optimizer, steps, None))

    (x, losses), (want, want_losses) = poisoned(run, inputs, cuda_kernel.fit), run(double(inputs), reference.fit)
    torch.testing.assert_close(losses.double(), want_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.double(), want, rtol=0, atol=1e-4 * float(want.abs().max()))  # of the largest


def test_more_windows_than_one_launch_lists(device):
    inputs = make((5, 16, 24), "after", torch.float32, device, batch=600)
    rows = torch.rand(inputs[2].shape, device=device) < 0.3
    x, _, scored = problems(inputs, rows, cuda_kernel.fit, "after", 30.0, "bias", steps=1)
    want, _, _ = problems(inputs, rows, reference.fit, "after", 30.0, "bias", steps=1)
    torch.testing.assert_close(x, want, rtol=0, atol=1e-4)
    torch.testing.assert_close(cuda_kernel.score(scored), reference.score(scored), rtol=1e-5, atol=1e-5)


def test_nothing_to_do(device):
    for batch, size in ((0, (4, 8, 16)), (2, (0, 8, 16)), (2, (4, 8, 16))):
        inputs = make(size, "after", torch.float32, device, batch)
        inputs[3].zero_()
        rows = inputs[3] > 0
        for share in ("window", "batch"):
            x, losses, scored = problems(inputs, rows, cuda_kernel.fit, "after", 30.0, "both", share)
            groups = 1 if share == "batch" else batch
            assert x.shape == (groups, 8 + 16) and losses.shape == (5, groups)
            assert not x.any() and not losses.any()
            assert cuda_kernel.score(scored).shape == (0,)


@pytest.mark.skipif(VARIANT == "sanitized", reason="already under the sanitizer")
def test_under_address_sanitizer():
    """Both optimisers, launches per step and all in one, scores: once more, on a module built with the sanitizer."""
    if not address_sanitizer():
        pytest.skip("g++ has no AddressSanitizer here")
    chosen = "(one_launch_is_many and 40 and both) or (the_impossible and before)"
    environment = os.environ | address_sanitizer() | {"PGOLF_EMULATION": "sanitized", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", __file__, "-k", chosen]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-8000:]
    assert re.search(r"\b[1-9]\d* passed", run.stdout), run.stdout


def test_refusals(monkeypatch):
    def why(hidden, V=16):
        weight = torch.empty(V, hidden.shape[2], dtype=hidden.dtype)
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
        targets = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        p = check_fit(hidden, weight, targets, mask, 30.0, "after", "window", "window", "bias", AdamW(), 1, None)
        return cuda_kernel.why_not_fit(p)

    assert "need float32 or bfloat16 CUDA tensors, got torch.float32 on cpu" in why(torch.ones(1, 2, 3))
    fits_here = types.SimpleNamespace(SLOT_MAX_VOCAB=8192, SLOT_MAX_HISTORY=128, why_not=lambda device: "")
    monkeypatch.setattr(extension, "cuda", fits_here)
    monkeypatch.setattr(extension, "WHY_NOT_CUDA", None)
    p = types.SimpleNamespace(
        hidden=types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, shape=(1, 2, 3)),
        weight=torch.empty(8192, 0), optimizer=LBFGS(history=129),
    )  # fmt: skip
    assert "keep at most 128 curvature pairs, got history=129" in cuda_kernel.why_not_fit(p)
    p.weight = torch.empty(8193, 0)
    assert "need a vocabulary of at most 8192, got 8193" in cuda_kernel.why_not_fit(p)


@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("one_launch", [False, True])
@pytest.mark.parametrize("size", [(448, 512, 1024), (2048, 512, 8192)], ids=str)
def test_real_sizes_on_a_gpu(size, one_launch, monkeypatch):
    """What the emulation cannot see: the library's product, whose bits must not depend on where a window lies in it."""
    monkeypatch.setattr(cuda_kernel, "ONE_LAUNCH", one_launch)
    inputs = make(size, "after", torch.bfloat16, "cuda", batch=8)
    options = {"parameters": "both", "optimizer": AdamW(lr=0.02), "steps": 4, "impl": "cuda"}
    whole = slot_fit(*inputs, **options)
    for i in range(8):
        own = [inputs[0][i : i + 1], inputs[1], *(t[i : i + 1] for t in inputs[2:])]
        for ours, all_of_them in zip(slot_fit(*own, **options)[:2], whole[:2], strict=True):
            assert torch.equal(ours[0], all_of_them[i])
    if size[2] > 1024:
        return
    baseline, exact = (slot_fit(*i, **(options | {"impl": "reference"})) for i in (inputs, double(inputs)))
    for ours, theirs, truth in zip(whole[:2], baseline[:2], exact[:2], strict=True):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm()
    # Roundings of bfloat16 cancel in a mean over rows, what tanh_approx is off (2^-11 of a logit) does not.
    largest_logit = float((inputs[0].double() @ inputs[1].double().T).abs().max())
    off, allowed = ((fit.loss_per_step - exact.loss_per_step).abs().max() for fit in (whole, baseline))
    assert off <= 2 * allowed + 2**-11 * largest_logit


@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("one_launch", [False, True])
@pytest.mark.parametrize("optimizer", [AdamW(lr=0.02), LBFGS(max_iter=2)], ids=["adamw", "lbfgs"])
@pytest.mark.parametrize("parameters", ["bias", "both"])
@pytest.mark.parametrize("norm", ["after", "before"])
def test_in_a_cuda_graph_on_a_side_stream(norm, parameters, optimizer, one_launch, monkeypatch):
    monkeypatch.setattr(cuda_kernel, "ONE_LAUNCH", one_launch)
    inputs = make((150, 64, 96), norm, torch.bfloat16, "cuda")
    rows = inputs[3] > 0
    told = rows.sum(1).tolist()  # without it the device is asked, which no graph can hold
    p = check_fit(*inputs, 30.0, norm, "window", "window", parameters, optimizer, 3, None, told)

    def run():
        x, losses = cuda_kernel.fit(p)
        fit = SlotFit(*p.split(x), losses)
        return x, cuda_kernel.score(check_later(fit))

    def check_later(fit):
        scored.__dict__.update(delta=fit.delta, bias=fit.bias)
        return scored

    scored = check_score(*inputs[:3], None, 30.0, norm, rows, told)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        x, nll = run()
    inputs[0].copy_(inputs[0].flip(0))  # the graph must read the new values
    inputs[2].copy_(inputs[2].roll(1, 1))
    graph.replay()
    want, want_nll = run()
    assert torch.equal(x, want) and torch.equal(nll, want_nll)
