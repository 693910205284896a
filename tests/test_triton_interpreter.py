"""Every Triton kernel on the CPU: the tests of each op that reach its kernels, under Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so each file runs in a process of its own. Its loads and stores
are copies, which AddressSanitizer watches where g++ has it: an access outside a tensor ends the process. What this
cannot see: races, tensor-core rounding, and anything the compiler gets wrong; those need the same tests on a GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
import triton_cpu  # noqa: F401  (under TRITON_INTERPRET=1 it makes bfloat16 right)
from memory import address_sanitizer

from pgolf_kernels.dispatch import TRITON_INTERPRETED

ROOT = Path(__file__).parent.parent
OPS = sorted(path.parent.name for path in (ROOT / "pgolf_kernels/ops").glob("*/triton_kernel.py"))
KERNEL_TESTS = "triton or autocast or compiles or empty"  # those that name the kernels, and those of impl="auto"
TARGETS = {"bfloat16": [Path(__file__)]} | {op: [ROOT / f"tests/ops/test_{op}.py", "-k", KERNEL_TESTS] for op in OPS}
TARGETS |= {
    "muon": [ROOT / "tests/test_optim.py", "-k", "fused"],
    "adamw": [ROOT / "tests/test_adamw.py", "-k", "triton"],
}
interpreted = pytest.mark.skipif(not TRITON_INTERPRETED, reason="runs inside test_under_the_interpreter[bfloat16]")


def interpreted_run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | address_sanitizer()
    environment |= {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OPENBLAS_NUM_THREADS": "1",  # products of one tile: threads cost more than they bring
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(TRITON_INTERPRETED, reason="already under the interpreter")
@pytest.mark.parametrize("target", TARGETS)
def test_under_the_interpreter(target):
    run = interpreted_run("-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, TARGETS[target]))
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", run.stdout), f"nothing ran:\n{run.stdout[-2000:]}"


OVERRUN = """
import torch, triton, triton.language as tl

@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)

copy_kernel[(1,)](torch.randn(60), torch.randn(64), NUMBER, BLOCK=64)
print("finished")
"""


@pytest.mark.skipif(TRITON_INTERPRETED, reason="already under the interpreter")
def test_an_access_outside_a_tensor_is_seen(tmp_path):
    if not address_sanitizer():
        pytest.skip("g++ has no AddressSanitizer here")
    script = tmp_path / "overrun.py"  # Triton wants a kernel's source in a file
    for number, seen in ((60, False), (61, True)):
        script.write_text(OVERRUN.replace("NUMBER", str(number)))
        run = interpreted_run(str(script))
        assert ("heap-buffer-overflow" in run.stderr) == seen, run.stderr[-2000:]
        assert ("finished" in run.stdout) != seen


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, total_ptr, product_ptr, quotient_ptr, less_ptr, size_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    y = tl.load(y_ptr + i, mask=i < n)
    tl.store(total_ptr + i, x + y, mask=i < n)
    tl.store(product_ptr + i, x * y, mask=i < n)
    tl.store(quotient_ptr + i, (x.to(tl.float32) / y.to(tl.float32)).to(tl.bfloat16), mask=i < n)
    tl.store(less_ptr + i, x < y, mask=i < n)
    tl.store(size_ptr + i, tl.abs(x).to(tl.float32), mask=i < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    c = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        c = tl.dot(tl.load(a_ptr + i * K + k + j), tl.load(b_ptr + (k + i) * BLOCK + j), c)
    tl.store(c_ptr + i * BLOCK + j, c.to(tl.bfloat16))


@interpreted
def test_bfloat16_arithmetic_and_rounding_match_pytorch_bit_for_bit():
    x, y = (torch.randn(1000).mul(3).bfloat16() for _ in range(2))
    x[:4] = torch.tensor([torch.inf, torch.nan, -0.0, 3e38])
    total, product, quotient = (torch.empty_like(x) for _ in range(3))
    less, size = torch.empty(1000, dtype=torch.bool), torch.empty(1000)
    elementwise_kernel[(1,)](x, y, total, product, quotient, less, size, 1000, BLOCK=1024)
    for got, want in (
        (total, x + y),
        (product, x * y),
        (quotient, x / y),
        (less, x < y),
        (size, x.float().abs()),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@interpreted
def test_bfloat16_dot_matches_float32():
    a, b, c = torch.randn(16, 64).bfloat16(), torch.randn(64, 16).bfloat16(), torch.empty(16, 16, dtype=torch.bfloat16)
    dot_kernel[(1,)](a, b, c, 64, BLOCK=16)
    exact = a.double() @ b.double()
    assert ((c.double() - exact).abs() <= 0.51 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-5).all()


@triton.jit
def sum_kernel(x_ptr, total_ptr, BLOCK: tl.constexpr):
    tl.store(total_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


@interpreted
def test_bfloat16_reduction_is_refused_rather_than_wrong():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="no bfloat16 reduction"):
        sum_kernel[(1,)](torch.ones(16).bfloat16(), torch.empty(1).bfloat16(), BLOCK=16)
