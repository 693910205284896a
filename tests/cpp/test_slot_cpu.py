"""The C++ SLOT kernel at every instruction-set level this CPU has: accuracy, memory safety, threads, fork.

Sizes: D = 33 and V = 75 leave a tail for every vector length, and an odd depth for kernels that multiply bfloat16
pairs; 300 rows are more than one block of packed rows and more than one partial sum of the gradient.
"""

import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from memory import Guarded, in_child
from numerics import LEVELS, assert_as_accurate

from pgolf_kernels import extension
from pgolf_kernels.ops.slot import LBFGS, AdamW, SlotFit, cpu, reference, slot_fit, slot_score
from pgolf_kernels.ops.slot.problem import check_fit, check_score

pytestmark = pytest.mark.skipif(extension.cpu is None, reason=str(extension.WHY_NOT_CPU))
B, T, D, V = 2, 300, 33, 75


def make(norm, dtype):
    weight = torch.randn(V, D) * 0.5
    targets = torch.randint(V, (B, T))
    hidden = F.rms_norm(torch.randn(B, T, D) + weight[targets], (D,)) * (7 if norm == "before" else 1)
    return hidden.to(dtype), weight.to(dtype), targets, torch.rand(B, T) + 0.1


def double(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def problem(inputs, norm="after", parameters="both", softcap=30.0, optimizer=None, steps=8, share="window"):
    return check_fit(*inputs, softcap, norm, share, "window", parameters, optimizer or AdamW(), steps, None)


class Evaluator:
    """Loss and gradient of window 0 at x, by the kernel."""

    def __init__(self, p, isa):
        self.inputs, self.weights, self.p = cpu._Inputs(p, isa), p.weights.contiguous(), p
        objective = extension.cpu.SlotObjective(
            weights=self.weights.data_ptr(), delta=p.parameters != "bias", bias=p.parameters != "delta", shared=False
        )
        self.evaluator = extension.cpu.SlotEvaluator(self.inputs.problem, objective)

    def __call__(self, x):
        x, gradient, loss = x.float().contiguous(), torch.full_like(x, torch.nan), torch.empty(1, dtype=torch.float64)
        gradient = gradient.float()
        self.evaluator.evaluate([0], x=x.data_ptr(), losses=loss.data_ptr(), gradients=gradient.data_ptr())
        return loss.float(), gradient


@pytest.mark.parametrize("softcap", [30.0, 5.0, 90.0, None])
@pytest.mark.parametrize("parameters", ["delta", "bias", "both"])
@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_gradient(isa, dtype, norm, parameters, softcap):
    squares = []
    for size in (0.0, 0.1, 0.2, 0.3, 0.4):
        inputs = make(norm, dtype)
        p, exact = (problem(i, norm, parameters, softcap) for i in (inputs, double(inputs)))
        x = size * torch.randn(p.start.shape[1])
        want = reference.Objective(exact, [0]).shared(x.double())
        for found in (Evaluator(p, isa)(x), reference.Objective(p, [0]).shared(x)):
            squares.append([(v.double() - w).square().mean() for v, w in zip(found, want, strict=True)])
    errors = torch.tensor(squares).view(-1, 2, 2).mean(0).sqrt()  # [ours or the reference's, loss or gradient]
    # Sizes of what is added up: logits; (p - onehot) times weights of 1/300, times W or h.
    assert (errors[0] <= 2 * errors[1] + 1.2e-7 * torch.tensor([10, 0.01])).all(), errors


@pytest.mark.parametrize("isa", LEVELS)
def test_far_from_the_base_it_is_rebuilt(isa):
    """All rows share logits far beyond the softcap, and the bias takes them back: tanh(L / c) alone has lost them."""
    hidden, weight, targets, mask = make("after", torch.float32)
    shared = torch.randn(D)
    inputs = (hidden + 30 * shared, weight, targets, mask)
    x = -30 * weight @ shared  # up to about 250
    p, exact = problem(inputs, parameters="bias"), problem(double(inputs), parameters="bias")
    evaluate = Evaluator(p, isa)
    evaluate(torch.zeros(V))  # freezes the base at b = 0
    baseline, want = reference.Objective(p, [0]).shared(x), reference.Objective(exact, [0]).shared(x.double())
    scale = float(x.abs().max())  # a logit is rounded at this size before the bias cancels it
    for ours, b, e, size in zip(evaluate(x), baseline, want, (scale, scale / T), strict=True):
        assert_as_accurate(ours.view(b.shape), b, e, scale=size)


@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_fit_and_score(isa, dtype, norm, monkeypatch):
    fresh = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: fresh(*size, **kw).fill_(torch.nan))  # every output written
    smooth = AdamW(lr=0.1, eps=0.01)  # with a smaller eps the coordinates whose gradient is all rounding step by chance
    squares = []
    for _ in range(6):
        inputs, rows = make(norm, dtype), torch.rand(B, T) < 0.5

        def run(inputs, fit, score, rows=rows):
            p = problem(inputs, norm, optimizer=smooth)
            x, losses = fit(p)
            return x, losses, score(check_score(*inputs[:3], SlotFit(*p.split(x), losses), 30.0, norm, rows))

        exact = run(double(inputs), reference.fit, reference.score)
        ours = run(inputs, lambda p: cpu.fit(p, isa), lambda p: cpu.score(p, isa))
        for found in (ours, run(inputs, reference.fit, reference.score)):
            squares.append([(v.double() - e).square().mean() for v, e in zip(found, exact, strict=True)])
    errors = torch.tensor(squares).view(-1, 2, 3).mean(0).sqrt()  # [ours or the reference's, quantity]
    assert (errors[0] <= 2 * errors[1] + 1.2e-7 * torch.tensor([1, 10, 10])).all(), errors


@pytest.mark.parametrize("softcap", [30.0, 90.0, None])
@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_nan_comes_out_as_nan(isa, dtype, norm, softcap):
    """The clamps of tanh and exp must let it through; the other window does not see it."""
    inputs = make(norm, dtype)
    clean, _ = cpu.fit(problem(inputs, norm, softcap=softcap, steps=2), isa)
    inputs[0][0, 5, 3] = torch.nan
    x, losses = cpu.fit(problem(inputs, norm, softcap=softcap, steps=2), isa)
    assert losses[:, 0].isnan().all() and x[0, D:].isnan().all()
    assert losses[:, 1].isfinite().all() and torch.equal(x[1], clean[1])
    nll = cpu.score(check_score(*inputs[:3], None, softcap, norm, torch.ones(B, T, dtype=torch.bool)), isa)
    assert nll[5].isnan() and nll.isnan().sum() == 1


@pytest.mark.parametrize("share", ["window", "batch"])
@pytest.mark.parametrize("optimizer", [AdamW(), LBFGS(max_iter=3)], ids=["adamw", "lbfgs"])
def test_threads_change_nothing(optimizer, share):
    hidden, weight, targets, mask = make("before", torch.bfloat16)
    hidden, targets, mask = (torch.cat([t, t.flip(1), t]) for t in (hidden, targets, mask))
    rows, before = torch.rand(mask.shape) < 0.3, torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            fit = slot_fit(hidden, weight, targets, mask, norm="before", parameters="both", share=share,
                           optimizer=optimizer, steps=3, impl="cpu")  # fmt: skip
            nll = slot_score(hidden, weight, targets, fit, norm="before", rows=rows, impl="cpu")
            results.append([*fit, nll])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_lbfgs_finds_the_minimum():
    """Logistic regression is convex: whatever the line search did on the way, the lowest loss is the reference's."""
    inputs = make("after", torch.float32)
    options = {"softcap": None, "parameters": "bias", "optimizer": LBFGS(max_iter=40), "steps": 3}
    fit = slot_fit(*inputs, **options, impl="cpu")
    best = slot_fit(*double(inputs), **options, impl="reference")
    start, left = best.loss_per_step[0], fit.loss_per_step[-1].double() - best.loss_per_step[-1]
    assert (left.abs() < 1e-5).all() and (start - best.loss_per_step[-1] > 0.01).all()


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_touches_nothing_beyond_its_arguments(isa, dtype, at_end):
    hidden, weight, targets, mask = make("before", dtype)
    x, losses, nll = torch.zeros(B, D + V), torch.zeros(2, B), torch.zeros(int((mask > 0.5).sum()))

    def run():
        memory = [Guarded(t, at_end) for t in (hidden, weight, targets, mask, mask > 0.5, x, losses, nll)]
        h, w, y, m, rows, out, loss, scores = (g.address for g in memory)
        for before in (True, False):
            bf16 = dtype == torch.bfloat16
            p = extension.cpu.SlotProblem(hidden=h, weight=w, targets=y, sizes=(B, T, D, V), bf16=bf16, softcap=30.0,
                                          before=before, threads=1, isa=isa)  # fmt: skip
            objective = extension.cpu.SlotObjective(weights=m, delta=True, bias=True, shared=False)
            extension.cpu.slot_fit_adamw(p, objective, learning_rates=[0.1, 0.1], beta1=0.9, beta2=0.99, eps=1e-5,
                                         weight_decay=0.0, x=out, losses=loss)  # fmt: skip
            extension.cpu.slot_score(p, rows=rows, delta=out, delta_stride=D, bias=out, bias_stride=V, nll=scores)

    assert in_child(run) == 0


def test_runs_in_a_forked_child():
    """OpenMP's threads do not survive a fork: a region of two would wait for ever in the child."""
    inputs = make("after", torch.float32)
    p, before = problem(inputs), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want, _ = cpu.fit(p)

        def again():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest's handler waits for the kernel
            signal.alarm(30)
            assert torch.equal(cpu.fit(p)[0], want)

        assert in_child(again) == 0
    finally:
        torch.set_num_threads(before)


def test_unknown_levels_are_refused():
    p = problem(make("after", torch.float32))
    with pytest.raises(ValueError, match=r"isa must name an instruction set this CPU can run \(generic.*got 'z80'"):
        cpu.fit(p, isa="z80")


@pytest.mark.parametrize("level", ["generic", "z80"])
def test_environment_lowers_the_level(level):
    """In a process of its own, without torch: the module needs nothing but Python."""
    code = (
        "import importlib.util as u, sys; spec = u.spec_from_file_location('_cpu', sys.argv[1]);"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m); print(m.isa(), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, extension.cpu.__file__], capture_output=True, text=True,
                         env={**os.environ, "PGOLF_ISA": level})  # fmt: skip
    if level == "generic":
        assert run.stdout.split() == ["generic", "False"], run.stderr
    else:
        assert "PGOLF_ISA must name an instruction set this CPU can run" in run.stderr and "got 'z80'" in run.stderr
