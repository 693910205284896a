"""int6: codes and scales equal the originals' to the bit, packing is a bijection, the layer is as exact as torch's.

Shapes of the linear layer: (1, 1, 1) is the least; K = 5, 6, 7 are the three tails after a group of 4 codes; (3, 17, 6)
has odd sizes in all places; (2, 7, 64, 96) has batch dimensions; (33, 512, 256) is a row block of the real model.

The Triton kernels also run under the interpreter (tests/test_triton_interpreter.py). Their K: 5 and 130 have tails, 256
is a step of 64 groups, 128 and 640 steps of 32; their rows: one, a tile's tail on both sides of 16, 32 and 64.
"""

import copy
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import DEVICES, assert_as_accurate, forward_and_grads

from pgolf_kernels import dispatch
from pgolf_kernels.ops.int6_linear import Int6Weight, gpu, int6_linear, op, quantize_int6, reference

if dispatch.TRITON_INTERPRETED:
    import triton_cpu  # noqa: F401  (corrects the interpreter's bfloat16)

GOLDEN = np.load(Path(__file__).parent.parent / "golden/int6.npz")
SETS = sorted(name.removesuffix("_W") for name in GOLDEN.files if name.endswith("_W"))
SHAPES = [(1, 1, 1), (2, 3, 5), (3, 17, 6), (4, 2, 7), (2, 7, 64, 96), (33, 512, 256)]  # (..., K, N)

TRITON_DEVICES = ["cpu"] * dispatch.TRITON_INTERPRETED + ["cuda"] * torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not TRITON_DEVICES, reason="Triton needs a CUDA GPU or TRITON_INTERPRET=1")
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs that nobody writes are NaN."""
    fresh = torch.Tensor.new_empty

    def new_empty(t, *size, **options):
        result = fresh(t, *size, **options)
        return result.fill_(torch.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def random_weight(n: int, k: int, device: str) -> Int6Weight:
    codes = torch.randint(-31, 32, (n, k), dtype=torch.int8, device=device)
    return Int6Weight.from_codes(codes, torch.rand(n, device=device).add(0.01).half())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_codes_and_scales_of_the_originals(name, dtype, device):
    """`small` lies under the floor of 1/31, `big` and `heavy` above, `rows` on both sides."""
    q = quantize_int6(torch.from_numpy(GOLDEN[f"{name}_W"]).to(device, dtype))
    np.testing.assert_array_equal(q.scale.cpu().numpy(), GOLDEN[f"{name}_scale"])
    np.testing.assert_array_equal(q.codes().cpu().numpy(), GOLDEN[f"{name}_q"])


def test_golden_sets_exercise_the_search():
    """Otherwise the test above could pass with any one quantile."""
    chosen = set()
    for name in SETS:
        w, scale = torch.from_numpy(GOLDEN[f"{name}_W"]), torch.from_numpy(GOLDEN[f"{name}_scale"])
        steps = (reference.candidate_clips(w, "search") / 31).clamp_min(1 / 31).half()
        chosen.add(next(i for i, s in enumerate(steps) if s.equal(scale)))
    assert {0, 4} <= chosen


@pytest.mark.parametrize("device", DEVICES)
def test_packing_is_a_bijection(device):
    """Every group of four codes there is: 63^4 of them."""
    codes = torch.cartesian_prod(*[torch.arange(-31, 32, dtype=torch.int8, device=device)] * 4)
    packed = reference.pack(codes)
    assert packed.shape == (63**4, 3)
    assert reference.unpack(packed, 4).equal(codes)
    word = sum((code + 32) << 6 * i for i, code in enumerate((-31, -1, 0, 31)))  # the documented layout
    one = torch.tensor([[-31, -1, 0, 31]], dtype=torch.int8, device=device)
    assert bytes(reference.pack(one).flatten().tolist()) == word.to_bytes(3, "little")


@pytest.mark.parametrize("k", range(10))
def test_tails_are_padded_with_zero_weights(k):
    w = random_weight(3, k, "cpu")
    assert w.packed.shape == (3, 3 * ((k + 3) // 4))
    assert not reference.unpack(w.packed, 4 * ((k + 3) // 4))[:, k:].any()
    assert w.codes().shape == (3, k)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 2, 160, 512, 1536, 5000])
def test_row_quantiles_are_torchs(k, dtype, device, monkeypatch):
    w = torch.randn(37, k, dtype=dtype, device=device)
    expected = torch.stack([torch.quantile(w.abs(), q, dim=1) for q in reference.QUANTILES])
    for block in (reference.BLOCK_ELEMENTS, 10 * k):  # in one piece, in blocks of 10 rows
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", block)
        torch.testing.assert_close(reference.row_quantiles(w, reference.QUANTILES), expected, rtol=0, atol=0)


def test_row_quantiles_beyond_torchs_limit():
    w = torch.arange(2**24 + 2, -1, -1, dtype=torch.float64)[None]  # torch.quantile refuses more than 2^24 elements
    got = reference.row_quantiles(w, (0.999, 1.0)).flatten()
    assert got.tolist() == [0.999 * (2**24 + 2), 2**24 + 2]


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_search_minimises_the_error_of_the_whole_matrix(block, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", block)
    for scale in (0.1, 1.0, 30.0):
        w = scale * torch.distributions.StudentT(3.0).sample((11, 700))

        def error(step, w=w):
            codes = (w / step[:, None].float()).round().clamp(-31, 31)
            return (w.double() - codes.double() * step[:, None].double()).square().sum().item()

        steps = [(torch.quantile(w.abs(), q, dim=1) / 31).clamp_min(1 / 31).half() for q in reference.QUANTILES]
        q = quantize_int6(w)
        assert any(q.scale.equal(s) for s in steps)
        assert error(q.scale) <= min(map(error, steps)) * (1 + 1e-6)
        torch.testing.assert_close(q.dequantize(), (w / q.scale[:, None]).round().clamp(-31, 31) * q.scale[:, None])


@pytest.mark.parametrize("device", DEVICES)
def test_scale_rules(device):
    w = torch.tensor([[0.25, -0.9], [3.1, -62.0], [0.0, 0.0]], device=device)
    floor = torch.tensor(1 / 31).half().item()
    assert quantize_int6(w, "max").scale.tolist() == [floor, 2.0, floor]
    assert quantize_int6(w, "max").codes().tolist() == [[8, -28], [2, -31], [0, 0]]
    smallest = 2.0**-24
    assert quantize_int6(w, "max", floor=0).scale.tolist() == [torch.tensor(0.9 / 31).half().item(), 2.0, smallest]
    assert quantize_int6(w, 12.5).scale.tolist() == [(12.5 * r.std() / 31).half().item() or smallest for r in w]
    assert quantize_int6(w, 12.5, floor=3.0).scale.tolist()[::2] == [3.0, 3.0]
    assert quantize_int6(w[:, :1], 12.5).scale.tolist() == [smallest] * 3  # one value has no deviation
    assert not quantize_int6(w, 12.5).codes()[2].any()


def test_halves_round_to_even():
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 31.0, 30.5]])
    assert quantize_int6(w, "max").codes().tolist() == [[0, 2, 2, 0, -2, -2, 31, 30]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_weights_are_quantised_in_float32(dtype):
    w = torch.randn(5, 300).to(dtype)
    a, b = quantize_int6(w), quantize_int6(w.float())
    assert a.codes().equal(b.codes())
    assert a.scale.equal(b.scale)


@pytest.mark.parametrize("impl", [i.name for i in op.IMPLS])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype, device, impl):
    *batch, k, n = shape
    weight = random_weight(n, k, device)
    x, bias, dy = (torch.randn(s, device=device).to(dtype) for s in ((*batch, k), (n,), (*batch, n)))
    chosen = next(i for i in op.IMPLS if i.name == impl)
    if reason := chosen.why_not(x, weight.packed, weight.scale, bias):
        pytest.skip(reason)

    w = weight.codes().double() * weight.scale.double()[:, None]
    ours = forward_and_grads(lambda x, b: int6_linear(x, weight, b, impl=impl), (x, bias), dy)
    baseline = forward_and_grads(lambda x, b: F.linear(x, w.to(dtype), b), (x, bias), dy)
    exact = forward_and_grads(lambda x, b: F.linear(x, w, b), (x.double(), bias.double()), dy.double())
    terms = (x.double().abs() @ w.abs().T, dy.double().abs() @ w.abs(), dy.double().abs().sum())
    for got, torchs, truth, scale in zip(ours, baseline, exact, terms, strict=True):
        assert_as_accurate(got, torchs, truth, scale=scale.max().item())


@pytest.mark.parametrize("impl", ["auto", *(i.name for i in op.IMPLS)])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)], ids=str)
def test_empty(sizes, device, impl):
    m, n, k = sizes
    w = torch.randn(n, k)
    for clip in ("search", "max", 12.0):
        weight = Int6Weight.from_bytes(quantize_int6(w, clip).to_bytes()).to(device)
        x, bias = torch.randn(m, k, device=device), torch.ones(n, device=device)
        for chosen in op.IMPLS:
            if chosen.name == impl and (reason := chosen.why_not(x, weight.packed, weight.scale, bias)):
                pytest.skip(reason)
        y = int6_linear(x, weight, bias, impl=impl)
        assert y.equal(torch.ones(m, n, device=device) if k == 0 else y)
        assert y.shape == (m, n)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_autocast_and_compile(device):
    weight, x = random_weight(12, 10, device), torch.randn(10, 6, device=device).T  # x is not contiguous
    expected = int6_linear(x, weight)
    torch.testing.assert_close(expected, F.linear(x.contiguous(), weight.dequantize()))
    with torch.autocast(device, torch.bfloat16):
        assert int6_linear(x, weight).dtype == torch.bfloat16
    compiled = torch.compile(lambda x: int6_linear(x, weight), fullgraph=True, backend="aot_eager")
    assert compiled(x).equal(expected)


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *NARROW], ids=str)
def test_triton_dequantises_every_code_to_the_bit(dtype, device, poisoned):
    """Code 0 (-32), which no quantiser writes, is decoded all the same."""
    for n, k in ((1, 1), (5, 7), (64, 140), (3, 513), (9, 1030)):
        codes = ((torch.arange(n)[:, None] + 7 * torch.arange(k)) % 64 - 32).to(torch.int8)
        packed, scale = reference.pack(codes).to(device), torch.rand(n, device=device).add(0.01).half()
        w = gpu.dequantize_by_triton(packed, scale, k, dtype)
        assert w.equal(reference.dequantize(packed, scale, k, dtype))
        part = gpu.dequantize_by_triton(packed[1:], scale[1:], k, dtype) if n > 1 else w[1:]
        assert part.equal(w[1:])


@needs_triton
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 64, 65])
@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_triton_linear(dtype, device, rows, poisoned):
    shapes = [(33, 130), (1, 1), (17, 5), (16, 256), (40, 640)]
    if device == "cpu" and rows not in (1, 17):  # the interpreter takes a second a shape
        shapes = shapes[:1]
    for n, k in shapes:
        weight, bias = random_weight(n, k, device), torch.randn(n, device=device).to(dtype)
        x, w = torch.randn(rows, k, device=device).to(dtype), weight.dequantize(torch.float64)
        exact, scale = F.linear(x.double(), w, bias.double()), (x.double().abs() @ w.abs().T).max().item() + 4
        for way in ("triton", "dequantize"):
            y = int6_linear(x, weight, bias, impl=way)
            assert_as_accurate(y, F.linear(x, w.to(dtype), bias), exact, scale=scale)
            assert int6_linear(x, weight, bias, impl=way).equal(y)
        stretched = torch.stack([x.T, x.T], 2)[..., 0].T
        assert int6_linear(stretched, weight, bias, impl="triton").equal(int6_linear(x, weight, bias, impl="triton"))


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_triton_probe_is_within_its_bound(device):
    ours, exact = gpu._probe(torch.device(device))
    assert (ours.double() - exact).norm() <= 0.01 * exact.norm()


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_triton_wide_tiles_and_rows_apart(device):
    """Enough rows of the weight for tiles of 32; rows of infinities and NaN stay among themselves."""
    weight, x = random_weight(4100, 6, device), torch.randn(20, 6, device=device).bfloat16()
    want = int6_linear(x, weight, impl="triton")
    torch.testing.assert_close(want, int6_linear(x, weight, impl="reference"), rtol=0.02, atol=0.5)
    for value in (torch.nan, torch.inf):
        other = x.clone()
        other[10, 3] = value
        y, keep = int6_linear(other, weight, impl="triton"), torch.arange(20, device=device) != 10
        assert y[keep].equal(want[keep]) and not y[10].isfinite().any()


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_triton_ops_are_registered(device):
    weight = random_weight(12, 10, device)
    x, bias = (torch.randn(s, device=device).half().requires_grad_() for s in ((3, 10), (12,)))
    for b in (bias, None):
        torch.library.opcheck(torch.ops.pgolf.int6_linear_triton.default, (x, weight.packed, weight.scale, b))
    torch.library.opcheck(torch.ops.pgolf.int6_dequantize.default, (weight.packed, weight.scale, 10, torch.float32))
    for way in ("triton", "dequantize"):

        def run(x, bias, way=way):
            return int6_linear(x, weight, bias, impl=way)

        want = run(x.detach(), bias.detach())
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert run(x, bias).equal(want) and compiled(x, bias).equal(want)
        with torch.autocast(device, torch.bfloat16):
            y = run(x.detach().float(), bias.detach().float())
        assert y.equal(run(x.detach().float().bfloat16(), bias.detach().float().bfloat16()))


@pytest.mark.parametrize("device", DEVICES)
def test_bytes_round_trip(device):
    for n, k in ((1, 1), (3, 5), (40, 160)):
        weight = random_weight(n, k, device)
        data = weight.to_bytes()
        read = Int6Weight.from_bytes(data)
        assert read.shape == (n, k)
        assert read.packed.equal(weight.packed.cpu())
        assert read.scale.equal(weight.scale.cpu())
        assert data == Int6Weight.from_bytes(data).to(device).to_bytes()
        assert weight.nbytes == len(data) - 28 == 2 * n + 3 * n * ((k + 3) // 4)


def test_every_changed_or_missing_byte_is_refused():
    data = random_weight(3, 5, "cpu").to_bytes()
    for i, bit in itertools.product(range(len(data)), range(8)):
        with pytest.raises(ValueError, match=r"Int6Weight\.from_bytes: .* got "):
            Int6Weight.from_bytes(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :])
    for end in range(len(data)):
        with pytest.raises(ValueError, match=r"Int6Weight\.from_bytes: .* got "):
            Int6Weight.from_bytes(data[:end])
    with pytest.raises(ValueError, match="must take"):
        Int6Weight.from_bytes(data + b"\0")


def test_well_formed_bytes_with_impossible_content_are_refused():
    good = random_weight(1, 5, "cpu")
    for packed, message in ((0, r"codes must lie in -31\.\.31"), (65, "must be 0")):
        with pytest.raises(ValueError, match=message):
            Int6Weight.from_bytes(Int6Weight(torch.full_like(good.packed, packed), good.scale, (1, 5)).to_bytes())
    for scale in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(ValueError, match="scale must be positive, finite float16"):
            Int6Weight.from_bytes(Int6Weight(good.packed, torch.full_like(good.scale, scale), (1, 5)).to_bytes())


def test_copies_and_pickling():
    weight = random_weight(3, 5, "cpu")
    deep = copy.deepcopy(weight)
    assert deep.packed.equal(weight.packed)
    assert deep.packed.data_ptr() != weight.packed.data_ptr()
    assert copy.copy(weight) is weight
    with pytest.raises(TypeError, match=r"use to_bytes\(\) and from_bytes\(\)"):
        pickle.dumps(weight)
    assert repr(weight) == "Int6Weight(shape=(3, 5), nbytes=24, device='cpu')"


def test_quantising_twice_gives_the_same_bytes():
    w = torch.randn(64, 333)
    before = w.clone()
    assert quantize_int6(w).to_bytes() == quantize_int6(w).to_bytes()
    assert w.equal(before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_int6(torch.ones(3)), r"w must be a floating-point matrix \[N, K\], got torch.float32 \(3,\)"),
        (lambda: quantize_int6(torch.ones(3, 3).int()), r"got torch.int32 \(3, 3\)"),
        (lambda: quantize_int6(torch.tensor([[1.0, float("nan")]])), "w must be finite, got NaN or infinity"),
        (lambda: quantize_int6(torch.tensor([[1.0, float("inf")]])), "w must be finite"),
        (lambda: quantize_int6(torch.tensor([[1e7]])), r"every scale must fit float16 \(65504\)"),
        (lambda: quantize_int6(torch.ones(2, 2), "mean"), "clip must be 'search', 'max' or a number, got 'mean'"),
        (lambda: quantize_int6(torch.ones(2, 2), 0.0), "above 0, got 0.0"),
        (lambda: quantize_int6(torch.ones(2, 2), float("nan")), "clip must be a finite number"),
        (lambda: quantize_int6(torch.ones(2, 2), floor=-1.0), "floor must lie in 0..65504"),
        (lambda: int6_linear(torch.ones(2, 3), torch.ones(2, 3)), "weight must be an Int6Weight"),
        (
            lambda: int6_linear(torch.ones(2, 4), random_weight(2, 3, "cpu")),
            r"x must end in K = 3 features, got .* \(2, 4\)",
        ),
        (lambda: int6_linear(torch.ones(2, 3).int(), random_weight(2, 3, "cpu")), "x must be a floating-point tensor"),
        (lambda: int6_linear(torch.ones(2, 3), random_weight(2, 3, "cpu"), torch.ones(3)), r"bias must be .* \[2\]"),
        (lambda: int6_linear(torch.ones(2, 3), random_weight(2, 3, "cpu"), impl="marlin"), "unknown impl 'marlin'"),
        (
            lambda: Int6Weight.from_codes(torch.tensor([[32]]).to(torch.int8), torch.ones(1).half()),
            r"codes must lie in",
        ),
        (lambda: Int6Weight.from_codes(torch.ones(1, 1), torch.ones(1).half()), "codes must be int8"),
        (lambda: Int6Weight(torch.ones(1, 4).byte(), torch.ones(1).half(), (1, 4)), r"uint8 tensor \[1, 3\]"),
        (lambda: Int6Weight(torch.ones(1, 3).byte(), torch.ones(2).half(), (1, 4)), r"scale must be float16 \[1\]"),
    ],
)
def test_errors_say_what_and_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_forced_implementation_is_the_one_that_runs():
    """Calls of one row take a shorter way than the other ops' choice, and must not pass it by."""
    weight = quantize_int6(torch.randn(8, 16))
    with dispatch.forced("reference"):
        int6_linear(torch.randn(1, 16), weight)
    assert dispatch.CHOSEN["int6_linear"] == "reference"
