"""The C++ Newton-Schulz kernel at every instruction-set level this CPU has: accuracy, memory safety, strides, threads.

tests/ops/test_newton_schulz.py compares the level this CPU uses on more spectra; the power law is repeated here.
"""

import pytest
import torch
from memory import Guarded, in_child
from numerics import LEVELS

from pgolf_kernels import extension, newton_schulz
from pgolf_kernels.ops.newton_schulz import cpu, op, reference

pytestmark = pytest.mark.skipif(extension.cpu is None, reason=str(extension.WHY_NOT_CPU))
QUINTIC, POLAR = op.schedule("quintic", 5), op.schedule("polar_express", 5)
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    (100, 1, 1),
    (100, 7, 3),  # computed in float32 inside whatever the dtype, as all short sides up to 32
    (2, 33, 47),  # the standard form; tails of a panel, a block, a vector and a pair
    (2, 150, 65),  # tall, in the Gram form, the same tails
    (1, 96, 1100),  # whole panels; X X^T takes several chunks of depth, the last one short
    (2, 224, 224),  # whole panels and whole blocks
]


@pytest.fixture
def outputs_full_of_nan(monkeypatch):
    """Whatever the kernel forgets to write stays visible."""
    fresh = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: fresh(*size, **kw).fill_(torch.nan))


def power_law(shape):
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    return 3e-3 * (0.5 + torch.rand(len(u), 1, 1)) * (u * torch.arange(1, u.shape[-1] + 1) ** -1.5) @ vh


def relative_errors(x, exact):
    return torch.linalg.matrix_norm(x.double() - exact) / torch.linalg.matrix_norm(exact)


@pytest.mark.parametrize(("steps", "row_normalize"), [(QUINTIC, False), (POLAR, True)], ids=["quintic", "polar"])
@pytest.mark.parametrize("make", [torch.randn, power_law])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_as_accurate_as_the_plain_loop(isa, dtype, shape, make, steps, row_normalize, outputs_full_of_nan):
    g = make(shape).to(dtype)
    ours = cpu.forward(g, steps, row_normalize, 1e-7, dtype, isa)
    baseline = reference.forward(g, steps, row_normalize, 1e-7, dtype)
    exact = reference.forward(g.double(), steps, row_normalize, 1e-7, torch.float64)
    assert ours.dtype == dtype and ours.shape == g.shape
    # In the mean over the bank: on few numbers the plain loop is often exact by luck.
    mine, plain = (relative_errors(x, exact).square().mean().sqrt() for x in (ours, baseline))
    assert mine <= 2 * plain + torch.finfo(dtype).eps


@pytest.mark.parametrize("g_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 56), (2, 85, 44)], ids=str)
def test_dtypes_mix(shape, dtype, g_dtype, outputs_full_of_nan):
    g = torch.randn(shape).to(g_dtype)
    ours = cpu.forward(g, QUINTIC, False, 1e-7, dtype)
    baseline = reference.forward(g, QUINTIC, False, 1e-7, dtype)
    exact = reference.forward(g.double(), QUINTIC, False, 1e-7, torch.float64)
    assert ours.dtype == dtype
    assert (relative_errors(ours, exact) <= 2 * relative_errors(baseline, exact)).all()


@pytest.mark.parametrize("lengths", [[1] * 5, [2, 2, 1], [3, 2], [1, 4], [5]], ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_every_form_is_the_same_iteration(isa, lengths, monkeypatch):
    """In float32 on a benign spectrum, where even five steps in one block are accurate."""
    monkeypatch.setattr(cpu, "blocks", lambda *_: [range(length) for length in lengths])
    g = torch.randn(2, 50, 150)
    ours = cpu.forward(g, POLAR, False, 1e-7, torch.float32, isa)
    exact = reference.forward(g.double(), POLAR, False, 1e-7, torch.float64)
    baseline = reference.forward(g, POLAR, False, 1e-7, torch.float32)
    assert (relative_errors(ours, exact) <= 2 * relative_errors(baseline, exact)).all()


def test_blocks():
    """Chosen by shape and dtype; every step is in exactly one block."""
    bf16, float32 = torch.bfloat16, torch.float32
    lengths = {
        (QUINTIC, 512, 512, bf16): [1] * 5,
        (QUINTIC, 512, 1536, bf16): [3, 2],
        (POLAR, 512, 1536, bf16): [2, 2, 1],
        (QUINTIC, 512, 1536, float32): [2, 3],
        (POLAR, 512, 1536, float32): [2, 3],
        (QUINTIC, 256, 512, float32): [2, 2, 1],
        (POLAR, 256, 512, float32): [1, 2, 2],
        (QUINTIC, 32, 512, bf16): [1] * 5,
        ((), 512, 1536, bf16): [],
    }
    for (steps, *rest), want in lengths.items():
        blocks = cpu.blocks(steps, *rest)
        assert [len(block) for block in blocks] == want
        assert sum(blocks, ()) == steps


@pytest.mark.parametrize("row_normalize", [False, True])
@pytest.mark.parametrize("shape", [(3, 40, 61), (3, 61, 40)], ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_strides(isa, shape, row_normalize):
    """Lines may be rows or columns, of X or across it, with gaps between lines, matrices, or (copied) numbers."""
    g = torch.randn(shape)
    exact = reference.forward(g.double(), QUINTIC, row_normalize, 1e-7, torch.float64)
    allowed = 2 * relative_errors(reference.forward(g, QUINTIC, row_normalize, 1e-7, g.dtype), exact)
    columns = g.mT.contiguous().mT
    gaps = torch.full((3, 70, 80), torch.nan)[:, 3 : 3 + shape[1], 5 : 5 + shape[2]].copy_(g)
    spread = torch.full((shape[2], 3, 2 * shape[1]), torch.nan).permute(1, 2, 0)[:, ::2].copy_(g)
    for strided in (g, columns, gaps, spread, g.unflatten(0, (1, 3))):
        kept = strided.clone()
        ours = cpu.forward(strided, QUINTIC, row_normalize, 1e-7, torch.float32, isa)
        assert ours.shape == strided.shape and ours.is_contiguous() and torch.equal(strided, kept)
        assert (relative_errors(ours.view(shape), exact) <= allowed).all()
    one = cpu.forward(g[:1].expand(3, -1, -1), QUINTIC, row_normalize, 1e-7, torch.float32, isa)
    assert torch.equal(one[0], one[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 70, 170), (2, 64, 64), (5, 150, 65)], ids=str)
def test_threads_change_nothing(shape, dtype):
    """Two threads take a matrix each and share the panels of the one left over; three share all of them."""
    g, before = torch.randn(shape).to(dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(newton_schulz(g, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(newton_schulz(g[-1:], impl="cpu"), results[0][-1:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(2, 45, 45), (2, 65, 150)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_nan_comes_out_and_stays_in_its_matrix(isa, dtype, shape, bad):
    g = torch.randn(shape).to(dtype)
    clean = cpu.forward(g, QUINTIC, False, 1e-7, dtype, isa)
    g[0, 5, 7] = bad
    out = cpu.forward(g, QUINTIC, False, 1e-7, dtype, isa)
    want = reference.forward(g, QUINTIC, False, 1e-7, dtype)
    assert torch.equal(out[0].isnan(), want[0].isnan()) and want[0].isnan().any()
    assert torch.equal(out[1], clean[1])
    assert torch.equal(cpu.forward(g[1:], QUINTIC, False, 1e-7, dtype, isa), clean[1:])


@pytest.mark.parametrize("steps", [(), QUINTIC])
@pytest.mark.parametrize("isa", LEVELS)
def test_zero_and_huge_matrices(isa, steps):
    g = torch.zeros(3, 20, 30)
    g[1] = 1e30 * torch.randn(20, 30)  # the sum of its squares overflows, in the reference too
    g[2] = 1e-30 * torch.randn(20, 30)  # far below eps
    out = cpu.forward(g, steps, False, 1e-7, torch.float32, isa)
    assert (out[:2] == 0).all()
    torch.testing.assert_close(out[2], reference.forward(g, steps, False, 1e-7, g.dtype)[2], rtol=1e-5, atol=0)
    rows = cpu.forward(g[:1], steps, True, 1e-7, torch.float32, isa)
    assert (rows == 0).all()


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("shape", [(2, 35, 70), (2, 66, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_touches_nothing_beyond_its_arguments(isa, dtype, shape, at_end):
    g, out = torch.randn(shape).to(dtype), torch.zeros(shape, dtype=dtype)
    matrices, m, n = shape

    def run():
        memory = Guarded(g, at_end), Guarded(out, at_end)
        for lines_are_rows, line in ((True, n), (False, m)):
            extension.cpu.newton_schulz(
                memory[0].address, sizes=shape, strides=(m * n, line), lines_are_rows=lines_are_rows,
                g_bf16=dtype == torch.bfloat16, out=memory[1].address, bf16=dtype == torch.bfloat16, steps=QUINTIC,
                blocks=[3, 2], row_normalize=True, eps=1e-7, threads=1, isa=isa)  # fmt: skip

    assert in_child(run) == 0


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(shape):
    assert newton_schulz(torch.empty(shape), impl="cpu").shape == shape


def test_registration():
    args = (torch.randn(2, 6, 9), [value for triple in QUINTIC for value in triple], True, 1e-7, torch.bfloat16)
    torch.library.opcheck(torch.ops.pgolf.newton_schulz_cpu.default, args)


def test_compiles_to_one_graph():
    g = torch.randn(2, 20, 24)
    compiled = torch.compile(lambda g: newton_schulz(2 * g, impl="cpu"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(g), newton_schulz(2 * g, impl="cpu"))


def test_refusals():
    g = torch.randn(2, 4, 6)
    with pytest.raises(
        ValueError, match=r"takes and gives float32 or bfloat16 on the CPU, got torch.float32 .*float16"
    ):
        newton_schulz(g, dtype=torch.float16, impl="cpu")
    with pytest.raises(ValueError, match=r"has no backward, and g requires a gradient"):
        newton_schulz(g.requires_grad_(), impl="cpu")
    with pytest.raises(ValueError, match=r"isa must name an instruction set this CPU can run \(generic.*got 'z80'"):
        cpu.forward(g.detach(), QUINTIC, False, 1e-7, torch.float32, "z80")


def test_the_driver_checks_its_blocks(monkeypatch):
    for lengths, message in (
        ([3, 1], r"blocks must have 5 steps together, got 4"),
        ([5, 0], r"at least one step, got 0"),
    ):
        monkeypatch.setattr(cpu, "blocks", lambda *_, lengths=lengths: [range(length) for length in lengths])
        with pytest.raises(ValueError, match=message):
            cpu.forward(torch.randn(2, 4, 6), QUINTIC, False, 1e-7, torch.float32)
