"""Muon on 1, 2 and 3 ranks, real processes over gloo: equal results, who keeps what, what is sent, and when."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pgolf_kernels.optim import Muon, muon, parallel
from pgolf_kernels.optim.parallel import COMMS

# A bank that neither 2 nor 3 ranks divide, loose matrices of its shape and its transpose, fewer of a kind than ranks
SHAPES = [(5, 8, 16), (8, 16), (16, 8), (2, 16, 8), (24, 24)]
SETTINGS = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "compute_dtype": torch.float32, "reduction": "sum"}
# Values of momentum on rank 0, of 1728 in all: 3 or 2 matrices of the first bank, or those whose number fits.
HELD = {("parallel", 2): 1344, ("parallel", 3): 1216, ("round_robin", 2): 640, ("round_robin", 3): 960}
STEPS = 3
BF16_ROUNDING = 2.0**-8  # the most that rounding to bfloat16 changes a value, relative to it


def random_params():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


def give_gradients(params, seed, rank=0, world=1):
    """This rank's share of a sum of six gradients of whole numbers so small that bfloat16 adds them exactly.

    The third parameter has none in the second step.
    """
    generator = torch.Generator().manual_seed(seed)
    six = [[torch.randint(-8, 9, p.shape, generator=generator).float() for p in params] for _ in range(6)]
    for index, p in enumerate(params):
        p.grad = None if (seed, index) == (1, 2) else sum(g[index] for g in six[rank::world])


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def train(params, optimizer, steps, rank=0, world=1):
    for step in steps:
        give_gradients(params, step, rank, world)
        if world > 1 and not optimizer.reduces_gradients:
            for p in params:
                if p.grad is not None:
                    dist.all_reduce(p.grad)
        optimizer.step()


def on_rank(rank, world, store_path, out):
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        for comms in COMMS:
            compare_ranks(rank, world, comms, f"{out}.{comms}")
            send_bfloat16(rank, world, comms, f"{out}.{comms}.bfloat16")
        reduce_in_bfloat16(rank, world)
        reduce_without_reduce_scatter(rank, world)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # a gloo process that merely initialises and exits aborts about once in 200 times (torch 2.13)


def compare_ranks(rank, world, comms, out):
    """Ranks agree after STEPS steps; resuming gives the same bits; rank 0 leaves what it has for comparison."""
    options = SETTINGS | {"process_group": dist.group.WORLD, "comms": comms}
    params, resumed = random_params(), random_params()
    optimizer = Muon(params, **options)
    train(params, optimizer, range(STEPS), rank, world)
    everyone = [torch.empty_like(flat(params)) for _ in range(world)]
    dist.all_gather(everyone, flat(params))
    assert all(torch.equal(everyone[0], other) for other in everyone), "ranks hold different parameters"

    whole = optimizer.full_state_dict()
    assert (len(whole["state"]) == len(params)) == (rank == 0)
    if rank == 0:
        held = sum(state["momentum_buffer"].numel() for state in optimizer.state.values())
        torch.save({"params": flat(params), "state": whole, "held": held}, out)
    dist.barrier()

    for p, q in zip(resumed, params, strict=True):
        p.data.copy_(q.data)
    from_whole, from_own = Muon(resumed, **options), Muon(resumed, **options)
    from_whole.load_state_dict(torch.load(out)["state"])
    train(resumed, from_whole, range(STEPS, STEPS + 1), rank, world)
    from_own.load_state_dict(from_whole.state_dict())
    train(resumed, from_own, range(STEPS + 1, STEPS + 2), rank, world)
    train(params, optimizer, range(STEPS, STEPS + 2), rank, world)
    assert torch.equal(flat(resumed), flat(params))


def send_bfloat16(rank, world, comms, out):
    params = random_params()
    options = SETTINGS | {"process_group": dist.group.WORLD, "comms": comms, "comms_dtype": torch.bfloat16}
    train(params, Muon(params, **options), range(STEPS), rank, world)
    computed = random_params()
    options |= {"comms_dtype": None, "compute_dtype": torch.bfloat16}
    train(computed, Muon(computed, **options), range(STEPS), rank, world)
    if rank == 0:
        torch.save({"sent": flat(params), "computed": flat(computed)}, out)


def reduce_in_bfloat16(rank, world):
    """A rank's slice of the mean: every share is rounded once, and so is each of the world - 1 partial sums."""
    shares = torch.randn(world, *SHAPES[0], generator=torch.Generator().manual_seed(7))
    p = torch.nn.Parameter(torch.zeros(SHAPES[0]))
    p.grad = shares[rank].clone()
    optimizer = Muon([p], process_group=dist.group.WORLD, comms="parallel", comms_dtype=torch.bfloat16)
    if world > 1:
        optimizer.reduce_gradients()
        (bank,) = optimizer._exchange.reduced()
        mine = optimizer._exchange.owned(p)
        error = (bank.gradient.double() - shares.double().mean(0)[mine]).abs()
        assert (error <= 1.01 * world * BF16_ROUNDING * shares.double().abs().mean(0)[mine]).all()
        assert error.max() > 0, "nothing was rounded: is it bfloat16 that travels?"


def reduce_without_reduce_scatter(rank, world):
    """A backend that has none gives the same bits, by an all-reduce."""

    def missing(*args, **options):
        raise RuntimeError("Backend gloo does not support _reduce_scatter_base")

    results, real = [], parallel._reduce_scatter
    for parallel._reduce_scatter in (missing, real):
        params = random_params()
        options = SETTINGS | {"process_group": dist.group.WORLD, "comms": "parallel"}
        train(params, Muon(params, **options), range(STEPS), rank, world)
        results.append(flat(params))
    assert torch.equal(*results)


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request, tmp_path_factory):
    """`on_rank` has run on so many ranks; with the path that its results' names begin with."""
    path = tmp_path_factory.mktemp(f"ranks{request.param}")
    mp.spawn(on_rank, args=(request.param, str(path / "store"), str(path / "out")), nprocs=request.param)
    return request.param, path / "out"


@pytest.fixture(scope="module")
def alone():
    """One process without a group: the parameters before and after each step, and the momentum."""
    params = random_params()
    optimizer = Muon(params, **SETTINGS)
    history = [flat(params).clone()]
    for step in range(STEPS):
        train(params, optimizer, [step])
        history.append(flat(params))
    return history, [optimizer.state[p]["momentum_buffer"] for p in params]


@pytest.mark.parametrize("comms", COMMS)
def test_any_number_of_ranks_agrees_with_one_process(ranks, alone, comms):
    (world, out), (history, momentum) = ranks, alone
    result = torch.load(f"{out}.{comms}")
    torch.testing.assert_close(result["params"], history[-1], rtol=0, atol=1e-6 if world > 1 else 0)
    for index, buffer in enumerate(momentum):
        assert torch.equal(result["state"]["state"][index]["momentum_buffer"], buffer)
    assert result["held"] == HELD.get((comms, world), flat(momentum).numel())


@pytest.mark.parametrize("comms", COMMS)
def test_bfloat16_costs_one_rounding_of_every_update(ranks, alone, comms):
    """Gradients are exact in bfloat16 here, so the momentum is; decay only shrinks what a step was wrong by."""
    (world, out), (history, _) = ranks, alone
    decay = 1 - SETTINGS["lr"] * SETTINGS["weight_decay"]
    moved = sum((after - decay * before).abs() for before, after in zip(history, history[1:], strict=False))
    result = torch.load(f"{out}.{comms}.bfloat16")
    error = (result["sent"] - history[-1]).abs()
    assert (error <= 1.01 * BF16_ROUNDING * moved + 1e-6).all()
    assert error.max() > 1e-4 if world > 1 else error.max() == 0
    params = random_params()
    train(params, Muon(params, **SETTINGS | {"compute_dtype": torch.bfloat16}), range(STEPS))
    torch.testing.assert_close(result["computed"], flat(params), rtol=0, atol=2e-2)  # what rounding does inside


# As #1217's banks at 8 ranks, in small: shares of 2, 2, 3 and 3 matrices.
BANKS = {"qo": (22, 4, 4), "kv": (22, 2, 4), "mlp_up": (11, 12, 4), "mlp_down": (11, 4, 12)}
ORDER = ["mlp_up", "mlp_down", "qo", "kv"]


class RecordingGroup:
    """Eight ranks of which one is real: it notes what a step does, in order, and the bytes this rank hands over."""

    def __init__(self, monkeypatch, rank):
        self.log, self.bytes = [], 0
        self.size, self.rank = (lambda: 8), (lambda: rank)
        orthogonalise, update = muon.newton_schulz_banks, muon.update

        def collective(name, wait):
            def start(output, given, group, async_op):
                assert group is self and async_op
                self.bytes += given.numel() * given.element_size()
                self.note(name, output)
                return Work(lambda: self.note(wait, output))

            return start

        def newton_schulz(banks, *args, **options):
            self.log.append(f"orthogonalise {' '.join(str(len(bank)) for bank in banks)}")
            return orthogonalise(banks, *args, **options)

        def noted_update(group, banks):
            self.note("apply", banks[0].orthogonal)
            update(group, banks)

        monkeypatch.setattr(parallel, "_reduce_scatter", collective("reduce", "wait for gradient of"))
        monkeypatch.setattr(parallel, "_all_gather", collective("gather", "wait for update of"))
        monkeypatch.setattr(muon, "newton_schulz_banks", newton_schulz)
        monkeypatch.setattr(muon, "update", noted_update)

    def note(self, what, matrices):
        name = next(name for name, shape in BANKS.items() if shape[1:] == matrices.shape[1:])
        self.log.append(f"{what} {name}")


class Work:
    def __init__(self, wait):
        self.wait = wait


@pytest.mark.parametrize(("rank", "shares"), [(0, [2, 2, 3, 3]), (5, [1, 1, 3, 3]), (7, [0, 0, 1, 1])])
def test_a_gather_runs_under_the_next_banks_orthogonalisation(monkeypatch, rank, shares):
    """And the reduce-scatters under whatever the caller does between the two calls; rank 7 has no MLP matrix."""
    group = RecordingGroup(monkeypatch, rank)
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in BANKS.values()]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = Muon(params, process_group=group, comms="parallel", comms_dtype=torch.bfloat16)
    optimizer.reduce_gradients()
    assert group.log == [f"reduce {name}" for name in ORDER]
    padded = sum(rows * cols * (16 if count == 11 else 24) for count, rows, cols in BANKS.values())
    assert group.bytes == 2 * padded  # bfloat16
    group.log.clear()
    optimizer.step()
    first, second, third, fourth = (
        [f"wait for gradient of {name}", f"orthogonalise {share}", f"gather {name}"]
        for name, share in zip(ORDER, shares, strict=True)
    )
    up, down, qo, kv = ([f"wait for update of {name}", f"apply {name}"] for name in ORDER)
    assert group.log == first + second + up + third + down + fourth + qo + kv
    assert group.bytes == 2 * padded + 2 * padded // 8  # to each of the others it gives its slice of the update
    held = [len(optimizer.state[p]["momentum_buffer"]) for p in params]
    assert held == shares[2:] + shares[:2]


def test_wrong_ways_are_refused():
    params = [torch.nn.Parameter(torch.ones(2, 4, 4))]
    with pytest.raises(ValueError, match=r"comms must be one of \['shared', 'round_robin', 'parallel'\], got 'ddp'"):
        Muon(params, comms="ddp")
    with pytest.raises(ValueError, match=r"reduction must be 'mean' or 'sum', got 'max'"):
        Muon(params, reduction="max")
    with pytest.raises(ValueError, match=r"fused needs comms='shared' and float32 momentum, got comms='parallel'"):
        Muon(params, comms="parallel", fused=True)
    state = Muon(params).state_dict()
    state["state"] = {0: {"momentum_buffer": torch.zeros(1, 4, 4)}}
    with pytest.raises(ValueError, match=r"parameter \(2, 4, 4\) must be whole or \(2, 4, 4\), got \(1, 4, 4\)"):
        Muon(params).load_state_dict(state)
