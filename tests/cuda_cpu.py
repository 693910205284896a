"""CUDA kernels without a GPU: the very .cu files, built with g++ for this CPU (csrc/common/cuda_emulation.h)."""

import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where compilers fortify by default, longjmp takes the change of stack between fibers for an error.
FLAGS = """-std=c++17 -O1 -U_FORTIFY_SOURCE -fPIC -fno-strict-aliasing -fvisibility=hidden -Wall -Wextra -Werror
    -Wno-unknown-pragmas -Wno-missing-field-initializers -DPGOLF_EMULATE_CUDA"""


@cache
def emulated_module():
    """pgolf_kernels._cuda for this CPU, built once a process; skips the test where that is not possible."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    sources = [ROOT / "csrc/bindings_cuda.cpp", *sorted((ROOT / "csrc").glob("*/*_cuda.cu"))]
    with tempfile.TemporaryDirectory() as folder:
        objects = [f"{folder}/{source.name}.o" for source in sources]

        def compile_one(source, target):
            command = ["g++", *FLAGS.split(), *includes, "-x", "c++", "-c", str(source), "-o", target]
            subprocess.run(command, check=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources, objects))
        module = f"{folder}/_cuda.so"
        subprocess.run(["g++", "-shared", *objects, "-o", module], check=True)
        spec = importlib.util.spec_from_file_location("_cuda", module)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    return loaded
