"""Every barrier of the CUDA kernels is missed where it is left out, and none that they need is missing.

The emulation (csrc/common/cuda_emulation.h) runs threads forwards, backwards or in a random order, each as far ahead of
the others as barriers let it. The kernels as they are give the same bits in every order; without any one of their
barriers they give others in some order, fail or crash. Shuffles and the tensor cores' products are no barriers to leave
out: they wait for their warp in hardware, too.
"""

import os
import re

import pytest
import torch
from cuda_cpu import ROOT, VARIANT, emulated_module
from memory import in_child

from pgolf_kernels import extension
from pgolf_kernels.ops.int6_linear import gpu, quantize_int6
from pgolf_kernels.ops.slot import LBFGS, AdamW, cuda_kernel
from pgolf_kernels.ops.slot.problem import Score, check_fit

pytestmark = pytest.mark.skipif(VARIANT == "sanitized", reason="about order, not about memory")
FORWARDS, BACKWARDS, RANDOM = 0, 1, (2, 3)
KERNELS = sorted([*(ROOT / "csrc").glob("*/*_cuda.cu"), *(ROOT / "csrc").glob("*/*.cuh")])
BARRIERS = [
    (str(path.relative_to(ROOT)), number, name)
    for path in KERNELS
    for number, line in enumerate(path.read_text().splitlines(), 1)
    for name in re.findall(r"\b(__syncthreads|named_barrier|group_barrier)\(", line)
]
# The line before a barrier that nothing misses, and why.
SPARE = {
    "if (threadIdx.x == 0) a.loss_partial[segment] = loss + halves[0];": "thread 0 itself is next to write there",
}


def int6_linear():
    weight = quantize_int6(torch.randn(9, 300))
    return [gpu.forward(torch.randn(3, 300), weight.packed, weight.scale, None)]


def slot(batch, T, D, V, norm="after", parameters="both", optimizer=None, one_launch=False):
    """Parameters and losses of a fit, and its scores."""
    hidden, weight = torch.randn(batch, T, D), torch.randn(V, D) / D**0.5
    targets, mask = torch.randint(V, (batch, T)), torch.rand(batch, T) * (torch.rand(batch, T) < 0.9)
    optimizer = optimizer or AdamW(lr=0.02, eps=0.01)
    p = check_fit(hidden, weight, targets, mask, 30.0, norm, "window", "window", parameters, optimizer, 2, None)
    x, losses = cuda_kernel.fit(p, one_launch)
    delta, bias = p.split(x)
    scored = Score(hidden, weight, targets, mask > 0, told=None, delta=delta, bias=bias, softcap=30.0, norm=norm)
    return [x, losses, cuda_kernel.score(scored)]


CASES = {
    "int6_linear": int6_linear,
    "two tiles of delta": lambda: slot(2, 20, 520, 24),
    "two rounds of gathering": lambda: slot(1, 300, 8, 24, parameters="bias"),
    "no tokens": lambda: slot(2, 0, 8, 24),
    "before the norm": lambda: slot(2, 40, 33, 24, norm="before"),
    "teams of four warps": lambda: slot(1, 6, 8, 2056, parameters="bias"),
    "one launch": lambda: slot(1, 200, 33, 40, one_launch=True),
    "one launch of single blocks": lambda: slot(2, 9, 33, 40, one_launch=True),
    "L-BFGS on several blocks": lambda: slot(4, 3, 500, 24, optimizer=LBFGS(lr=20.0, max_iter=1, joint=True)),
}
# Which of them reach all barriers of a file.
REACH = {
    "int6_linear_cuda.cu": ["int6_linear"],
    "slot_lbfgs.cuh": ["L-BFGS on several blocks"],
    "slot_one_launch.cuh": ["one launch", "one launch of single blocks"],
    "slot_rows.cuh": ["two rounds of gathering", "no tokens"],
    "slot_sweep.cuh": ["before the norm", "two rounds of gathering", "teams of four warps"],
    "slot_update.cuh": ["before the norm", "two tiles of delta"],
}


def bits(case, seed=0, order=FORWARDS, missing=""):
    """What a case computes, as bytes; afterwards the module runs forwards and whole again."""
    torch.manual_seed(seed)
    extension.cuda.conduct(order, missing)
    try:
        return b"".join(t.numpy().tobytes() for t in CASES[case]())
    finally:
        extension.cuda.conduct()


@pytest.fixture(scope="module")
def whole():
    """Each case's bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has no others
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "cuda", emulated_module())
        yield {case: bits(case) for case in CASES}
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_in_every_order(whole, case):
    for order in (BACKWARDS, *RANDOM):
        assert bits(case, order=order) == whole[case], order


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda barrier: "{}:{}-{}".format(*barrier))
def test_a_missing_barrier_shows(whole, barrier):
    path, number, name = barrier
    cases = REACH[path.rpartition("/")[2]]
    for case in reversed(cases):
        bits(case, seed=1)  # leaves other numbers where shared memory was
    before = (ROOT / path).read_text().splitlines()[number - 2].strip()

    def shows(case, order):
        def run():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            assert bits(case, order=order, missing=f"{ROOT / path}:{number} {name}") == whole[case]

        return in_child(run) != 0

    attempts = ((case, order) for order in (FORWARDS, BACKWARDS, *RANDOM) for case in cases)
    assert any(shows(*attempt) for attempt in attempts) == (before not in SPARE)
