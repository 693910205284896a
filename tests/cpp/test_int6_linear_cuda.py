"""The CUDA int6_linear: on a GPU, and everywhere its source built for the CPU (csrc/common/cuda_emulation.h).

Numbers of rows: 1, 8 and 9 (half a tile of 16, whole ones), 15, 16 and 17 (a second block), 64, 65. (N, K): the least;
odd ones; K = 32 and 160, whole pieces of a lane, in the first and second chunk of 128; 129 and 500, neither; 1100, more
chunks than warps; 24 x 1536 and 16 x 512 of the model; 1033 rows, more than which tiles are twice as wide.
"""

import re
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from cuda_cpu import ROOT, emulated_module
from memory import Guarded, in_child
from numerics import assert_as_accurate
from torch._subclasses.fake_tensor import FakeTensorMode

from pgolf_kernels import extension, tiles
from pgolf_kernels.nn import Int6Linear
from pgolf_kernels.ops.int6_linear import Int6Weight, gpu, int6_linear, op, quantize_int6, reference

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 2, 3, 8, 9, 15, 16, 17, 64, 65]
SIZES = [(1, 1), (3, 5), (17, 63), (9, 32), (8, 160), (10, 129), (7, 500), (5, 1100), (24, 1536), (16, 512)]


@pytest.fixture(params=["cpu", *["cuda"] * GPU])
def device(request, monkeypatch):
    """Where the kernel runs; on "cpu" the emulation takes the place of the extension."""
    if request.param == "cpu":
        monkeypatch.setattr(extension, "cuda", emulated_module())
    elif extension.WHY_NOT_CUDA:
        pytest.skip(extension.WHY_NOT_CUDA)
    return request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs that nobody writes are NaN."""
    fresh = torch.Tensor.new_empty

    def new_empty(t, *size, **options):
        result = fresh(t, *size, **options)
        return result.fill_(torch.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def make(m, n, k, dtype, device, bias=True):
    codes = torch.randint(-31, 32, (n, k), dtype=torch.int8)
    weight = Int6Weight.from_codes(codes, torch.rand(n).add(0.01).half()).to(device)
    x, b = torch.randn(m, k).to(device, dtype), torch.randn(n).to(device, dtype)
    return x, weight, b if bias else None


def forward(x, weight, bias=None):
    return gpu.forward(x, weight.packed, weight.scale, bias)


def check(x, weight, bias):
    w = weight.dequantize(torch.float64)
    exact = F.linear(x.double(), w, None if bias is None else bias.double())
    largest = (x.double().abs() @ w.abs().T).max().item()
    baseline = F.linear(x, w.to(x.dtype), bias)
    assert_as_accurate(forward(x, weight, bias), baseline, exact, scale=largest + (bias is not None) * 4)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(device, dtype, rows, poisoned):
    for n, k in SIZES:
        check(*make(rows, n, k, dtype, device, bias=n != 17))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_tiles(device, dtype, poisoned):
    """Many rows of the weight, few and many of x; a tile's tail."""
    for rows, n, k in ((8, 1033, 32), (16, 1033, 160), (17, 1033, 32), (16, 1033, 31)):
        check(*make(rows, n, k, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_torchs_on_average(device, dtype):
    """The largest error may hide a lost bit behind the output's rounding; the mean square does not."""
    x, weight, _ = make(16, 40, 4224, dtype, device)
    w = weight.dequantize(torch.float64)
    exact = x.double() @ w.T
    ours, torchs = ((y.double() - exact).norm() for y in (forward(x, weight), F.linear(x, w.to(dtype))))
    assert ours <= 1.5 * torchs, ours / torchs


@pytest.mark.parametrize("k", [128, 140])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_in_every_place(device, dtype, k):
    """Unit vectors read the weights out. Code 0 (-32), which no quantiser writes, is decoded all the same."""
    codes = ((torch.arange(64)[:, None] + 7 * torch.arange(k)) % 64 - 32).to(torch.int8)
    weight = Int6Weight(reference.pack(codes), torch.ones(64).half(), (64, k)).to(device)
    units = torch.eye(k, dtype=dtype, device=device)
    for rows in (8, 16, k):
        y = torch.cat([forward(x, weight) for x in units.split(rows)])
        assert y.equal(codes.T.to(device, dtype)), rows


def test_reads_what_quantize_wrote(device):
    weight = quantize_int6(torch.randn(70, 66) * torch.logspace(-3, 3, 70)[:, None], floor=0).to(device)
    for dtype in DTYPES:
        y = forward(torch.eye(66, dtype=dtype, device=device), weight)
        assert y.equal(weight.dequantize(dtype).T)


def test_scales_of_every_size(device):
    """Every positive float16 there is, 31743 of them, subnormal ones too."""
    scale = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    weight = Int6Weight.from_codes(torch.ones(len(scale), 1, dtype=torch.int8), scale).to(device)
    assert forward(torch.ones(1, 1, device=device), weight).equal(weight.scale.float()[None])


def test_float32_keeps_all_its_bits(device):
    """Three bfloat16 hold a float32: one product is exact, whatever the bits and the exponent."""
    x = torch.randint(-(2**31), 2**31 - 1, (400, 1), dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.where(x.isfinite() & (x.abs() > 1e-30) & (x.abs() < 1e36), x, 1 / 3).to(device)
    weight = Int6Weight.from_codes(torch.tensor([[1], [-2], [16]], dtype=torch.int8), torch.ones(3).half()).to(device)
    assert forward(x, weight).equal(torch.cat([x, -2 * x, 16 * x], 1))


@pytest.mark.parametrize("k", [128, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_see_each_other(device, dtype, k):
    """Not even rows of infinities and NaN, be it one in its lowest bits only."""
    x, weight, bias = make(21, 20, k, dtype, device)
    before = forward(x, weight, bias)
    for value in (torch.nan, torch.inf, -torch.inf, 6e4, 1e-7):
        other = x.clone()
        other[10] = 0
        other[10, 40] = value
        got, want = forward(other, weight, bias), F.linear(other, weight.dequantize(dtype), bias)
        torch.testing.assert_close(got[10], want[10], equal_nan=True, rtol=0.01, atol=0.01)
        keep = torch.arange(21) != 10
        assert got[keep].equal(before[keep])
    if dtype == torch.float32:
        other[10, 40] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
        assert forward(other, weight, bias)[10].isnan().all()


@pytest.mark.parametrize("size", [(20, 160), (1033, 160), (20, 130), (5, 1100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(device, dtype, size):
    x, weight, bias = make(33, *size, dtype, device)
    whole = forward(x, weight, bias)
    assert forward(x, weight, bias).equal(whole)
    for first, last in ((0, 1), (5, 8), (3, 12), (0, 16), (16, 33)):
        assert forward(x[first:last], weight, bias).equal(whole[first:last])


def test_views_and_odd_addresses(device):
    """A slice of rows starts at any byte, and then neither codes nor x can be read in large words."""
    for dtype in DTYPES:
        for n, k in ((20, 130), (20, 160)):
            x, weight, bias = make(9, n, k, dtype, device)
            want = forward(x, weight, bias)
            stretched = torch.stack([x.T, x.T], 2)[..., 0].T  # neither rows nor columns are neighbours
            scale, b = (torch.stack([t, t], 1)[:, 0] for t in (weight.scale, bias))
            assert not stretched.is_contiguous()
            for shift in (1, 2, 3, 4):
                memory = torch.empty(weight.packed.numel() + shift, dtype=torch.uint8, device=device)
                shifted = memory[shift:].view(weight.packed.shape).copy_(weight.packed)
                assert forward(stretched, Int6Weight(shifted, scale, weight.shape), b).equal(want)
            odd = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].view(x.shape).copy_(x)
            assert forward(odd, weight, bias).equal(want)
            part = Int6Weight(weight.packed[3:], weight.scale[3:], (n - 3, k))
            assert forward(x, part, bias[3:]).equal(want[:, 3:])
            assert forward(x.view(3, 3, k), weight, bias).equal(want.view(3, 3, n))


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_touches_nothing_beyond_its_arguments(at_end):
    """Under the emulation, with pages around each argument that no one may touch."""
    module = emulated_module()
    cases = [(make(m, n, k, dtype, "cpu"), m, n, k) for m in (1, 9, 17) for n, k in SIZES for dtype in DTYPES]
    cases += [(make(16, 1033, 32, dtype, "cpu"), 16, 1033, 32) for dtype in DTYPES]

    def run():
        for (x, weight, bias), m, n, k in cases:
            y = torch.empty(m, n, dtype=x.dtype)
            memory = [Guarded(t, at_end) for t in (x, weight.packed, weight.scale, bias, y)]
            x_at, packed, scale, b, y_at = (g.address for g in memory)
            dtype = gpu._DTYPES[x.dtype]
            module.int6_linear(x_at, packed, weight.packed.numel(), scale, b, y_at, m, n, k, dtype, 0, 0)

    assert in_child(run) == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_under_address_sanitizer(tmp_path):
    program = tmp_path / "int6_linear_cuda_test"
    flags = "-std=c++17 -O0 -g1 -U_FORTIFY_SOURCE -fno-strict-aliasing -Wall -Wextra -Werror -Wno-unknown-pragmas"
    # The fibers' stacks are none that the sanitizer knows, so it watches the heap and the globals only.
    flags += f" -DPGOLF_EMULATE_CUDA -fsanitize=address --param=asan-stack=0 -I{ROOT / 'csrc'}"
    source = ROOT / "tests/cpp/int6_linear_cuda_test.cpp"
    subprocess.run(["g++", *flags.split(), str(source), "-o", str(program)], check=True)
    run = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout == "done\n", run.stdout + run.stderr


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)], ids=str)
def test_empty(device, sizes):
    m, n, k = sizes
    for dtype in DTYPES:
        x, weight, bias = make(m, n, k, dtype, device)
        want = torch.empty(m, n, dtype=dtype, device=device)
        assert forward(x, weight, bias).equal(bias.expand(m, n) if k == 0 else want)
        assert forward(x, weight).equal(torch.zeros_like(want) if k == 0 else want)


@pytest.fixture
def registered(device, monkeypatch):
    """The op runs where `device` is; on "cpu" it is given to CPU tensors, and "auto" takes it there."""
    if device == "cuda":
        yield device
        return
    monkeypatch.setattr(extension, "WHY_NOT_CUDA", None)
    monkeypatch.setattr(gpu, "why_not_cuda", lambda *args: None)
    with torch.library._scoped_library("pgolf", "IMPL") as library:
        library.impl("int6_linear_cuda", gpu.forward, "CPU")
        yield device


def test_registered_op(registered):
    x, weight, bias = make(3, 12, 10, torch.float32, registered)
    x.requires_grad_(), bias.requires_grad_()
    for b in (bias, None):
        torch.library.opcheck(torch.ops.pgolf.int6_linear_cuda.default, (x, weight.packed, weight.scale, b))


def test_gradients_compile_and_autocast(registered):
    x, weight, bias = make(3, 12, 10, torch.float32, registered)
    w = weight.dequantize()

    def run(x, bias):
        return gpu.run_cuda(x, weight.packed, weight.scale, bias)

    want = run(x, bias)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert compiled(x, bias).equal(want)
    leaves = [t.clone().requires_grad_() for t in (x, bias)]
    dy = torch.randn_like(want)
    for call in (run, compiled):
        dx, db = torch.autograd.grad((call(*leaves) * dy).sum(), leaves)
        torch.testing.assert_close(dx, dy @ w)
        torch.testing.assert_close(db, dy.sum(0))
    with torch.autocast(registered, torch.bfloat16):
        y = run(x, bias)
    assert y.equal(run(x.bfloat16(), bias.bfloat16()))


def test_order_and_refusals(monkeypatch):
    x, weight, bias = make(17, 12, 10, torch.float32, "cpu")
    assert [gpu.order(torch.empty(m, 10))[0] for m in (0, 1, 16, 17, 64, 65)] == [
        "cuda", "cuda", "cuda", "triton", "triton", "dequantize",
    ]  # fmt: skip
    assert sorted(gpu.order(x)) == sorted(i.name for i in op.IMPLS[1:-1])
    with pytest.raises(ValueError, match="the CUDA kernel needs CUDA tensors in .*, got torch.float32 on cpu"):
        int6_linear(x, weight, bias, impl="cuda")
    module = emulated_module()
    with pytest.raises(ValueError, match=r"packed must have N ceil\(K / 4\) 3 bytes for N = 12 and K = 9, .* got 109"):
        module.int6_linear(0, 0, 109, 0, 0, 0, 3, 12, 9, 0, 0, 0)
    with pytest.raises(ValueError, match="N and K must be at most 1073741824, got N = 1 and K = 1073741828"):
        module.int6_linear(0, 0, 3 * (2**28 + 1), 0, 0, 0, 1, 1, 2**30 + 4, 0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 200])
def test_auto_compiles_to_one_graph_for_a_gpu(rows, dtype, monkeypatch):
    """On tensors that only claim to be on a GPU, so that the choice is traced without one."""
    pytest.importorskip("triton")
    monkeypatch.setattr(extension, "cuda", emulated_module())
    monkeypatch.setattr(extension, "WHY_NOT_CUDA", None)
    monkeypatch.setattr(tiles, "gpu", lambda device: tiles.HOPPER)
    found = []

    def backend(graph, _inputs):
        found.extend(str(n.target) for n in graph.graph.nodes if "pgolf" in str(n.target))
        return graph

    with FakeTensorMode(allow_non_fake_inputs=True):
        options = {"device": "cuda"}
        x, scale = torch.empty(rows, 96, dtype=dtype, **options), torch.empty(40, dtype=torch.float16, **options)
        weight = Int6Weight(torch.empty(40, 72, dtype=torch.uint8, **options), scale, (40, 96))
        torch._dynamo.reset()
        y = torch.compile(lambda x: int6_linear(x, weight), fullgraph=True, backend=backend)(x)
        assert (y.shape, y.dtype, y.device) == ((rows, 40), dtype, x.device)
    few = "linear_cuda" if rows == 1 or dtype == torch.float32 else "linear_triton"
    assert found == [f"pgolf.int6_{few if rows < 65 else 'dequantize'}"]


@pytest.mark.skipif(extension.cuda is None, reason=str(extension.WHY_NOT_CUDA))
def test_machine_code(tmp_path):
    """No kernel spills, and what a warp needs first is all asked for before the first product waits for any of it."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton")
        tool = f"{triton.__path__[0]}/backends/nvidia/bin/cuobjdump"
    subprocess.run([tool, "-xelf", "int6_linear_cuda", extension.cuda.__file__], cwd=tmp_path, check=True)
    cubins = sorted(tmp_path.glob("*.cubin"))
    assert cubins
    for cubin in cubins:
        usage, sass = (
            subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
        stacks = re.findall(r"int6_linear_kernel\S+:\s+REG:\d+ STACK:(\d+)", usage)
        assert len(stacks) == 15 and set(stacks) == {"0"}, usage
        for code in sass.split("Function : ")[1:]:
            name, (half_tiles, tiles, aligned) = code.split()[0], re.search(r"Li(\d)ELi(\d)ELb(\d)", code).groups()
            assert not re.search(r"\b(STL|LDL)\b", code), name
            before = code[: code.index("HMMA")]
            words = 8 if "kernelIf" in name else 4  # of 16 bytes, in 32 columns of x
            if aligned == "1":
                assert len(re.findall(r"LDG\.E\.128", before)) >= words * int(half_tiles), name
                assert len(re.findall(r"LDG\.E\.64", before)) >= 3 * int(tiles), name


@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 40, 200])
def test_auto_takes_the_way_for_the_number_of_rows(rows):
    x, weight, bias = make(rows, 512, 1536, torch.bfloat16, "cuda")
    fastest = next(i for i in op._fastest_first(x) if not i.why_not(x, weight.packed, weight.scale, bias))
    assert fastest.name == next(n for n in gpu.order(x) if n != "cuda" or not extension.WHY_NOT_CUDA)
    assert int6_linear(x, weight, bias).equal(int6_linear(x, weight, bias, impl=fastest.name))
    layer = Int6Linear(weight, bias)
    assert layer(x).equal(int6_linear(x, weight, bias))


@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 40, 200])
def test_in_a_cuda_graph_on_a_side_stream(rows):
    x, weight, bias = make(rows, 512, 1536, torch.bfloat16, "cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        int6_linear(x, weight, bias)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        y = int6_linear(x, weight, bias)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert y.equal(int6_linear(x, weight, bias))


@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_more_than_2_to_the_31_elements_of_y():
    if extension.WHY_NOT_CUDA:
        pytest.skip(extension.WHY_NOT_CUDA)
    rows, n = 70_000, 32_768
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * n:
        pytest.skip("needs 14 GB of GPU memory")
    x, weight, _ = make(1, n, 32, torch.bfloat16, "cuda")
    y = forward(x.expand(rows, 32), weight)
    assert y[-1].equal(forward(x, weight)[0]) and y[-1].equal(y[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("rows", [1, 40, 200])
def test_on_the_second_device(rows):
    x, weight, bias = make(rows, 96, 64, torch.bfloat16, "cuda:1")
    torch.testing.assert_close(int6_linear(x, weight, bias), int6_linear(x, weight, bias, impl="reference"))
