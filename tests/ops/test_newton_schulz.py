"""newton_schulz: golden vectors of the published loops, and every implementation against float64 on hard spectra.

Gaussian matrices hide what 16-bit iterations do to small singular values, so each comparison also runs on a power law,
on low rank plus noise, and on a bank with a zero matrix; errors are relative Frobenius norms per matrix.
"""

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import DEVICES, assert_as_accurate

from pgolf_kernels import explain, newton_schulz, newton_schulz_banks
from pgolf_kernels.dispatch import TRITON_INTERPRETED
from pgolf_kernels.ops.newton_schulz import op, reference

if TRITON_INTERPRETED:
    import triton_cpu  # noqa: F401  (corrects the interpreter's bfloat16)

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "muon_newton_schulz.npz")
IMPL_NAMES = [i.name for i in op.IMPLS]
# One element and one row, odd, in banks, because the plain loop is often exact by luck on few numbers; a tile's tail on
# both sides, tall; square with a tail; wide enough for Triton's Gram form, and for the CPU's; two batch dimensions.
# Real sizes run in the benchmark's correctness gate.
SHAPES = [(100, 1, 1), (100, 1, 7), (2, 65, 33), (3, 72, 72), (2, 40, 130), (2, 70, 150), (2, 2, 96, 24)]
SPECTRA = ["gauss", "power_law", "low_rank", "with_zero_matrix"]
if TRITON_INTERPRETED:  # seconds per call: several tiles with tails, tall and in the Gram form, on the hardest spectrum
    SHAPES, SPECTRA = [(1, 100, 72), (2, 72, 144)], ["power_law_beside_zero"]


def matrices(shape, spectrum, device):
    """Random float32 matrices with that spectrum, at the size of a gradient."""
    g = torch.randn(shape, device=device)
    if spectrum.startswith("power_law"):
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        rank = torch.arange(1, u.shape[-1] + 1, device=device)
        g = (0.5 + torch.rand(*shape[:-2], 1, 1, device=device)) * (u * rank**-1.5) @ vh
    elif spectrum == "low_rank":
        rank = min(4, *shape[-2:])
        g = torch.randn(*shape[:-1], rank, device=device) @ torch.randn(*shape[:-2], rank, shape[-1], device=device)
        g = g + 1e-3 * torch.randn_like(g)
    if spectrum == "with_zero_matrix" or (spectrum == "power_law_beside_zero" and math.prod(shape[:-2]) > 1):
        g.view(-1, *shape[-2:])[0] = 0
    return 3e-3 * g


def run_or_skip(impl, g, *args, **kwargs):
    """newton_schulz by name; skips the test with the implementation's own reason where it cannot run."""
    dtype = kwargs.get("dtype") or g.dtype
    chosen = next(i for i in op.IMPLS if i.name == impl)
    if reason := chosen.why_not(g, op.schedule("quintic", 5), False, 1e-7, dtype):
        pytest.skip(reason)
    return newton_schulz(g, *args, **kwargs, impl=impl)


def relative_errors(x, exact):
    """|x - exact|_F / |exact|_F per matrix; absolute where the exact matrix is zero."""
    size = torch.linalg.matrix_norm(exact)
    return torch.linalg.matrix_norm(x.double() - exact) / torch.where(size == 0, 1, size)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("coefficients", "row_normalize"), [("quintic", False), ("polar_express", True)])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_the_plain_loop(impl, device, dtype, coefficients, row_normalize, spectrum, shape):
    g = matrices(shape, spectrum, device).to(dtype)
    ours = run_or_skip(impl, g, 5, coefficients, row_normalize)
    args = (op.schedule(coefficients, 5), row_normalize, 1e-7)
    baseline = reference.forward(g, *args, dtype)
    exact = reference.forward(g.double(), *args, torch.float64)
    eps = torch.finfo(dtype).eps
    assert ours.dtype == dtype and ours.shape == g.shape and ours.is_contiguous()
    assert torch.isfinite(ours).all()
    few = max(shape[-2:]) < 10  # their errors are compared in the mean over the bank
    mine, plain = (relative_errors(x, exact).square() for x in (ours, baseline))
    mine, plain = (e.mean().sqrt() if few else e.sqrt() for e in (mine, plain))
    assert (mine <= 2 * plain + eps).all()
    assert_as_accurate(ours, baseline, exact, scale=exact.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", [key for key in GOLDEN.files if not key.endswith("/g")])
def test_golden(device, key):
    name, coefficients, steps = key.split("/")
    g = torch.from_numpy(GOLDEN[f"{name}/g"]).to(device)
    want = torch.from_numpy(GOLDEN[key]).to(device)
    got = newton_schulz(g, int(steps), coefficients, impl="reference")
    # The published loops, in float32, are this far from themselves in float64 at most (ill-conditioned, 10 steps).
    torch.testing.assert_close(got, want, rtol=0, atol=4e-5)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64, 128), (128, 48)], ids=str)
def test_singular_values_end_near_one(impl, device, shape):
    g = torch.randn(shape, device=device).bfloat16()
    s = torch.linalg.svdvals(run_or_skip(impl, g).double())
    assert s.min() > 0.6 and s.max() < 1.25  # a Gaussian of aspect >= 2 has no tiny singular values to be left behind


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_input_is_read_only_and_may_have_any_strides(impl, device):
    g = torch.randn(3, 40, 24, device=device).bfloat16()
    kept = g.clone()
    out = run_or_skip(impl, g)
    assert torch.equal(g, kept)
    spread = torch.randn(24, 3, 80, device=device).bfloat16()
    strided = spread.permute(1, 2, 0)[:, ::2]  # (3, 40, 24)
    strided.copy_(g)
    if impl == "reference":  # PyTorch adds the squares of a norm in the order of its memory
        torch.testing.assert_close(run_or_skip(impl, strided), out, rtol=0, atol=0.02)
    else:
        assert torch.equal(run_or_skip(impl, strided), out)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_dtype_argument_casts_after_the_normalisation(impl, device):
    g = 1e5 * torch.randn(2, 32, 48, device=device)  # too large for float16 until it is normalised
    ours = run_or_skip(impl, g, dtype=torch.float16)
    exact = newton_schulz(g.double())
    baseline = newton_schulz((g / 1e5).half(), impl="reference")
    assert ours.dtype == torch.float16
    assert (relative_errors(ours, exact) <= 2 * relative_errors(baseline, exact)).all()


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_same_input_same_bits_whatever_the_bank(impl, device):
    g = torch.randn(5, 48, 80, device=device).bfloat16()
    first = run_or_skip(impl, g)
    assert torch.equal(first, run_or_skip(impl, g))
    if impl != "reference":  # a batched product of another library may choose its kernel by the batch size
        assert torch.equal(first[3:4], run_or_skip(impl, g[3:4]))


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "cpu"])
@pytest.mark.parametrize("spectrum", ["gauss", "power_law", "low_rank"])
@pytest.mark.parametrize("shape", [(22, 512, 512), (11, 1536, 512), (12, 512, 2048), (30, 136, 520)], ids=str)
def test_triton_on_banks_that_fill_a_gpu(device, spectrum, shape):
    """The large tiles, which small shapes never choose: square, tall and wide banks, and one whose tiles have tails."""
    g = matrices(shape, spectrum, device).bfloat16()
    exact = newton_schulz(g.double())
    ours = relative_errors(newton_schulz(g, impl="triton"), exact)
    baseline = relative_errors(newton_schulz(g, impl="reference"), exact)
    assert (ours <= baseline).all()  # not merely twice: float16 inside leaves room for the Gram form


@pytest.mark.parametrize("device", DEVICES)
def test_triton_probes_are_within_their_bound(device):
    g = torch.randn(1, 24, 40, device=device).bfloat16()
    if reason := op.IMPLS[0].why_not(g, op.schedule("quintic", 1), False, 1e-7, g.dtype):
        pytest.skip(reason)
    from pgolf_kernels.ops.newton_schulz import megakernel, triton_kernel

    for forward in (triton_kernel.forward, lambda g, *args: megakernel.forward([g], *args)[0]):
        ours, exact = op._probe(forward, torch.device(device))
        assert (ours.double() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_triton_registration(device):
    g = torch.randn(1, 24, 40, device=device).bfloat16()
    if reason := op.IMPLS[0].why_not(g, op.schedule("quintic", 1), False, 1e-7, g.dtype):
        pytest.skip(reason)
    args = (g, [3.4445, -4.7750, 2.0315], True, 1e-7, torch.bfloat16)
    torch.library.opcheck(torch.ops.pgolf.newton_schulz_triton.default, args)


# Tall, in the Gram form (wide), square: with tails, and in one launch
MIXED_BANKS = [(1, 100, 72), (1, 60, 130), (0, 5, 7), (2, 64, 64)]


def banks_or_skip(device, spectrum="power_law", dtype=torch.bfloat16, shapes=MIXED_BANKS):
    """Random banks of MIXED_BANKS; skips the test where the megakernel cannot run."""
    banks = [(matrices(s, spectrum, device) if s[0] else torch.empty(s, device=device)).to(dtype) for s in shapes]
    filled = [g for g in banks if g.numel()]
    megakernel = next(i for i in op.BANKS_IMPLS if i.name == "triton_megakernel")
    if reason := megakernel.why_not(filled, op.schedule("quintic", 5), False, 1e-7, torch.bfloat16, False):
        pytest.skip(reason)
    return banks


@pytest.fixture
def poisoned():
    """torch.empty gives NaN, and the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("g_dtype", "coefficients", "row_normalize", "plain"),
    [(torch.bfloat16, "quintic", False, False), (torch.float32, "polar_express", True, False)]
    + [(torch.bfloat16, "quintic", True, True)],
)
def test_triton_megakernel_gives_the_bits_of_one_launch_per_product(
    device, g_dtype, coefficients, row_normalize, plain, poisoned
):
    banks = banks_or_skip(device, "with_zero_matrix", g_dtype)
    args = (2 if plain else 5, coefficients, row_normalize)
    options = {"dtype": torch.bfloat16, "plain": plain}
    together = newton_schulz_banks(banks, *args, **options, impl="triton_megakernel")
    for g, ours in zip(banks, together, strict=True):
        assert ours.shape == g.shape and ours.dtype == torch.bfloat16 and ours.is_contiguous()
        if g.numel():
            assert torch.equal(ours, newton_schulz(g, *args, **options, impl="triton"))
    alone = newton_schulz_banks(banks[1:2], *args, **options, impl="triton_megakernel")
    assert torch.equal(alone[0], together[1])  # whatever else is in the launch


@pytest.mark.parametrize("device", DEVICES)
def test_triton_megakernel_with_large_tiles_and_in_float16(device, poisoned):
    from pgolf_kernels.ops.newton_schulz import megakernel, plan

    banks = banks_or_skip(device, shapes=[(1, 256, 128), (1, 130, 140)])
    large = plan.Tiles(128, 128, 128, 64, 8, 3, 128)
    for dtype, tiles, steps in ((torch.bfloat16, large, 5), (torch.float16, None, 2)):
        ours = megakernel.forward(banks, op.schedule("quintic", steps), False, 1e-7, dtype, tiles=tiles)
        for g, x in zip(banks, ours, strict=True):
            exact = newton_schulz(g.double(), steps)
            baseline = newton_schulz(g, steps, dtype=dtype, impl="reference")
            assert (relative_errors(x, exact) <= 2 * relative_errors(baseline, exact)).all()


@pytest.mark.skipif(not TRITON_INTERPRETED, reason="on a GPU programs always run at the same time")
def test_triton_megakernel_in_programs_that_run_at_the_same_time(monkeypatch):
    """Processes share the memory and the tickets of one launch: items wait for each other, and none twice or never."""
    from triton.runtime import interpreter

    from pgolf_kernels.ops.newton_schulz import megakernel

    banks = banks_or_skip("cpu", shapes=[(1, 60, 130)])  # one matrix: every item needs the one before
    args = (op.schedule("quintic", 5), True, 1e-7, torch.bfloat16)
    want = megakernel.forward(banks, *args)
    kernel, plain_empty = megakernel.mega_kernel, torch.empty
    counters = []

    class Forked:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                counters.append(arguments[3])
                children = []
                for i in range(3):
                    child = os.fork()
                    if child == 0:
                        signal.alarm(100)
                        interpreter.GridExecutor._restore_args_dev = lambda *_: None  # it writes all arguments again
                        status = 1
                        try:
                            kernel[((grid[0] + i) // 3,)](*arguments, **options)
                            status = 0
                        finally:
                            os._exit(status)
                    children.append(child)
                assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]

            return launch

    monkeypatch.setattr(megakernel, "mega_kernel", Forked())
    monkeypatch.setattr(torch, "empty", lambda *size, **options: plain_empty(*size, **options).share_memory_())
    got = megakernel.forward(banks, *args)
    assert all(map(torch.equal, got, want))
    assert counters[0][0] == counters[0][megakernel.COUNTER_STRIDE :: megakernel.COUNTER_STRIDE].sum()


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_triton_megakernel_plan_lists_every_item_after_those_it_needs(coefficients):
    pytest.importorskip("triton")
    from pgolf_kernels.ops.newton_schulz import plan, triton_kernel

    steps = op.schedule(coefficients, 5)
    shapes = [(3, 512, 512), (3, 256, 512), (2, 1536, 512), (2, 100, 700)]
    forms = [triton_kernel.blocks_and_format(m, n, steps, torch.bfloat16, False)[0] for _, m, n in shapes]
    banks = tuple(plan.Bank(*shape, blocks) for shape, blocks in zip(shapes, forms, strict=True))
    for tiles in (plan.Tiles(64, 64, 64, 64, 4, 4, 255), plan.Tiles(128, 128, 128, 64, 8, 3, 255)):
        made = plan.make(banks, tiles, 4, torch.device("cpu"))
        finished = [0] * made.num_matrices
        seen = set()
        for product, matrix, tile, need in made.items.tolist():
            assert finished[matrix] >= need, "an item would wait for a later one"
            assert (product, matrix, tile) not in seen
            seen.add((product, matrix, tile))
            finished[matrix] += 1
        # Phases: `need` changes only from one to the next, and equals all items before it.
        needs = [sorted(n for _, m, _, n in made.items.tolist() if m == matrix) for matrix in range(made.num_matrices)]
        for of_matrix in needs:
            assert all(need == of_matrix.index(need) for need in of_matrix)


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "cpu"])
def test_triton_megakernel_on_banks_that_fill_a_gpu(device):
    """Large tiles and thousands of items in flight, again and again: a tile read before it was written would show."""
    shapes = [(22, 512, 512), (22, 256, 512), (11, 1536, 512), (11, 512, 1536)]
    banks = [matrices(shape, "power_law", device).bfloat16() for shape in shapes]
    first = newton_schulz_banks(banks, impl="triton_megakernel")
    for g, ours in zip(banks, first, strict=True):
        exact = newton_schulz(g.double())
        baseline = relative_errors(newton_schulz(g, impl="reference"), exact)
        assert (relative_errors(ours, exact) <= baseline).all()
    for _ in range(50):
        assert all(map(torch.equal, newton_schulz_banks(banks, impl="triton_megakernel"), first))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = newton_schulz_banks(banks, impl="triton_megakernel")
    for g in banks:
        g.copy_(g.flip(0))
    graph.replay()
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(captured, first, strict=True))


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_banks_are_their_newton_schulz(impl, device):
    banks = [torch.randn(s, device=device).bfloat16() for s in ((2, 24, 40), (0, 3, 4), (40, 24))]
    for g in (banks[0], banks[2]):
        run_or_skip(impl, g)
    for ours, g in zip(newton_schulz_banks(banks, impl=impl), banks, strict=True):
        want = newton_schulz(g, impl=impl) if g.numel() else torch.empty_like(g)
        assert torch.equal(ours, want)


@pytest.mark.parametrize("impl", [name for name in IMPL_NAMES if name != "cpu"])
@pytest.mark.parametrize("device", DEVICES)
def test_plain_has_the_roundings_of_the_published_loop(impl, device):
    g = matrices((2, 72, 144), "power_law", device).bfloat16()
    run_or_skip(impl, g)
    exact = newton_schulz(g.double())
    plain, loop = (newton_schulz(g, plain=p, impl=i) for p, i in ((True, impl), (False, "reference")))
    errors = relative_errors(plain, exact) / relative_errors(loop, exact)
    assert (errors > 0.5).all() and (errors < 2).all()  # float16 inside is 8 times closer


@pytest.mark.parametrize("device", DEVICES)
def test_triton_megakernel_registration(device):
    banks = banks_or_skip(device, shapes=[(1, 24, 40), (40, 24)])
    args = (banks, [3.4445, -4.7750, 2.0315], True, 1e-7, torch.bfloat16, False)
    torch.library.opcheck(torch.ops.pgolf.newton_schulz_megakernel.default, args)
    compiled = torch.compile(newton_schulz_banks, fullgraph=True, backend="aot_eager")
    got, want = (f(banks, 1, impl="triton_megakernel") for f in (compiled, newton_schulz_banks))
    assert all(map(torch.equal, got, want))


def test_reference_agrees_with_torch_optim_muon():
    """The iteration of PyTorch's own optimiser, one matrix at a time, up to bfloat16's rounding of its products."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    for shape in [(64, 96), (96, 64)]:
        g = torch.randn(shape).bfloat16()
        theirs = _zeropower_via_newtonschulz(g.clone(), (3.4445, -4.7750, 2.0315), 5, 1e-7)
        exact = newton_schulz(g.double())
        assert relative_errors(newton_schulz(g, impl="reference"), exact) <= 2 * relative_errors(theirs, exact)


def test_compiles_to_one_graph():
    g = torch.randn(2, 16, 24)
    compiled = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(g), newton_schulz(g))
    compiled = torch.compile(newton_schulz_banks, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled([g, g.mT]), newton_schulz_banks([g, g.mT]), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_changes_nothing(impl, device):
    g = torch.randn(1, 40, 24, device=device)
    dtype = torch.float32 if impl == "reference" else torch.bfloat16
    outside = run_or_skip(impl, g, dtype=dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(newton_schulz(g, dtype=dtype, impl=impl), outside)


def test_schedule():
    triples = [(1.0, 2.0, 3.0), (4.0, 5.0, 6.0)]
    assert op.schedule(triples, 1) == ((1.0, 2.0, 3.0),)
    assert op.schedule(triples, 3) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (4.0, 5.0, 6.0))
    assert op.schedule((3.4445, -4.7750, 2.0315), 2) == op.schedule("quintic", 2)
    assert op.schedule("polar_express", 7)[4:] == (reference.POLAR_EXPRESS[-1],) * 3


def test_no_steps_only_normalise():
    g = torch.randn(3, 4, 6)
    torch.testing.assert_close(newton_schulz(g, 0), g / g.norm(dim=(1, 2), keepdim=True))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(shape):
    assert newton_schulz(torch.empty(shape)).shape == shape


def test_errors_say_what_and_why():
    g = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"must be a matrix or a batch of matrices, got shape \(3,\)"):
        newton_schulz(torch.ones(3))
    with pytest.raises(ValueError, match=r"g must be floating point, got torch.int64"):
        newton_schulz(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"dtype must be floating point, got torch.int8"):
        newton_schulz(g, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"one of \['quintic', 'polar_express'\], got 'cubic'"):
        newton_schulz(g, coefficients="cubic")
    with pytest.raises(ValueError, match=r"triples \(a, b, c\), got \[\(1, 2\)\]"):
        newton_schulz(g, coefficients=[(1, 2)])
    with pytest.raises(ValueError, match=r"steps must be an int >= 0, got -1"):
        newton_schulz(g, steps=-1)
    with pytest.raises(ValueError, match=r"unknown impl 'fast'"):
        newton_schulz(g, impl="fast")


def test_errors_of_banks_say_what_and_why():
    g = torch.ones(2, 2)
    assert newton_schulz_banks([]) == []
    with pytest.raises(ValueError, match=r"banks must have one dtype and be on one device, got .*bfloat16.*float32"):
        newton_schulz_banks([g, g.bfloat16()])
    with pytest.raises(ValueError, match=r"every bank must be a matrix or a batch of matrices, got shape \(3,\)"):
        newton_schulz_banks([g, torch.ones(3)])
    with pytest.raises(ValueError, match=r"banks must be floating point, got torch.int64"):
        newton_schulz_banks([g.long()])
    with pytest.raises(ValueError, match=r"newton_schulz_banks: unknown impl 'fast'"):
        newton_schulz_banks([g], impl="fast")
    with pytest.raises(ValueError, match=r"impl='cpu' cannot run here: .*(no plain form|not available)"):
        newton_schulz_banks([g], plain=True, impl="cpu")
    assert [c.name for c in explain("newton_schulz_banks", [g])] == [i.name for i in op.BANKS_IMPLS]


def test_explain_lists_every_implementation(capsys):
    choices = explain("newton_schulz", torch.ones(2, 2, dtype=torch.float64))
    assert [c.name for c in choices] == IMPL_NAMES
    assert [c.name for c in choices if c.used] == ["reference"]
    assert "needs CUDA tensors" in choices[0].reason or "16 bits" in choices[0].reason
    assert "newton_schulz: reference  used" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"op_name must be one of \[.*'newton_schulz'.*\], got 'matmul'"):
        explain("matmul", torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"newton_schulz: g must be a matrix"):
        explain("newton_schulz", torch.ones(2))
