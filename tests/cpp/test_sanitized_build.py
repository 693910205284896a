"""The kernels' own tests once more, on a module built with AddressSanitizer and UndefinedBehaviorSanitizer.

The sanitizers do not see what AMX instructions touch, so level amx runs on emulated tiles, on any CPU with AVX-512
BF16. Building takes two minutes of two cores the first time; ninja keeps the objects in build/, apart from the others.
As a script (`test_sanitized_build.py MODULE`) this file is the process that has the sanitizers loaded.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from memory import address_sanitizer

ROOT = Path(__file__).parents[2]
CASES = 4  # of each test, instruction set and dtype: the rest takes other branches of arithmetic, not of memory


class Sample:
    """A pytest plugin that leaves out most cases, and tests that fork: those watch memory by guard pages instead."""

    def pytest_collection_modifyitems(self, items):
        groups = {}
        for item in items:
            if "in_child" not in item.function.__code__.co_names:
                params = getattr(item, "callspec", None) and item.callspec.params or {}
                groups.setdefault((item.function, params.get("isa"), params.get("dtype")), []).append(item)
        items[:] = [item for group in groups.values() for item in group[:: -(-len(group) // CASES)]]


def main(library):
    """Run the tests of the kernels with `library` in place of the module that was built for this checkout."""
    spec = importlib.util.spec_from_file_location("pgolf_kernels._cpu", library)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from pgolf_kernels import extension

    assert extension.cpu is module
    print("levels:", *module.isa_levels(), flush=True)
    tests = sorted(map(str, (ROOT / "tests/cpp").glob("test_*_cpu.py")))
    # Capturing files, not descriptors, lets the sanitizers' reports through.
    return pytest.main(["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", *tests], plugins=[Sample()])


@pytest.mark.timeout(1500)  # five minutes of one core to build; a busy machine takes three times that
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers are preloaded as on Linux")
def test_sanitized_build(tmp_path):
    if not address_sanitizer():
        pytest.skip("g++ has no AddressSanitizer here")
    environment = {**os.environ, "PGOLF_CUDA": "0", "PGOLF_DEBUG": "0", "PGOLF_EMULATE_AMX": "1",
                   "PGOLF_SANITIZE": "address,undefined"}  # fmt: skip
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    build = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert build.returncode == 0, build.stdout + build.stderr
    (library,) = tmp_path.glob("pgolf_kernels/_cpu.*so")

    environment = {name: value for name, value in os.environ.items() if name != "PGOLF_ISA"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in (".", "python", "tests"))
    environment |= address_sanitizer() | {"OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, __file__, str(library)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-20000:]
    levels = run.stdout.splitlines()[0].split()[1:]
    assert ("amx" in levels) == ("avx512bf16" in levels), levels


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
