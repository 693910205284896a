"""Five quintic steps on the four banks of an 11-layer, 512-wide GPT, in bfloat16, against PyTorch three ways.

The limit counts what symmetry leaves: per step, half of X X^T and of A^2, and all of (bA + cA^2) X.
"""

import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from benchmarks.bench import Case
from pgolf_kernels.ops.newton_schulz import newton_schulz, op, reference

SHAPES = [(22, 512, 512), (22, 256, 512), (11, 1536, 512), (11, 512, 1536)]
STEPS = op.schedule("quintic", 5)


def _eager(g):
    return reference.forward(g, STEPS, False, 1e-7, g.dtype)


def _optim_muon(g):
    return torch.stack([_zeropower_via_newtonschulz(m.clone(), STEPS[0], 5, 1e-7) for m in g])


def cases(device, quick):
    """One case per bank; --quick takes a small one."""
    for batch, m, n in [(2, 128, 256)] if quick else SHAPES:
        example = torch.empty(batch, m, n, dtype=torch.bfloat16, device=device)
        args = (example, STEPS, False, 1e-7, example.dtype)
        names = [i.name for i in op.IMPLS if i.why_not(*args) is None]
        peers = {"torch eager": _eager, "torch.optim.Muon": _optim_muon}
        if not quick:
            peers["torch.compile"] = torch.compile(_eager, dynamic=False)
        short, long = min(m, n), max(m, n)
        yield Case(
            shape=f"{batch}x{m}x{n}",
            dtype=torch.bfloat16,
            inputs=lambda s=(batch, m, n): (torch.randn(s, device=device).bfloat16(),),
            ours={name: lambda g, name=name: newton_schulz(g, impl=name) for name in names},
            peers=peers,
            exact=lambda g: newton_schulz(g.double(), impl="reference"),
            flops=5 * batch * (3 * short**2 * long + short**3),
            bytes=2 * 2 * batch * m * n,
        )
