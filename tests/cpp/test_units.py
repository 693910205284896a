"""What the object files of instruction-set units export: one table each, and nothing the linker could merge.

A weak symbol (an inline function or a template of a shared header) compiled for AVX-512 could be the copy that the
linker keeps for everybody, and then a CPU without AVX-512 crashes in code that has nothing to do with it.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEVELS = ("generic", "avx2", "avx512", "avx512bf16", "amx")
UNITS = sorted(path for level in LEVELS for path in (ROOT / "csrc").glob(f"*/*_{level}.cpp"))

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only the generic units are built here"),
    pytest.mark.skipif(not (shutil.which("nm") and shutil.which("g++")), reason="nm or g++ is not installed"),
]


@pytest.fixture(scope="module")
def objects():
    """{unit: object file}, brought up to date where the normal build keeps them: in build/objects."""
    folder = ROOT / "build" / "objects" / "pgolf_kernels._cpu"
    if not (folder / "build.ninja").exists():
        pytest.skip("the extension was not built in this checkout")
    names = {unit: folder / f"{unit.parent.name}-{unit.name}.o" for unit in UNITS}
    command = [sys.executable, "-m", "ninja", "-C", str(folder), *map(str, names.values())]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return names


def symbols(path, *options):
    """[(type, name)] of an object's symbols."""
    listing = subprocess.run(["nm", "-C", *options, path], capture_output=True, text=True, check=True).stdout
    return [tuple(line[17:].split(" ", 1)) for line in listing.splitlines()]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_shares_nothing(unit, objects):
    found = symbols(objects[unit])
    assert any(name.endswith("::kKernels") for _, name in found), "nm's output was not understood"
    # C++'s own personality routine is the same for all: a pointer, not code.
    weak = [name for kind, name in found if kind in "VvWwu" and not name.startswith("DW.ref.")]
    assert not weak, f"{unit.name} exports {weak}; make them static or PGOLF_INLINE"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_exports_its_tables_only(unit, objects):
    level = unit.stem.rsplit("_", 1)[1]
    exported = [name for kind, name in symbols(objects[unit], "--defined-only", "--extern-only") if kind not in "VvWwu"]
    assert exported and all(f"::{level}::" in name and "(" not in name for name in exported), exported
