"""AdamW: torch.optim.AdamW's numbers and state, by torch's fused step and by the Triton pass; averages; state dicts."""

import copy

import pytest
import torch
from numerics import DEVICES, assert_as_accurate

from pgolf_kernels.dispatch import TRITON_INTERPRETED, why_not_triton
from pgolf_kernels.optim import AdamW

if TRITON_INTERPRETED:
    import triton_cpu  # noqa: F401  (makes the interpreter's bfloat16 right)

SHAPES = [(1024, 32), (7,), (), (3, 1000), (2049,), (0, 4)]  # whole pieces, scalars, tails, one element more, empty
OPTIONS = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.04}
why_not = why_not_triton(torch.zeros(1, device=DEVICES[-1]))
needs_triton = pytest.mark.skipif(why_not is not None, reason=str(why_not))


def params_of(dtype, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def run(optimizer, params, steps=5):
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return params


def check_triton(dtype, device, averages=None):
    ours, baseline = params_of(dtype, device), params_of(dtype, device)
    exact = [torch.nn.Parameter(p.detach().double()) for p in ours]
    optimizers = (
        AdamW(ours, **OPTIONS),
        torch.optim.AdamW(baseline, fused=True, **OPTIONS),
        torch.optim.AdamW(exact, **OPTIONS),
    )
    if averages:
        followed = {p: p.detach().to(averages).clone() for p in ours[:-2]}  # the last two have none
        optimizers[0].average_into(followed, 0.9)
        want = [p.detach().to(averages).clone() for p in baseline], [p.detach().clone() for p in exact]
    assert optimizers[0]._why_not_pass(ours, []) is None
    for step in range(6):
        set_grads(ours, step)
        for p, q, e in zip(ours, baseline, exact, strict=True):
            q.grad, e.grad = p.grad.clone(), p.grad.double()
        for optimizer in optimizers:
            optimizer.step()
        if averages:
            for average, source in zip(want, (baseline, exact), strict=True):
                for a, p in zip(average, source, strict=True):
                    a.lerp_(p.detach().to(a.dtype), 0.1)
    for p, q, e in zip(ours, baseline, exact, strict=True):
        assert_as_accurate(p.detach(), q.detach(), e.detach(), scale=float(e.detach().abs().max() if e.numel() else 1))
        for key in ("exp_avg", "exp_avg_sq"):
            states = [optimizer.state[x][key] for optimizer, x in zip(optimizers, (p, q, e), strict=True)]
            assert_as_accurate(*states, scale=float(states[2].abs().max() if e.numel() else 1))
        assert optimizers[0].state[p]["step"] == 6
    if averages:
        for p, q, e in zip(ours[:-2], *want, strict=False):
            assert_as_accurate(followed[p], q, e, scale=float(e.abs().max()))


@needs_triton
@pytest.mark.parametrize("averages", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_pass_is_as_accurate_as_torch(dtype, averages):
    check_triton(dtype, DEVICES[-1], averages)


@needs_triton
def test_triton_pass_is_one_launch_with_the_averages(monkeypatch):
    from pgolf_kernels.optim import adamw_pass as passes

    launches, kernel = [], passes.adamw_kernel

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(passes, "adamw_kernel", Counting())
    params = params_of(torch.float32, DEVICES[-1])
    optimizer = AdamW(params, **OPTIONS)
    optimizer.average_into({p: p.detach().clone() for p in params}, 0.9)
    run(optimizer, params, steps=3)
    assert len(launches) == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.skipif(TRITON_INTERPRETED, reason="torch's step is what runs without Triton")
def test_without_triton_it_is_torchs_fused_step_bit_for_bit(device, monkeypatch):
    monkeypatch.setattr(AdamW, "_why_not_pass", lambda *_: "not here")
    ours, theirs = params_of(torch.float32, device), params_of(torch.float32, device)
    averages = {p: p.detach().clone() for p in ours}
    optimizer = AdamW(ours, **OPTIONS)
    optimizer.average_into(averages, 0.9)
    other = torch.optim.AdamW(theirs, fused=True, **OPTIONS)
    want = [p.detach().clone() for p in theirs]
    for step in range(5):
        for params, o in ((ours, optimizer), (theirs, other)):
            set_grads(params, step)
            o.step()
        torch._foreach_lerp_(want, [p.detach() for p in theirs], 1 - 0.9)
    for p, q, w in zip(ours, theirs, want, strict=True):
        assert torch.equal(p, q) and torch.equal(averages[p], w)


@pytest.mark.parametrize("device", DEVICES)
def test_state_dicts_go_both_ways(device):
    ours, theirs = params_of(torch.float32, device), params_of(torch.float32, device)
    optimizer, other = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, fused=True, **OPTIONS)
    run(optimizer, ours, 2)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_grads(ours, 7), set_grads(theirs, 7)
    optimizer.step(), other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert optimizer.state[ours[0]]["step"] == 3


@pytest.mark.parametrize("device", DEVICES)
def test_an_average_moves_without_a_gradient_too(device):
    params = params_of(torch.float32, device)
    optimizer = AdamW(params, **OPTIONS)
    averages = {p: torch.zeros_like(p, requires_grad=False) for p in params[:2]}
    optimizer.average_into(averages, 0.75)
    set_grads(params[1:], 0)
    optimizer.step()
    for p, a in averages.items():
        torch.testing.assert_close(a, 0.25 * p.detach())


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_captured_in_a_graph_takes_new_learning_rates(device):
    """Without a GPU the same calls run without a graph: the rate is a tensor all the same."""
    lr = torch.tensor(0.03, device=device)
    ours, theirs = params_of(torch.float32, device), params_of(torch.float32, device)
    optimizer, other = AdamW(ours, **OPTIONS | {"lr": lr}), torch.optim.AdamW(theirs, fused=True, **OPTIONS)
    for params in (ours, theirs):
        set_grads(params, 0)
    optimizer.step(), other.step()
    replay = optimizer.step
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()  # captured, not run
        replay = graph.replay
    for rate in (0.01, 0.1):
        lr.fill_(rate)
        other.param_groups[0]["lr"] = rate
        replay(), other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("averages", "decay", "message"),
    [
        (lambda p: {p: p.detach().double()}, 0.9, "must be alike, or float32, got torch.float64"),
        (lambda p: {p: p.detach()[:1]}, 0.9, r"must be alike, or float32, got torch.float32 \(1, 32\)"),
        (lambda p: {torch.zeros(3): torch.zeros(3)}, 0.9, "must follow parameters of this optimiser"),
        (lambda p: {p: p.detach().clone()}, 1.5, r"decay must be in \[0, 1\], got 1.5"),
    ],
)
def test_averages_that_do_not_fit_are_refused(averages, decay, message):
    params = params_of(torch.float32, "cpu")
    optimizer = AdamW(params)
    with pytest.raises(ValueError, match=message):
        optimizer.average_into(averages(params[0]), decay)


def test_hyper_parameters_out_of_range_are_refused():
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match="Invalid"):
            AdamW(params_of(torch.float32, "cpu"), **wrong)
