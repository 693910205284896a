"""newton_schulz: golden vectors of the published loops, and every implementation against float64 on hard spectra.

Gaussian matrices hide what 16-bit iterations do to small singular values, so each comparison also runs on a power law,
on low rank plus noise, and on a bank with a zero matrix; errors are relative Frobenius norms per matrix.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import DEVICES, assert_as_accurate

from pgolf_kernels import explain, newton_schulz
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
if TRITON_INTERPRETED:  # seconds per call: several tiles with tails, tall and in the Gram form, on the hard spectra
    SHAPES, SPECTRA = [(1, 100, 72), (2, 72, 144)], ["power_law", "with_zero_matrix"]


def matrices(shape, spectrum, device):
    """Random float32 matrices with that spectrum, at the size of a gradient."""
    g = torch.randn(shape, device=device)
    if spectrum == "power_law":
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        rank = torch.arange(1, u.shape[-1] + 1, device=device)
        g = (0.5 + torch.rand(*shape[:-2], 1, 1, device=device)) * (u * rank**-1.5) @ vh
    elif spectrum == "low_rank":
        rank = min(4, *shape[-2:])
        g = torch.randn(*shape[:-1], rank, device=device) @ torch.randn(*shape[:-2], rank, shape[-1], device=device)
        g = g + 1e-3 * torch.randn_like(g)
    elif spectrum == "with_zero_matrix":
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
def test_triton_registration(device):
    g = torch.randn(1, 24, 40, device=device).bfloat16()
    if reason := op.IMPLS[0].why_not(g, op.schedule("quintic", 1), False, 1e-7, g.dtype):
        pytest.skip(reason)
    args = (g, [3.4445, -4.7750, 2.0315], True, 1e-7, torch.bfloat16)
    torch.library.opcheck(torch.ops.pgolf.newton_schulz_triton.default, args)


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
    with pytest.raises(ValueError, match=r"steps must be >= 0, got -1"):
        newton_schulz(g, steps=-1)
    with pytest.raises(ValueError, match=r"unknown impl 'fast'"):
        newton_schulz(g, impl="fast")


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
