"""The C++ int6_linear at every instruction-set level this CPU has: accuracy, exact codes, memory safety, threads.

What runs is decided by M, so M takes both sides of every border: 2, 3 and 4, 5 (bytes, then dots), 12, 13 (one group of
dots, two), 8, 9 and 24, 25 (the product), 16, 17 and 33 (whole and half panels of it), 128, 129 (x on the left).
"""

import pytest
import torch
import torch.nn.functional as F
from memory import Guarded, in_child
from numerics import LEVELS, assert_as_accurate

from pgolf_kernels import extension
from pgolf_kernels.ops.int6_linear import Int6Weight, cpu, int6_linear, op, quantize_int6, reference

pytestmark = pytest.mark.skipif(extension.cpu is None, reason=str(extension.WHY_NOT_CPU))
DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 24, 25, 33, 128, 129]
# (N, K): the least; tails of a group of 4 codes, of a chunk of 64 and of a pair of bfloat16; a second piece of 48
# weight rows, with a tail; a second chunk of the product's depth, and of the generic dots'.
SIZES = [(1, 1), (3, 5), (17, 63), (21, 66), (70, 130), (9, 1100)]


def make(m, n, k, dtype, bias=True):
    codes = torch.randint(-31, 32, (n, k), dtype=torch.int8)
    weight = Int6Weight.from_codes(codes, torch.rand(n).add(0.01).half())
    return torch.randn(m, k).to(dtype), weight, torch.randn(n).to(dtype) if bias else None


def forward(x, weight, bias=None, isa=""):
    return cpu.forward(x, weight.packed, weight.scale, bias, isa)


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs that nobody writes are NaN."""
    fresh = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *size, **kw: fresh(t, *size, **kw).fill_(torch.nan))


def results(x, weight, bias, isa):
    """Ours, torch's and the exact result, and the largest magnitude added on the way."""
    w = weight.dequantize(torch.float64)
    exact = F.linear(x.double(), w, None if bias is None else bias.double())
    largest = (x.double().abs() @ w.abs().T).max().item()
    scale = largest + (0 if bias is None else bias.abs().max().item())  # the sum is rounded at its own size
    return forward(x, weight, bias, isa), F.linear(x, w.to(x.dtype), bias), exact, scale


def check(x, weight, bias, isa):
    *tensors, scale = results(x, weight, bias, isa)
    assert_as_accurate(*tensors, scale=scale, factor=2.0)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_forward(isa, dtype, rows, poisoned):
    for n, k in SIZES:
        # Several draws as one: of a few outputs torch's may all be exact by luck.
        *drawn, scales = zip(*(results(*make(rows, n, k, dtype, bias=n != 17), isa) for _ in range(6)), strict=True)
        assert_as_accurate(*map(torch.stack, drawn), scale=max(scales))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_error_is_torchs_on_average(isa, dtype):
    """The largest error may hide a lost bit behind the output's rounding; the mean square does not. Deep, and cold to
    chance: 512 outputs of 4200 products."""
    for rows in (1, 4, 8, 16, 32, 130):
        x, weight, _ = make(rows, 512 // rows + 1, 4200, dtype)
        w = weight.dequantize(torch.float64)
        exact = x.double() @ w.T
        ours, torchs = ((y.double() - exact).norm() for y in (forward(x, weight, None, isa), F.linear(x, w.to(dtype))))
        assert ours <= 1.5 * torchs, (rows, ours / torchs)


@pytest.mark.parametrize("isa", LEVELS)
def test_narrow_weight(isa):
    """Of a weight of a few rows PyTorch sums each output in lanes, the product one term after the other: 1.6 times its
    error in the mean square, too near twice for the largest of a few outputs."""
    drawn = [results(*make(24, 5, 66, torch.float32), isa) for _ in range(100)]
    ours, torchs = (sum((d[i].double() - d[2]).square().sum() for d in drawn).sqrt() for i in (0, 1))
    assert ours <= 2 * torchs, ours / torchs


@pytest.mark.parametrize("outlier", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("isa", LEVELS)
def test_outliers_of_x(isa, outlier):
    """Bytes share one step per row of x, which one large value widens."""
    for rows in (1, 2, 4):
        x, weight, bias = make(rows, 200, 512, torch.bfloat16)
        x[:, 7] *= outlier
        check(x, weight, bias, isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_every_code_in_every_place(isa, dtype):
    """Unit vectors read the weights out. Code 0 (-32), which no quantiser writes, is decoded all the same."""
    k = 140  # two chunks and a tail
    codes = ((torch.arange(64)[:, None] + 7 * torch.arange(k)) % 64 - 32).to(torch.int8)
    weight, units = Int6Weight(reference.pack(codes), torch.ones(64).half(), (64, k)), torch.eye(k, dtype=dtype)
    for rows in (1, 2, 4, 8, 16, 30, k):
        y = torch.cat([forward(x, weight, None, isa) for x in units.split(rows)])
        assert y.equal(codes.T.to(dtype)), rows


@pytest.mark.parametrize("clip", ["search", "max", 3.0])
@pytest.mark.parametrize("isa", LEVELS)
def test_reads_what_quantize_wrote(isa, clip):
    weight = quantize_int6(torch.randn(70, 66) * torch.logspace(-3, 3, 70)[:, None], clip, floor=0)
    # Bytes round x, so few rows of bfloat16 would read the weights within a rounding only.
    for dtype, rows in ((torch.float32, 1), (torch.float32, 64), (torch.bfloat16, 8), (torch.bfloat16, 64)):
        y = torch.cat([forward(x, weight, None, isa) for x in torch.eye(66, dtype=dtype)[:64].split(rows)])
        assert y.equal(weight.dequantize(dtype).T[:64])


def test_scales_of_every_size():
    """Every positive float16 there is, 31743 of them, subnormal ones too, at each level."""
    scale = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    weight = Int6Weight.from_codes(torch.ones(len(scale), 1, dtype=torch.int8), scale)
    for isa in LEVELS:
        assert forward(torch.ones(1, 1), weight, None, isa).equal(scale.float()[None]), isa


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 13, 30, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_rows_do_not_see_each_other(isa, dtype, rows):
    """Not even rows of infinities and NaN, which have no step to share between their bytes."""
    x, weight, bias = make(rows, 70, 130, dtype)
    before = forward(x, weight, bias, isa)
    for value in (torch.nan, torch.inf, 1e35, 1e-35, 0.0):
        other = x.clone()
        other[rows // 2] = 0
        other[rows // 2, 40] = value
        got, want = forward(other, weight, bias, isa), F.linear(other, weight.dequantize(dtype), bias)
        torch.testing.assert_close(got[rows // 2], want[rows // 2], equal_nan=True, rtol=0.01, atol=0.01)
        keep = torch.arange(rows) != rows // 2
        assert got[keep].equal(before[keep])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1536, 512), (4, 1536, 512), (20, 500, 512), (40, 500, 512), (200, 130, 300)], ids=str
)
def test_threads_change_nothing(sizes, dtype):
    """Sizes at which a second thread is used."""
    x, weight, bias = make(*sizes, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(forward(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_touches_nothing_beyond_its_arguments(isa, dtype, at_end):
    cases = [(make(m, n, k, dtype), m, n, k) for m in ROWS for n, k in SIZES]

    def run():
        for (x, weight, bias), m, n, k in cases:
            y = torch.empty(m, n, dtype=dtype)
            memory = [Guarded(t, at_end) for t in (x, weight.packed, weight.scale, bias, y)]
            x, packed, scale, b, y = (g.address for g in memory)
            extension.cpu.int6_linear(x, packed, weight.packed.numel(), scale, b, y, m, n, k,
                                      dtype == torch.bfloat16, 1, isa)  # fmt: skip

    assert in_child(run) == 0


@pytest.mark.parametrize("rows", [1, 4, 9, 30, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_odd_addresses(dtype, rows):
    x, weight, bias = make(rows, 70, 130, dtype)
    want = forward(x, weight, bias)
    stretched = torch.stack([x.T, x.T], 2)[..., 0].T  # neither rows nor columns are neighbours
    shifted = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8)[1:].view(weight.packed.shape)
    scale, b = (torch.stack([t, t], 1)[:, 0] for t in (weight.scale, bias))
    view = Int6Weight(shifted.copy_(weight.packed), scale, weight.shape)
    assert not stretched.is_contiguous()
    assert forward(stretched, view, b).equal(want)
    assert forward(x.view(rows, 1, 130), weight, bias).equal(want.view(rows, 1, 70))


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (9, 3, 0), (200, 3, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_empty(isa, sizes):
    m, n, k = sizes
    for dtype in DTYPES:
        x, weight, bias = make(m, n, k, dtype)
        assert forward(x, weight, bias, isa).equal(bias.expand(m, n) if k == 0 else torch.empty(m, n, dtype=dtype))


def test_registered_op():
    x, weight, bias = make(3, 12, 10, torch.float32)
    x.requires_grad_(), bias.requires_grad_()
    for b in (bias, None):
        torch.library.opcheck(torch.ops.pgolf.int6_linear_cpu.default, (x, weight.packed, weight.scale, b))


def test_straight_call_and_registered_op_agree():
    """With a gradient, compiled or under a mode the call goes through the registered op."""
    x, weight, bias = make(3, 12, 10, torch.float32)
    want = int6_linear(x, weight, bias, impl="cpu")
    assert int6_linear(x.clone().requires_grad_(), weight, bias, impl="cpu").equal(want)
    assert int6_linear(x, weight, bias.clone().requires_grad_(), impl="cpu").requires_grad
    compiled = torch.compile(lambda x: int6_linear(x, weight, bias), fullgraph=True, backend="aot_eager")
    assert compiled(x).equal(want)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: int6_linear(x, weight, bias))(x)
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [
        torch.ops.pgolf.int6_linear_cpu.default
    ]
    with torch.no_grad(), torch.device("meta"):
        assert int6_linear(x, weight, bias).equal(want)


def test_transforms_run_the_reference():
    """A registered op has no tangents and would drop x's."""
    x, weight, _ = make(3, 12, 10, torch.float32)
    y, dy = torch.func.jvp(lambda x: int6_linear(x, weight), (x,), (2 * x,))
    torch.testing.assert_close(dy, 2 * y)
    dx = torch.func.grad(lambda x: int6_linear(x, weight).sum())(x)
    torch.testing.assert_close(dx, weight.dequantize().sum(0).expand(3, 10))
    torch.testing.assert_close(torch.func.vmap(lambda row: int6_linear(row, weight))(x), y)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="no rule for forward-mode"):
        int6_linear(x, weight, impl="cpu")


def test_autocast_decides_the_dtype():
    x, weight, bias = make(3, 12, 10, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = int6_linear(x, weight, bias, impl="cpu")
        assert int6_linear(x.double(), weight, bias.double()).dtype == torch.float64
    assert y.equal(int6_linear(x.bfloat16(), weight, bias.bfloat16(), impl="cpu"))
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="got torch.float32 on cpu in .*float16"):
        int6_linear(x, weight, bias, impl="cpu")


def test_errors():
    x, weight, _ = make(3, 12, 10, torch.float32)
    with pytest.raises(ValueError, match=r"isa must name an instruction set this CPU can run \(generic.*got 'z80'"):
        forward(x, weight, isa="z80")
    with pytest.raises(ValueError, match=r"packed must have .* = 108 bytes for N = 12 and K = 9, got 109"):
        extension.cpu.int6_linear(0, 0, 109, 0, 0, 0, 3, 12, 9, False, 1, "")
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match="needs CPU tensors and a product in float32 or bfloat16, got torch.float"):
            int6_linear(x.to(dtype), weight, impl="cpu")
    assert op.IMPLS[0].why_not(x, weight.packed, weight.scale, None) is None
