"""leaky_relu2_mlp: every implementation, forward and the three gradients, against float64.

Triton's kernels also run under the interpreter (tests/test_triton_interpreter.py), so their shapes stay small here.
"""

import pytest
import torch
from numerics import DEVICES, assert_as_accurate, forward_and_grads
from triton_cpu import record_ops  # under TRITON_INTERPRET=1 importing this module makes bfloat16 right

from pgolf_kernels.dispatch import TRITON_INTERPRETED
from pgolf_kernels.ops.leaky_relu2_mlp import cpu, leaky_relu2_mlp, op, reference

IMPL_NAMES = [i.name for i in op.IMPLS]
# (rows, D, H). Odd sizes below a tile and unfit for TMA (rows not a multiple of 16 bytes); a tile of 128 x 256 x 64
# plus a tail in every direction; three dimensions, exact tiles in D and H.
SHAPES = [((5, 7), 20, 36), ((257,), 72, 264), ((3, 400), 64, 256)]
TRITON_DEVICES = ["cpu"] * TRITON_INTERPRETED + ["cuda"] * torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not TRITON_DEVICES, reason="Triton needs a CUDA GPU or TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def any_number_of_rows(monkeypatch):
    """The C++ kernel also runs the small shapes here, which the choice would leave to PyTorch."""
    monkeypatch.setattr(cpu, "MIN_ROWS", dict.fromkeys(cpu.MIN_ROWS, 0))


@pytest.fixture
def nan_filled_memory():
    """torch.empty and its kin return NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(shape, device, dtype=torch.float32):
    rows, D, H = shape
    sizes = (torch.randn(*rows, D), torch.randn(H, D) / D**0.5, torch.randn(D, H) / H**0.5, torch.randn(*rows, D))
    return tuple(t.to(device, dtype) for t in sizes)


def compute(impl, tensors, slope):
    """y and all gradients three times: the implementation's, the reference's in the same dtype, and in float64."""
    *args, dy = tensors
    chosen = next(i for i in op.IMPLS if i.name == impl)
    if reason := chosen.why_not(*args, slope):
        pytest.skip(reason)
    got = forward_and_grads(lambda *a: leaky_relu2_mlp(*a, slope, impl=impl), args, dy)
    baseline = forward_and_grads(lambda *a: reference.forward(*a, slope), args, dy)
    exact = forward_and_grads(lambda *a: reference.forward(*a, slope), [a.double() for a in args], dy.double())
    return got, baseline, exact


def check(impl, tensors, slope, factor=2.0):
    """No worse than `factor` times the reference in the same dtype."""
    for ours, theirs, true in zip(*compute(impl, tensors, slope), strict=True):
        assert_as_accurate(ours, theirs, true, scale=true.abs().max(), factor=factor)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(impl, device, dtype, shape):
    check(impl, inputs(shape, device, dtype), slope=0.5)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_of_everything(impl, device, dtype):
    """On average over 20 problems: in a single one the reference may happen to round nothing away."""
    errors = []
    for _ in range(20):
        got, baseline, exact = compute(impl, inputs(((1,), 1, 1), device, dtype), slope=0.5)
        for found in (got, baseline):
            errors += [((f.double() - e) / e).abs().squeeze() for f, e in zip(found, exact, strict=True)]
    ours, theirs = torch.stack(errors).view(-1, 2, 4).mean(0)
    assert (ours <= 2 * theirs + torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slope", [0.0, 0.1, -0.7, 1.0])  # ReLU^2; the usual leak; a fold; p^2
def test_slopes(impl, device, slope):
    check(impl, inputs(((65,), 32, 64), device, torch.bfloat16), slope)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_small_and_large_inputs(impl, device, size):
    """The square spans twice the exponents of p; its root must not lose them."""
    x, w_up, w_down, dy = inputs(((65,), 32, 64), device, torch.bfloat16)
    check(impl, (size * x, w_up, w_down, dy), slope=0.5)


@pytest.mark.parametrize("device", DEVICES)
def test_reference_gradients_by_finite_differences(device):
    args = [t.requires_grad_() for t in inputs(((3,), 4, 5), device, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *a: leaky_relu2_mlp(*a, 0.5, impl="reference"), args)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_some_gradients_only(impl, device):
    """Frozen weights or a frozen input must leave the other gradients as they are, bit for bit."""
    *args, dy = inputs(((33,), 24, 40), device, torch.bfloat16)
    if reason := next(i for i in op.IMPLS if i.name == impl).why_not(*args, 0.5):
        pytest.skip(reason)
    leaves = [a.clone().requires_grad_() for a in args]
    every = torch.autograd.grad(leaky_relu2_mlp(*leaves, impl=impl), leaves, dy)
    for i, want in enumerate(every):
        leaves = [a.clone().requires_grad_(i == j) for j, a in enumerate(args)]
        (got,) = torch.autograd.grad(leaky_relu2_mlp(*leaves, impl=impl), leaves[i], dy)
        assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [((0,), 8, 16), ((2, 0), 8, 16), ((3,), 8, 0)], ids=str)
def test_empty(device, shape):
    *args, dy = inputs(shape, device)
    y, *grads = forward_and_grads(leaky_relu2_mlp, args, dy)
    assert y.shape == dy.shape and [g.shape for g in grads] == [a.shape for a in args]
    assert not y.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs_and_gradient(impl, device):
    """Transposed weights, every second row of x and the zero-stride gradient of sum() give the contiguous result."""
    x, w_up, w_down, _ = inputs(((34,), 24, 40), device, torch.bfloat16)
    if reason := next(i for i in op.IMPLS if i.name == impl).why_not(x, w_up, w_down, 0.5):
        pytest.skip(reason)
    strided = [t.requires_grad_() for t in (x[::2], w_up.T.contiguous().T, w_down.T.contiguous().T)]
    plain = [t.detach().clone().contiguous().requires_grad_() for t in strided]
    grads = [torch.autograd.grad(leaky_relu2_mlp(*a, impl=impl).float().sum(), a) for a in (strided, plain)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_deterministic(impl, device):
    *args, dy = inputs(((130,), 64, 96), device, torch.bfloat16)
    if reason := next(i for i in op.IMPLS if i.name == impl).why_not(*args, 0.5):
        pytest.skip(reason)
    runs = [forward_and_grads(lambda *a: leaky_relu2_mlp(*a, impl=impl), args, dy) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_runs_in_its_dtype_and_keeps_float32_gradients(device):
    *args, dy = inputs(((33,), 24, 40), device)
    args = [a.requires_grad_() for a in args]
    with torch.autocast(device, torch.bfloat16):
        y = leaky_relu2_mlp(*args)
    want = leaky_relu2_mlp(*(a.bfloat16() for a in args))
    assert torch.equal(y, want)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y, args, dy.bfloat16()))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device):
    *args, dy = inputs(((33,), 24, 40), device, torch.bfloat16)
    compiled = torch.compile(leaky_relu2_mlp, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    got, want = (forward_and_grads(f, args, dy) for f in (compiled, leaky_relu2_mlp))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_say_what_and_why():
    x, up, down = torch.ones(2, 4), torch.ones(6, 4), torch.ones(4, 6)
    for args, message in (
        ((x, up.T, down), r"w_up must be \[H, D=4\], got torch.float32 \[4, 6\] on cpu"),
        ((x, up, up), r"w_down must be \[D=4, H=6\], got torch.float32 \[6, 4\]"),
        ((x.long(), up, down), r"x must be floating point"),
        ((x, up.double(), down), r"w_up must be torch.float32 as x is, .*cast one or use autocast"),
    ):
        with pytest.raises(ValueError, match="leaky_relu2_mlp: " + message):
            leaky_relu2_mlp(*args)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here: .*(CUDA|bfloat16|not installed)"):
        leaky_relu2_mlp(x, up, down, impl="triton")
    with pytest.raises(ValueError, match=r"unknown impl 'cublas'"):
        leaky_relu2_mlp(x, up, down, impl="cublas")


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("access", ["tma", "even", "masked"])
@pytest.mark.parametrize("split", [False, True])
def test_triton_ways_to_read_and_write(device, access, split, monkeypatch, nan_filled_memory):
    """Each memory path and epilogue on its own, NaN in every output first; two column blocks and 17 row blocks."""
    from pgolf_kernels.ops.leaky_relu2_mlp import triton_kernel

    if access == "tma" and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    monkeypatch.setattr(triton_kernel, "_access", lambda *args: access)
    x, w_up, w_down, dy = inputs(((17 * 32,), 64, 128), device, torch.bfloat16)
    tiling = triton_kernel.Tiling(32, 64, 32, 4, 2, split, 1, True)
    a = triton_kernel.up(x, w_up, 0.5, tiling)
    dp = triton_kernel.dp(dy, w_down, a, 0.5, tiling)
    p = x.double() @ w_up.double().T
    exact_a = torch.where(p > 0, p, 0.5 * p).square()
    exact_dp = (dy.double() @ w_down.double()) * torch.where(p > 0, 2 * p, 0.5 * p)
    ulp = torch.finfo(torch.bfloat16).eps
    assert ((a.double() - exact_a).abs() <= 1.01 * ulp * exact_a + 1e-5 * p.abs() + 1e-9).all()
    assert ((dp.double() - exact_dp).abs() <= 1.1 * ulp * exact_dp.abs() + 1e-4).all()
    odd = (a.view(torch.int16) & 1).bool()
    assert torch.equal(odd[p.abs() > 1e-5], (p < 0)[p.abs() > 1e-5])


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_triton_keeps_nan_and_zero(device):
    """A NaN row stays NaN, a zero row stays exactly zero, and neither touches its neighbours."""
    x, w_up, w_down, dy = inputs(((3,), 32, 64), device, torch.bfloat16)
    x[0], x[1] = torch.nan, 0
    y, dx, *_ = forward_and_grads(lambda *a: leaky_relu2_mlp(*a, impl="triton"), (x, w_up, w_down), dy)
    assert y[0].isnan().all() and not y[1].any() and y[2].isfinite().all()
    assert dx[0].isnan().all() and not dx[1].any() and dx[2].isfinite().all()


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_triton_probe_is_within_its_bound(device):
    from pgolf_kernels.ops.leaky_relu2_mlp import triton_kernel

    ours, exact = triton_kernel.probe(torch.device(device))
    assert (ours.double() - exact).norm() <= 0.01 * exact.norm()


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_triton_registration(device):
    x, w_up, w_down, dy = inputs(((33,), 24, 40), device, torch.bfloat16)
    a = torch.ops.pgolf.leaky_relu2_mlp_triton(x, w_up, w_down, 0.5)[1]
    leaves = [t.requires_grad_() for t in (x, w_up, w_down)]
    torch.library.opcheck(torch.ops.pgolf.leaky_relu2_mlp_triton.default, (*leaves, 0.5))
    torch.library.opcheck(torch.ops.pgolf.leaky_relu2_dp_triton.default, (dy, w_down.detach(), a, 0.5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
def test_cuda_graph_replays_with_other_inputs():
    *args, dy = inputs(((256,), 64, 256), "cuda", torch.bfloat16)

    def train():
        leaves = [a.detach().requires_grad_() for a in args]
        y = leaky_relu2_mlp(*leaves, impl="triton")
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        train()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train()
    for t in (*args, dy):
        t.copy_(torch.randn_like(t))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, train(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2**31 elements need a CUDA GPU")
def test_more_than_2_to_the_31_elements():
    """The last rows of a hidden tensor whose offsets exceed int32, in the TMA path and through pointers."""
    M, D, H = 2**21 + 128, 16, 1024
    x, w_up, w_down, dy = inputs(((M,), D, H), "cuda", torch.bfloat16)
    with torch.no_grad():
        for cut in (0, 1):  # one element off a 16-byte boundary is unfit for TMA
            flat = torch.empty(M * D + cut, dtype=x.dtype, device="cuda")[cut:].view(M, D).copy_(x)
            y = leaky_relu2_mlp(flat, w_up, w_down, impl="triton")
            last = (x[-200:], w_up, w_down)
            exact = reference.forward(*(t.double() for t in last), 0.5)
            assert_as_accurate(y[-200:], reference.forward(*last, 0.5), exact, scale=exact.abs().max())


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_triton_backward_shows_the_compiler_every_product_but_the_fused_one(device):
    *args, dy = inputs(((32,), 64, 192), device, torch.bfloat16)
    with record_ops() as seen:
        forward_and_grads(lambda *a: leaky_relu2_mlp(*a, impl="triton"), args, dy)
    assert [name for name in seen if name.startswith("pgolf::") or name == "aten::mm"] == [
        "pgolf::leaky_relu2_mlp_triton",
        "pgolf::leaky_relu2_dp_triton",
        *3 * ["aten::mm"],  # dx, dw_up, dw_down
    ]
