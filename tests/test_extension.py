"""The compiled extension: what a user sees when it is missing, and how setup.py builds it or says why it cannot."""

import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from pgolf_kernels import extension, slot_score
from pgolf_kernels.ops.slot import cpu

ROOT = Path(__file__).parent.parent
ARGUMENTS = (torch.randn(1, 4, 8), torch.randn(16, 8), torch.zeros(1, 4, dtype=torch.int64), None)
ROWS = torch.ones(1, 4, dtype=torch.bool)


def test_without_the_extension_the_reference_runs_and_says_so_once(monkeypatch, caplog):
    module, sentence = extension._load("_no_such_module", "CPU")
    assert module is None
    assert sentence.startswith("the CPU extension is not available (No module named 'pgolf_kernels._no_such_module')")
    assert sentence.endswith("build it with `python setup.py build_ext --inplace`")

    sentence += f" [{os.urandom(4).hex()}]"  # a warning of its own: each distinct one appears once per process
    monkeypatch.setattr(extension, "cpu", None)
    monkeypatch.setattr(extension, "WHY_NOT_CPU", sentence)
    got = [slot_score(*ARGUMENTS, rows=ROWS) for _ in range(2)]
    assert torch.equal(got[0], slot_score(*ARGUMENTS, rows=ROWS, impl="reference"))
    assert [r.getMessage() for r in caplog.records] == [
        f"slot_score: running the reference implementation (cpu: {sentence})"
    ]
    with pytest.raises(ValueError, match="slot_score: impl='cpu' cannot run here: the CPU extension is not available"):
        slot_score(*ARGUMENTS, rows=ROWS, impl="cpu")


@pytest.mark.skipif(extension.cpu is None, reason=str(extension.WHY_NOT_CPU))
def test_the_extension_reports_its_machine():
    features, levels = extension.cpu.cpu_features(), extension.cpu.isa_levels()
    assert {"avx2", "fma", "avx512f", "avx512bf16", "amx_bf16"} <= features.keys()
    assert levels[0] == "generic" and extension.cpu.isa() in levels
    assert ("avx2" in levels) <= features["avx2"]
    assert cpu.why_not(types.SimpleNamespace(hidden=torch.empty(0))) is None


@pytest.mark.skipif(extension.cuda is None, reason=str(extension.WHY_NOT_CUDA))
def test_a_gpu_without_machine_code_or_driver_is_a_sentence(monkeypatch):
    absent = torch.cuda.device_count() + 7
    reason = extension.cuda.why_not(absent)
    assert re.fullmatch(r"cuda\w+: .+", reason), reason
    assert torch.cuda.is_available() == (extension.cuda.why_not(0) == "")

    module = types.SimpleNamespace(why_not=lambda device: "its machine code: no kernel image is available")
    monkeypatch.setattr(extension, "cuda", module)
    sentence = extension.why_not_cuda(torch.device("cuda", absent))
    assert sentence == (
        f"the CUDA extension cannot run on cuda:{absent} (its machine code: no kernel image is available); "
        "build it on that machine, or set PGOLF_CUDA_ARCHS"
    )


def test_the_library_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, pgolf_kernels as k\n"
        "g = torch.randn(8, 8)\n"
        "assert k.newton_schulz(g).isfinite().all()\n"
        "k.explain('newton_schulz', g)\n"
        "try: k.newton_schulz(g, impl='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("the package `triton` is not installed") == 2, run.stdout


def build(*arguments, **environment):
    """Run setup.py; return (exit status, everything it printed)."""
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=ROOT,
        env={**os.environ, "PGOLF_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return run.returncode, run.stdout + run.stderr


def test_a_missing_tool_is_named_in_one_line(tmp_path):
    """Each case hides one thing the build needs; nothing is compiled."""
    here = ["build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "pybind11.py").write_text("raise ImportError('hidden by the test')\n")
    (hidden / "ninja.py").write_text("raise ImportError('hidden by the test')\n")
    (hidden / "g++").write_text("#!/bin/sh\n")
    (hidden / "g++").chmod(0o755)
    cases = {
        "the C++ compiler 'no-such-c++' was not found; install g++ or set CXX": {"CXX": "no-such-c++"},
        "pybind11 is not installed; run `pip install pybind11`": {"PYTHONPATH": str(hidden)},
        "PGOLF_CUDA must be auto, 0 or 1, got 'maybe'; unset it for auto": {"PGOLF_CUDA": "maybe"},
    }
    for sentence, environment in cases.items():
        status, output = build(*here, **environment)
        assert status != 0
        assert output.strip().splitlines()[-1] == f"pgolf_kernels: {sentence}"
    (hidden / "pybind11.py").unlink()
    status, output = build(*here, PATH=str(hidden), PYTHONPATH=str(hidden))
    assert status != 0
    assert output.strip().splitlines()[-1] == "pgolf_kernels: ninja is not installed; run `pip install ninja`"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only the generic units are built here")
def test_every_unit_gets_its_own_flags_and_an_unchanged_tree_builds_nothing(tmp_path):
    """With a compiler that only writes down its arguments, and a torch that must not be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('setup.py imported torch')\n")
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    here = ["build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    for _ in range(2):
        status, output = build(*here, CXX=str(compiler), PYTHONPATH=str(tmp_path))
        assert status == 0, output
    commands = calls.read_text().splitlines()
    units = sorted(path.name for path in (ROOT / "csrc").glob("*/*.cpp"))
    assert len(commands) == len(units) + 2, "one call per unit, bindings and link; none the second time"
    for unit in units:
        (command,) = [c for c in commands if f"/{unit} " in c]
        assert ("-mavx2" in command) == (
            unit.rsplit("_", 1)[1] in ("avx2.cpp", "avx512.cpp", "avx512bf16.cpp", "amx.cpp")
        )
        assert ("-mavx512f" in command) == ("_avx512" in unit or "_amx" in unit)
    assert list((tmp_path / "lib/pgolf_kernels").glob("_cpu.*so"))
