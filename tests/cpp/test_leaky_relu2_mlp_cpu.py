"""The C++ MLP at every instruction-set level this CPU has: accuracy, memory safety, threads, kept weights.

Sizes: D = 75 and H = 139 leave a tail after panels of 32, 16 and 8 columns, and an odd depth for kernels that multiply
bfloat16 pairs; 615 rows are more than one chunk of a weight's gradient (512 or 128 rows) and an odd tail after it.
"""

import gc

import pytest
import torch
from memory import Guarded, in_child
from numerics import LEVELS, forward_and_grads

from pgolf_kernels import extension
from pgolf_kernels.ops.leaky_relu2_mlp import cpu, leaky_relu2_mlp, reference

pytestmark = pytest.mark.skipif(extension.cpu is None, reason=str(extension.WHY_NOT_CPU))
DTYPES = [torch.float32, torch.bfloat16]
M, D, H = 615, 75, 139
# (M, D, H): tails everywhere; one of everything; whole panels, blocks and chunks; one row; several pieces of D.
SHAPES = [(M, D, H), (1, 1, 1), (1024, 64, 96), (1, 40, 24), (37, 1130, 33)]


@pytest.fixture
def nan_filled_memory():
    """torch.empty and its kin return NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def nothing_kept():
    cpu.PACKED.clear()


def inputs(dtype, M=M, D=D, H=H):
    """x, w_up, w_down, dy."""
    sizes = (torch.randn(M, D), torch.randn(H, D) / D**0.5, torch.randn(D, H) / H**0.5, torch.randn(M, D))
    return tuple(t.to(dtype) for t in sizes)


def run(tensors, slope=0.5, isa="", needs=(True, True, True)):
    """y, dx, dw_up, dw_down."""
    *args, dy = tensors
    y, a = cpu.forward(*args, slope, True, isa)
    return y, *cpu.backward(dy, *args, a, slope, list(needs), isa)


def assert_accurate(dtype, shape, isa, problems=1):
    """y and every gradient: on average over some random problems, none of which the implementation may write to."""
    errors = []
    for _ in range(problems):
        tensors = inputs(dtype, *shape)
        *args, dy = tensors
        kept = [t.clone() for t in tensors]
        baseline = forward_and_grads(lambda *a: reference.forward(*a, 0.5), args, dy)
        exact = forward_and_grads(lambda *a: reference.forward(*a, 0.5), [a.double() for a in args], dy.double())
        got = run(tensors, isa=isa)
        assert torch.equal(cpu.forward(*args, 0.5, False, isa)[0], got[0])  # with kept weights, saving nothing
        assert all(torch.equal(t, k) for t, k in zip(tensors, kept, strict=True))
        assert [(g.dtype, g.shape) for g in got] == [(b.dtype, b.shape) for b in baseline]
        for found in (got, baseline):
            errors += [(f.double() - e).abs().max() / e.abs().max() for f, e in zip(found, exact, strict=True)]
    ours, theirs = torch.stack(errors).view(-1, 2, 4).mean(0)
    assert (ours <= 2 * theirs + torch.finfo(dtype).eps).all(), (ours, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_accuracy(isa, dtype, shape, nan_filled_memory):
    assert_accurate(dtype, shape, isa, problems=20 if shape[0] == 1 else 1)  # a single row may be lucky


@pytest.mark.parametrize("slope", [0.0, -0.7, 1.0])  # ReLU^2; a fold; p^2
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_what_is_saved(isa, dtype, slope):
    """a is leaky(p)^2 to 1 ulp and its last bit the sign of p, over many exponents and at 0."""
    p = torch.logspace(-9, 9, 512).repeat(2, 1) * torch.tensor([[1], [-1]])
    p[0, 0] = 0
    up, x = p.flatten()[:, None].to(dtype), torch.ones(3, 1, dtype=dtype)
    a = cpu.forward(x, up, up.T.contiguous(), slope, True, isa)[1]
    exact = torch.where(up >= 0, up.double(), slope * up.double()).square().flatten()
    bits, ulp = (torch.int16, 2**-7) if dtype == torch.bfloat16 else (torch.int32, 2**-22)
    assert torch.equal(a.view(bits) & 1, (up.flatten() < 0).to(bits).expand(3, -1))
    assert ((a.double() - exact).abs() <= 1.01 * ulp * exact + 1e-40).all()


@pytest.mark.parametrize("isa", LEVELS)
def test_more_rows_than_dp_is_kept_for(isa):
    """dp is kept for 2048 rows at a time: sums go on into the next 2048, and into a stretch of 7 rows."""
    assert_accurate(torch.bfloat16, (4103, 40, 36), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_each_gradient_alone(isa, dtype, nan_filled_memory):
    tensors = inputs(dtype)
    every = run(tensors, isa=isa)[1:]
    for i, want in enumerate(every):
        needs = [i == j for j in range(3)]
        got = run(tensors, isa=isa, needs=needs)[1:]
        assert torch.equal(got[i], want)
        assert all(g.numel() == 0 for g, need in zip(got, needs, strict=True) if not need)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_rows_and_threads_change_nothing(isa, dtype):
    """The same bits with 1, 2 and 5 threads, which cut the rows differently; y and dx also row by row."""
    tensors, before = inputs(dtype, 2500, 40, 72), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(tensors, isa=isa))
    finally:
        torch.set_num_threads(before)
    x, w_up, w_down, dy = tensors
    part = run((x[300:301], w_up, w_down, dy[300:301]), isa=isa)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(torch.equal(whole[300:301], alone) for whole, alone in zip(results[0][:2], part[:2], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_nan_stays_in_its_row_and_zero_stays_zero(isa, dtype):
    x, w_up, w_down, dy = inputs(dtype)
    x[3], x[4], dy[5], dy[6] = torch.nan, 0, torch.nan, torch.inf
    y, dx, dw_up, dw_down = run((x, w_up, w_down, dy), isa=isa)
    assert y[3].isnan().all() and not y[4].any() and y[:3].isfinite().all() and y[5:].isfinite().all()
    assert dx[3].isnan().all() and not dx[4].any() and dx[5].isnan().all() and not dx[6].isfinite().any()
    assert dx[:3].isfinite().all() and dx[7:].isfinite().all()
    assert dw_up.isnan().all() and dw_down.isnan().all()


@pytest.mark.parametrize("shape", [(0, D, H), (5, 0, H), (5, D, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(dtype, shape, nan_filled_memory):
    m, d, h = shape
    x, w_up, w_down, dy = (torch.ones(size, dtype=dtype) for size in ((m, d), (h, d), (d, h), (m, d)))
    got = run((x, w_up, w_down, dy))
    assert [t.shape for t in got] == [t.shape for t in (x, x, w_up, w_down)]
    assert not any(t.any() for t in got)
    assert torch.equal(cpu.forward(x, w_up, w_down, 0.5, False)[0], got[0])


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_touches_nothing_beyond_its_arguments(isa, dtype, at_end):
    x, w_up, w_down, dy = inputs(dtype)
    bf16 = dtype == torch.bfloat16
    outputs = x, torch.zeros(M, H, dtype=dtype), x, w_up, w_down  # y, a, dx, dw_up, dw_down

    def body():
        memory = [Guarded(t, at_end) for t in (x, w_up, w_down, dy, *outputs)]
        x_at, up_at, down_at, dy_at, y, a, dx, dw_up, dw_down = (g.address for g in memory)
        p = extension.cpu.MlpProblem(x=x_at, w_up=up_at, w_down=down_at, sizes=(M, D, H), bf16=bf16,
                                     negative_slope=0.5, threads=1, isa=isa)  # fmt: skip
        packed = torch.empty(extension.cpu.mlp_packed_bytes(H, D, bf16=bf16, isa=isa), dtype=torch.uint8)
        kept = Guarded(packed, at_end)
        extension.cpu.mlp_pack(weight=up_at, rows=H, columns=D, bf16=bf16, threads=1, isa=isa, out=kept.address)
        extension.cpu.mlp_forward(p, packed_up=kept.address, y=y, a=a)
        extension.cpu.mlp_backward(p, dy=dy_at, a=a, dx=dx, dw_up=dw_up, dw_down=dw_down)
        extension.cpu.mlp_fingerprint(x_at, x.nbytes)

    assert in_child(body) == 0


def test_unaligned_and_strided_inputs():
    """One element off any alignment, transposed weights, every second row, and the zero-stride gradient of a sum."""
    x, w_up, w_down, _ = inputs(torch.bfloat16)
    odd = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in (x, w_up, w_down)]
    strided = [torch.stack([x, x], 1).flatten(0, 1)[::2], w_up.T.contiguous().T, w_down.T.contiguous().T]

    def results(tensors):
        leaves = [t.requires_grad_() for t in tensors]
        y = leaky_relu2_mlp(*leaves, impl="cpu")
        return y.detach(), *torch.autograd.grad(y.sum(), leaves)

    want = results([x.clone(), w_up.clone(), w_down.clone()])
    for tensors in (odd, strided):
        assert all(torch.equal(a, b) for a, b in zip(results(tensors), want, strict=True))


WRITES = {
    "in place": lambda w: w.mul_(2),
    "through data": lambda w: w.data.mul_(2),
    "through numpy": lambda w: w.numpy().__imul__(2),
    "one element": lambda w: w[5, 7].add_(9),
    "another tensor": lambda w: w.set_((2 * w).untyped_storage(), 0, w.shape, w.stride()),
}


@pytest.mark.parametrize("which", [0, 1], ids=["w_up", "w_down"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_changed_weights_are_packed_again(write, which):
    x, w_up, w_down, _ = inputs(torch.float32)
    first, again = (leaky_relu2_mlp(x, w_up, w_down, impl="cpu") for _ in range(2))
    assert torch.equal(first, again) and len(cpu.PACKED) == 2
    write((w_up, w_down)[which])
    changed = leaky_relu2_mlp(x, w_up, w_down, impl="cpu")
    cpu.PACKED.clear()
    assert not torch.equal(changed, first)
    assert torch.equal(changed, leaky_relu2_mlp(x, w_up, w_down, impl="cpu"))


def test_kept_weights_keep_no_weight_alive_and_stay_in_bounds(monkeypatch):
    x, w_up, w_down, _ = inputs(torch.float32)
    for i in range(5):
        fresh = [w_up + i, w_down + i]  # often at the address of the weights before, and of version 0 as they were
        y = leaky_relu2_mlp(x, *fresh, impl="cpu")
        cpu.PACKED.clear() if i == 2 else None
        assert torch.equal(y, cpu.forward(x, *fresh, 0.5, True)[0])
    del fresh
    gc.collect()
    leaky_relu2_mlp(x, w_up, w_down, impl="cpu")
    assert len(cpu.PACKED) == 2  # those of dead weights are gone
    monkeypatch.setattr(cpu.PACKED, "capacity", cpu.PACKED.num_bytes() - 1)
    leaky_relu2_mlp(x, w_up.clone(), w_down, impl="cpu")
    assert len(cpu.PACKED) == 1


def test_kept_weights_are_for_inference_alone():
    x, w_up, w_down, dy = inputs(torch.float32)
    forward_and_grads(lambda *a: leaky_relu2_mlp(*a, impl="cpu"), (x, w_up, w_down), dy)
    assert len(cpu.PACKED) == 0
    with torch.inference_mode():
        inside = [t.clone() for t in (x, w_up, w_down)]  # no version to go by
        before = leaky_relu2_mlp(*inside, impl="cpu")
        inside[1].zero_()
        assert not leaky_relu2_mlp(*inside, impl="cpu").any() and before.any()
        assert len(cpu.PACKED) == 0
        leaky_relu2_mlp(x, w_up, w_down, impl="cpu")  # ordinary weights in inference mode have one
    assert len(cpu.PACKED) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registration(dtype):
    x, w_up, w_down, dy = inputs(dtype, 40)
    op, grad = torch.ops.pgolf.leaky_relu2_mlp_cpu.default, torch.ops.pgolf.leaky_relu2_mlp_cpu_backward.default
    leaves = [t.clone().requires_grad_() for t in (x, w_up, w_down)]
    torch.library.opcheck(op, (*leaves, 0.5, True))
    torch.library.opcheck(op, (x, w_up, w_down, 0.5, False))
    a = op(x, w_up, w_down, 0.5, True)[1]
    torch.library.opcheck(grad, (dy, x, w_up, w_down, a, 0.5, [True, False, True]))
    with pytest.raises(ValueError, match=r"must have been called with save=True"):
        op(*leaves, 0.5, False)[0].sum().backward()


def test_compiles_as_one_graph():
    *args, dy = inputs(torch.bfloat16)
    ours = lambda *a: leaky_relu2_mlp(*a, impl="cpu")  # noqa: E731
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, want = (forward_and_grads(f, args, dy) for f in (compiled, ours))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(*args), want[0])
    assert len(cpu.PACKED) == 2  # the compiled graph keeps packed weights too


def test_refusals_and_errors():
    x, w_up, w_down, _ = inputs(torch.float32)
    assert "float32 or bfloat16 on CPU tensors, got torch.float64 on cpu" in cpu.why_not(torch.float64, x, w_up, w_down)
    for dtype, least in cpu.MIN_ROWS.items():
        assert f"fewer than {least} rows of {dtype}" in cpu.why_not(dtype, x[: least - 1], w_up, w_down)
        assert cpu.why_not(dtype, x[:least], w_up, w_down) is None
    with pytest.raises(ValueError, match=r"isa must name an instruction set this CPU can run \(generic.*got 'z80'"):
        run(inputs(torch.float32), isa="z80")
