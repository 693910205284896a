"""Compile and run product_test.cpp for every instruction set, AMX emulated where the CPU has none, under sanitizers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numerics import LEVELS

ROOT = Path(__file__).parents[2]


def isa_flags(environment):
    """ISA_FLAGS of setup.py, which is a script and not a module to import."""
    code = "import json, setuptools as s; s.setup = lambda **_: None; import setup; print(json.dumps(setup.ISA_FLAGS))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PGOLF_CUDA": "0", **environment},
                         capture_output=True, text=True, check=True)  # fmt: skip
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("isa", [*LEVELS, *["emulated amx"] * ("avx512bf16" in LEVELS)])
def test_product(isa, tmp_path):
    emulated = isa == "emulated amx"
    flags = isa_flags({"PGOLF_EMULATE_AMX": str(int(emulated))})[isa.removeprefix("emulated ")]
    flags += ["-DPGOLF_EMULATE_AMX"] * emulated + [f"-DPGOLF_ISA={isa.removeprefix('emulated ')}"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "product_test"
    command = ["g++", "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *flags]
    subprocess.run([*command, str(ROOT / "tests/cpp/product_test.cpp"), "-o", str(program)], check=True)
    run = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
