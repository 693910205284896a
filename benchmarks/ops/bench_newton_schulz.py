"""Five quintic steps on the four banks of an 11-layer, 512-wide GPT, against PyTorch three ways.

On a GPU also on all of them in one call, and on a rank's share of eight: the megakernel against PyTorch and against our
own launch per product, which is a peer there.

The limit counts what symmetry and the Gram form leave: a block of k steps takes half of X X^T, 4 k - 3 products of
symmetric matrices, half of each, and all of P X. The eager peer is the plain loop in batched products (baddbmm).
"""

import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from benchmarks.bench import Case
from pgolf_kernels.ops.newton_schulz import newton_schulz, newton_schulz_banks, op, reference
from pgolf_kernels.ops.newton_schulz.schedule import blocks_of, single_steps

SHAPES = [(22, 512, 512), (22, 256, 512), (11, 1536, 512), (11, 512, 1536)]
SHARE = [(3, 512, 512), (3, 256, 512), (2, 1536, 512), (2, 512, 1536)]  # of eight ranks
STEPS = op.schedule("quintic", 5)


def _eager(g):
    return reference.forward(g, STEPS, False, 1e-7, g.dtype)


def _optim_muon(g):
    return torch.stack([_zeropower_via_newtonschulz(m.clone(), STEPS[0], 5, 1e-7) for m in g])


def _flops(short, long):
    """Of one matrix, in the cheaper form."""
    forms = single_steps(STEPS), blocks_of(STEPS)
    return min(sum(3 * short**2 * long + (4 * len(block) - 3) * short**3 for block in form) for form in forms)


def cases(device, quick):
    """One case per bank, on a CPU in float32 too; --quick takes a small bank."""
    for dtype in (torch.bfloat16, torch.float32) if device == "cpu" else (torch.bfloat16,):
        for shape in [(2, 128, 256)] if quick else SHAPES:
            yield _case(shape, dtype, device, quick)
    if quick:
        yield _banks_case("banks", [(2, 64, 96), (1, 96, 64)], device, quick)
    elif device == "cuda":
        yield _banks_case("all banks", SHAPES, device, quick)
        yield _banks_case("share of 8 ranks", SHARE, device, quick)


def _case(shape, dtype, device, quick):
    batch, m, n = shape
    args = (torch.empty(shape, dtype=dtype, device=device), STEPS, False, 1e-7, dtype)
    able = [i.name for i in op.IMPLS if i.why_not(*args) is None]
    peers = {"torch eager": _eager}
    if dtype == torch.bfloat16:  # PyTorch's optimiser computes in nothing else
        peers["torch.optim.Muon"] = _optim_muon
    if not quick:
        peers["torch.compile"] = torch.compile(_eager, dynamic=False)
    return Case(
        shape=f"{batch}x{m}x{n}",
        dtype=dtype,
        inputs=lambda: (torch.randn(shape, device=device).to(dtype),),
        ours={name: lambda g, name=name: newton_schulz(g, impl=name) for name in able[:-1] or able},
        peers=peers,
        exact=lambda g: newton_schulz(g.double(), impl="reference"),
        flops=batch * _flops(min(m, n), max(m, n)),
        bytes=2 * dtype.itemsize * batch * m * n,
    )


def _banks_case(name, shapes, device, quick):
    def inputs():
        return tuple(torch.randn(shape, device=device).bfloat16() for shape in shapes)

    def eager(*banks):
        return [_eager(g) for g in banks]

    def ours(impl):
        return lambda *banks: newton_schulz_banks(banks, impl=impl)

    args = ([torch.empty(s, dtype=torch.bfloat16, device=device) for s in shapes], STEPS, False, 1e-7, torch.bfloat16)
    able = [i.name for i in op.BANKS_IMPLS if i.why_not(*args, False) is None]
    peers = {"torch eager": eager}
    if not quick:
        peers["torch.compile"] = torch.compile(eager, dynamic=False)
    if "triton" in able:
        peers["a launch per product"] = ours("triton")
    return Case(
        shape=name,
        dtype=torch.bfloat16,
        inputs=inputs,
        ours={impl: ours(impl) for impl in able[:-1] or able if impl != "triton"},
        peers=peers,
        exact=lambda *banks: tuple(newton_schulz(g.double(), impl="reference") for g in banks),
        flops=sum(batch * _flops(min(m, n), max(m, n)) for batch, m, n in shapes),
        bytes=4 * sum(batch * m * n for batch, m, n in shapes),
    )
