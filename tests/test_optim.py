"""Muon: golden steps of the published optimisers, torch.optim.Muon, state dicts, the fused passes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import DEVICES

from pgolf_kernels import newton_schulz_banks
from pgolf_kernels.dispatch import TRITON_INTERPRETED, why_not_triton
from pgolf_kernels.optim import Muon, default_compute_dtype

if TRITON_INTERPRETED:
    import triton_cpu  # noqa: F401  (corrects the interpreter's bfloat16)

GOLDEN = np.load(Path(__file__).parent / "golden" / "muon_steps.npz")
# name: the inputs it was run on, and its settings
RUNS = {
    "pr549_muon": ("3d", {"lr": 0.025, "momentum": 0.95, "weight_decay": 0.04}),
    "pr549_muon_no_nesterov": ("3d", {"lr": 0.02, "momentum": 0.9, "nesterov": False}),
    "pr675_muon": ("2d", {"lr": 0.025, "momentum": 0.95, "weight_decay": 0.04}),
    "pr1217_muoneq_r": ("3d", {"lr": 0.03, "momentum": 0.99, "weight_decay": 0.04, "row_normalize": True}),
    "pr1333_muoneq_r": ("2d", {"lr": 0.02, "momentum": 0.99, "weight_decay": 0.09, "row_normalize": True}),
    "polarns_muoneq_r": (
        "3d",
        {
            "lr": 0.026,
            "momentum": 0.97,
            "weight_decay": 0.095,
            "row_normalize": True,
            "ns_coefficients": "polar_express",
        },
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RUNS)
def test_golden_steps(device, name):
    inputs, settings = RUNS[name]
    keys = [key.split("/")[1] for key in GOLDEN.files if key.startswith(f"{name}/")]
    params = [torch.nn.Parameter(torch.from_numpy(GOLDEN[f"{inputs}/{key}/init"]).to(device)) for key in keys]
    optimizer = Muon(params, compute_dtype=torch.float32, **settings)
    for step in range(5):
        for key, p in zip(keys, params, strict=True):
            p.grad = torch.from_numpy(GOLDEN[f"{inputs}/{key}/grads"][step]).to(device)
        optimizer.step()
        if step in (0, 4):
            for key, p in zip(keys, params, strict=True):
                want = torch.from_numpy(GOLDEN[f"{name}/{key}/after"][step // 4]).to(device)
                torch.testing.assert_close(p.detach(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["pr549_muon", "pr1217_muoneq_r"])
def test_golden_steps_in_bfloat16(name):
    """As the banked systems run: momentum and products in bfloat16, within what their arrays state for it."""
    inputs, settings = RUNS[name]
    params = [torch.nn.Parameter(torch.from_numpy(GOLDEN[f"{inputs}/{key}/init"])) for key in ("p1", "p2")]
    low = {"compute_dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16, "ns_plain": True}
    optimizer = Muon(params, **settings, **low)
    momentum = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    for step in range(5):
        for key, p, buffer in zip(("p1", "p2"), params, momentum, strict=True):
            p.grad = torch.from_numpy(GOLDEN[f"{inputs}/{key}/grads"][step])
            buffer.mul_(settings["momentum"]).add_(p.grad.bfloat16())  # rounded after the product and after the sum
        optimizer.step()
    for key, p, buffer in zip(("p1", "p2"), params, momentum, strict=True):
        want = torch.from_numpy(GOLDEN[f"{name}/{key}/final_bf16"])
        torch.testing.assert_close(p.detach(), want, rtol=0, atol=3.5e-3)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffer)


def random_params(shapes, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_agrees_with_torch_optim_muon(adjust_lr):
    """Torch scales the momentum by 1 - momentum, which the orthogonalisation forgets: the same steps up to bfloat16."""
    shapes = [(64, 32), (48, 96)]
    ours, theirs = random_params(shapes), random_params(shapes)
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    a = Muon(ours, compute_dtype=torch.bfloat16, adjust_lr=adjust_lr, **settings)
    b = torch.optim.Muon(theirs, adjust_lr_fn=adjust_lr, **settings)
    for step in range(3):
        for params, optimizer in ((ours, a), (theirs, b)):
            set_grads(params, step)
            optimizer.step()
    for x, y, start in zip(ours, theirs, random_params(shapes), strict=True):
        moved = (y - start).norm()
        assert (x - y).norm() < 0.05 * moved, "further than bfloat16 rounding of the iteration explains"


@pytest.mark.parametrize("device", DEVICES)
def test_a_bank_is_its_matrices(device):
    bank = random_params([(3, 16, 24)], device)
    loose = [torch.nn.Parameter(m.detach().clone()) for m in bank[0]]
    for params in (bank, loose):
        optimizer = Muon(params, lr=0.1, weight_decay=0.1, compute_dtype=torch.float32)
        for step in range(2):
            grads = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(step)).to(device)
            for p, g in zip(params, [grads] if len(params) == 1 else grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
    torch.testing.assert_close(bank[0].detach(), torch.stack([p.detach() for p in loose]), rtol=0, atol=1e-6)


def test_parameters_without_gradient_stay_and_gradients_survive():
    params = random_params([(8, 8), (8, 8)])
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.randn(8, 8)
    kept = params[0].grad.clone()
    optimizer = Muon(params, lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(params[0].grad, kept)
    assert torch.equal(params[1], before[1]) and not torch.equal(params[0], before[0])
    assert params[1] not in optimizer.state


def test_resuming_from_a_state_dict_is_bitwise_equal():
    shapes = [(2, 8, 16), (16, 8)]
    straight = random_params(shapes, dtype=torch.bfloat16)
    a = Muon(straight, lr=0.1)
    resumed, b = None, None
    for step in range(4):
        if step == 2:
            resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
            b = Muon(resumed, lr=0.3)
            b.load_state_dict(a.state_dict())
        for params, optimizer in ((straight, a), (resumed, b)):
            if optimizer is not None:
                set_grads(params, step)
                optimizer.step()
    for x, y in zip(straight, resumed, strict=True):
        assert torch.equal(x, y)
        assert a.state[x]["momentum_buffer"].dtype == b.state[y]["momentum_buffer"].dtype == torch.float32


def test_compute_dtype_default_follows_the_device():
    p = random_params([(32, 48)])
    results = []
    for compute_dtype in (None, default_compute_dtype(torch.device("cpu"))):
        params = [torch.nn.Parameter(p[0].detach().clone())]
        set_grads(params, 0)
        Muon(params, lr=1.0, compute_dtype=compute_dtype).step()
        results.append(params[0].detach())
    assert torch.equal(*results)


def test_all_groups_share_one_call_of_newton_schulz(monkeypatch):
    from pgolf_kernels.optim import muon

    calls = []

    def counted(banks, *args, **options):
        calls.append([tuple(g.shape) for g in banks])
        return newton_schulz_banks(banks, *args, **options)

    monkeypatch.setattr(muon, "newton_schulz_banks", counted)
    params = random_params([(2, 8, 16), (16, 8), (8, 16), (8, 8)])
    set_grads(params, 0)
    Muon([{"params": params[:3]}, {"params": params[3:], "lr": 0.1}], compute_dtype=torch.float32).step()
    Muon([{"params": params[:2]}, {"params": params[2:], "ns_steps": 3}], compute_dtype=torch.float32).step()
    assert calls == [[(3, 8, 16), (1, 16, 8), (1, 8, 8)], [(2, 8, 16), (1, 16, 8)], [(1, 8, 16), (1, 8, 8)]]


# Banks and loose matrices, fewer elements than a piece and more, no multiple of 16; above them, more than one launch
# of the addresses' kernel holds.
FUSED_SHAPES = [(3, 40, 56), (40, 56), (7, 9), (72, 80), (2, 9, 7)] + 20 * [(4, 4)]
FUSED_SETTINGS = [
    {"weight_decay": 0.1, "adjust_lr": "match_rms_adamw"},
    {"nesterov": False},
]


def fused_or_skip(device):
    if reason := why_not_triton(torch.ones(1, device=device)):
        pytest.skip(reason)


def groups_of(params):
    """Two groups, one of them with its own learning rate."""
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.05}]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("settings", FUSED_SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_passes_agree_with_the_plain_ones(device, capturable, settings, dtype):
    fused_or_skip(device)
    options = settings | {"lr": 0.1, "compute_dtype": torch.float32, "ns_impl": "reference"}
    ours, plain, exact = (random_params(FUSED_SHAPES, device, dt) for dt in (dtype, dtype, torch.float64))
    for a, b in zip(exact, plain, strict=True):
        a.data.copy_(b.data)  # the same start, rounded to dtype
    a = Muon(groups_of(ours), fused=True, capturable=capturable, **options)
    b, c = Muon(groups_of(plain), **options), Muon(groups_of(exact), **options)
    for step in range(3):
        for group in (*a.param_groups, *b.param_groups, *c.param_groups):
            group["momentum"] = (0.85, 0.9, 0.95)[step]  # a schedule
        set_grads(plain, step)
        for params in (ours, exact):
            for p, q in zip(params, plain, strict=True):
                p.grad = q.grad.to(p.dtype)
        kept = ours[1].grad.clone()
        for optimizer in (a, b, c):
            optimizer.step()
        assert torch.equal(ours[1].grad, kept)
    eps = torch.finfo(dtype).eps
    for x, y, z in zip(ours, plain, exact, strict=True):
        error, allowed = ((t.double() - z.double()).abs().max() for t in (x, y))
        assert error <= 2 * allowed + eps * z.abs().max()
    buffers = [[o.state[p]["momentum_buffer"] for p in ps] for o, ps in ((a, ours), (b, plain))]
    for x, y in zip(*buffers, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_fused_with_the_megakernel_agrees_with_float32(device):
    fused_or_skip(device)
    shapes = [(2, 40, 56), (56, 40)]
    ours, plain = random_params(shapes, device), random_params(shapes, device)
    a = Muon(groups_of(ours)[:1], lr=0.1, fused=True, ns_impl="triton_megakernel", compute_dtype=torch.bfloat16)
    b = Muon(groups_of(plain)[:1], lr=0.1, compute_dtype=torch.float32)
    for params, optimizer in ((ours, a), (plain, b)):
        set_grads(params, 0)
        optimizer.step()
    for x, y, start in zip(ours, plain, random_params(shapes, device), strict=True):
        assert (x - y).norm() < 0.01 * (y - start).norm()


@pytest.mark.parametrize("device", DEVICES)
def test_fused_state_dict_resumes_bitwise_and_keeps_its_tensors(device):
    fused_or_skip(device)
    straight = random_params([(2, 8, 16), (16, 8)], device)
    options = {"fused": True, "capturable": True, "ns_impl": "reference"}
    a = Muon(straight, lr=0.1, **options)
    lr = a.param_groups[0]["lr"]
    assert lr.device == straight[0].device and lr.dtype == torch.float32
    set_grads(straight, 0)
    a.step()
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
    b = Muon(resumed, lr=0.3, **options)
    b.load_state_dict(a.state_dict())
    for params, optimizer in ((straight, a), (resumed, b)):
        set_grads(params, 1)
        optimizer.param_groups[0]["lr"].fill_(0.2)
        optimizer.step()
    assert all(map(torch.equal, straight, resumed))
    assert a.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "cpu"])
def test_fused_step_in_a_cuda_graph_follows_new_values(device):
    shapes = [(3, 96, 64), (64, 96), (2, 64, 200)]
    options = {"fused": True, "capturable": True, "ns_impl": "triton_megakernel", "compute_dtype": torch.bfloat16}
    ours, plain = random_params(shapes, device), random_params(shapes, device)
    a, b = Muon(ours, lr=0.1, weight_decay=0.1, **options), Muon(plain, lr=0.1, weight_decay=0.1, **options)
    for params, optimizer in ((ours, a), (plain, b)):
        set_grads(params, 0)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    before = [p.detach().clone() for p in ours]
    with torch.cuda.graph(graph):
        a.step()
    assert all(map(torch.equal, ours, before)), "a capture computes nothing"
    for step in (1, 2):
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"].fill_(0.1 / step)
            optimizer.param_groups[0]["momentum"].fill_(0.9 + 0.01 * step)
        set_grads(plain, step)
        for p, q in zip(ours, plain, strict=True):
            p.grad.copy_(q.grad)
        graph.replay()
        b.step()
        assert all(map(torch.equal, ours, plain))


def test_fused_errors_say_what_and_why():
    with pytest.raises(ValueError, match=r"capturable needs fused=True, got fused=False"):
        Muon(random_params([(4, 4)]), capturable=True)
    if not TRITON_INTERPRETED:
        with pytest.raises(ValueError, match=r"fused needs contiguous parameters on a GPU, got .*; use fused=False"):
            Muon(random_params([(4, 4)]), fused=True)
    elif why_not_triton(torch.ones(1)) is None:
        with pytest.raises(ValueError, match=r"got it is not contiguous"):
            Muon([torch.nn.Parameter(torch.ones(4, 6).T)], fused=True)


def test_errors_say_what_and_why():
    with pytest.raises(ValueError, match=r"matrices or banks, got shape \(4,\); use AdamW for others"):
        Muon(random_params([(4,)]))
    with pytest.raises(ValueError, match=r"lr must be >= 0, got -1"):
        Muon(random_params([(4, 4)]), lr=-1)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        Muon(random_params([(4, 4)]), momentum=1)
    with pytest.raises(ValueError, match=r"weight_decay must be >= 0, got -0.1"):
        Muon(random_params([(4, 4)]), weight_decay=-0.1)
    with pytest.raises(ValueError, match=r"one of \['original', 'match_rms_adamw'\], got 'muP'"):
        Muon([{"params": random_params([(4, 4)]), "adjust_lr": "muP"}])
