"""Compile and run common_test.cpp twice: AddressSanitizer with OpenMP, ThreadSanitizer with std::thread."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize(
    "flags",
    [
        ["-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        ["-pthread", "-DPGOLF_STD_THREADS", "-fsanitize=thread"],
    ],
    ids=["openmp-asan-ubsan", "threads-tsan"],
)
def test_common(flags, tmp_path):
    program = tmp_path / "common_test"
    command = ["g++", "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *flags]
    subprocess.run([*command, str(ROOT / "tests/cpp/common_test.cpp"), "-o", str(program)], check=True)
    run = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
