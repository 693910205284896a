"""CUDA kernels without a GPU: the very .cu files, built with g++ for this CPU (csrc/common/cuda_emulation.h)."""

import fcntl
import hashlib
import importlib.util
import os
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
# The fibers' stacks are none that the sanitizer knows, so it watches the heap and the globals only.
SANITIZED = " -O0 -g1 -fsanitize=address --param=asan-stack=0"
VARIANT = os.environ.get("PGOLF_EMULATION", "plain")  # or "sanitized", in a process that has the sanitizer loaded


@cache
def emulated_module():
    """pgolf_kernels._cuda for this CPU; skips the test where g++ or pybind11 is missing.

    Kept in build/ under a hash of what it is made of: several test files, in processes of their own, share one build.
    """
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    sources = [ROOT / "csrc/bindings_cuda.cpp", *sorted((ROOT / "csrc").glob("*/*_cuda.cu"))]
    made_of = [*sources, *sorted((ROOT / "csrc").glob("*/*.h")), *sorted((ROOT / "csrc").glob("*/*.cuh"))]
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    flags = FLAGS + SANITIZED * (VARIANT == "sanitized")
    key = b"".join([version, repr((flags, includes)).encode(), *(path.read_bytes() for path in made_of)])
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / f"_cuda-{VARIANT}-{hashlib.sha256(key).hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            for older in folder.glob(f"_cuda-{VARIANT}-*.so"):
                older.unlink()
            _build(sources, [*flags.split(), *includes], module)
    spec = importlib.util.spec_from_file_location("_cuda", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _build(sources: list[Path], flags: list[str], module: Path) -> None:
    with tempfile.TemporaryDirectory(dir=module.parent) as folder:
        objects = [f"{folder}/{source.name}.o" for source in sources]

        def compile_one(source, target):
            command = ["g++", *flags, "-x", "c++", "-c", str(source), "-o", target]
            subprocess.run(command, check=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources, objects))
        subprocess.run(["g++", *flags, "-shared", *objects, "-o", f"{folder}/module"], check=True)
        Path(folder, "module").rename(module)
