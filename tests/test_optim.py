"""Muon: golden steps of the published optimisers, torch.optim.Muon, state dicts, and 1 = 2 = 3 ranks over gloo."""

import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numerics import DEVICES

from pgolf_kernels.optim import Muon, default_compute_dtype

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


# A bank that neither 2 nor 3 ranks divide, loose matrices of its shape and its transpose, fewer of a kind than ranks
SHARDED_SHAPES = [(5, 8, 16), (8, 16), (16, 8), (2, 16, 8), (24, 24)]


def steps_on_rank(rank, world, store_path, out_path):
    """Three steps as one of `world` ranks; rank 0 saves the parameters and checks that all ranks agree."""
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    try:
        for dtype in (torch.float32, torch.bfloat16):
            params = random_params(SHARDED_SHAPES)
            optimizer = Muon(
                params,
                lr=0.1,
                weight_decay=0.1,
                compute_dtype=dtype,
                process_group=dist.group.WORLD,
            )
            for step in range(3):
                set_grads(params, step)
                optimizer.step()
            flat = torch.cat([p.detach().flatten() for p in params])
            everyone = [torch.empty_like(flat) for _ in range(world)]
            dist.all_gather(everyone, flat)
            assert all(torch.equal(flat, other) for other in everyone), "ranks hold different parameters"
            if rank == 0:
                torch.save(flat, f"{out_path}.{dtype}")
    finally:
        dist.destroy_process_group()
    os._exit(0)  # a gloo process that merely initialises and exits aborts about once in 200 times (torch 2.13)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work_and_agree_with_one_process(world, tmp_path):
    mp.spawn(steps_on_rank, args=(world, str(tmp_path / "store"), str(tmp_path / "out")), nprocs=world)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        params = random_params(SHARDED_SHAPES)
        optimizer = Muon(params, lr=0.1, weight_decay=0.1, compute_dtype=dtype)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        alone = torch.cat([p.detach().flatten() for p in params])
        shared = torch.load(tmp_path / f"out.{dtype}")
        torch.testing.assert_close(shared, alone, rtol=0, atol=tolerance)
