"""The machine code of every GPU kernel, for Ampere, Hopper and both Blackwells, compiled without a GPU.

Each launcher runs at real sizes with compilation in place of launches (benchmarks/machine_code.py), so it is the
launch's own specialisation that must not spill, must fit shared memory, and must use the tensor cores' instructions
that the architecture offers. Other versions of Triton are tested where `make` has put them.
"""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton

from benchmarks.machine_code import GPUS, TENSOR_CORE, MachineCode, compile_elsewhere, cuda_kernels, page
from pgolf_kernels import extension
from pgolf_kernels.dispatch import TRITON_INTERPRETED

pytestmark = pytest.mark.skipif(TRITON_INTERPRETED, reason="interpreted kernels have no machine code")

ROOT = Path(__file__).parent.parent
ASYNC_COPY = {80: "LDGSTS", 90: "UTMALDG", 100: "UTMALDG", 120: "UTMALDG"}
# The installed Triton, and what `make test` puts beside it: the version of machines with torch 2.11.
VERSIONS = {triton.__version__: None} | {path.name[7:]: path for path in sorted(Path(sys.prefix).glob("triton-*"))}


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def compiled(version):
    """Capability -> op -> its kernels, with one version of Triton."""
    return compile_elsewhere(VERSIONS[version])


@pytest.mark.parametrize("capability", GPUS)
def test_no_triton_kernel_spills_or_outgrows_its_gpu(compiled, capability):
    for codes in compiled[capability].values():
        assert codes
        for code in codes:
            assert not code.spills, code
            assert code.shared_bytes <= GPUS[capability].shared_bytes, code


@pytest.mark.parametrize("capability", GPUS)
def test_leaky_relu2_mlp(compiled, capability):
    codes = compiled[capability]["leaky_relu2_mlp"]
    assert [code.kernel for code in codes] == ["leaky_relu2_up_kernel", "leaky_relu2_dp_kernel"]
    for code in codes:
        assert code.instructions.get(TENSOR_CORE[capability]) and code.instructions.get(ASYNC_COPY[capability]), code


@pytest.mark.parametrize("capability", GPUS)
def test_softcapped_cross_entropy(compiled, capability):
    codes = compiled[capability]["softcapped_cross_entropy"]
    assert {code.kernel for code in codes} == {"softcapped_ce_kernel"}
    for code in codes:
        assert code.registers <= 128, code  # two blocks of 8 warps on each multiprocessor, to keep memory busy


@pytest.mark.parametrize("capability", GPUS)
def test_newton_schulz(compiled, capability):
    codes = compiled[capability]["newton_schulz"]
    assert {"row_squares_kernel", "normalize_kernel", "symmetric_kernel", "apply_kernel"} == {c.kernel for c in codes}
    for code in codes:
        if code.kernel in ("symmetric_kernel", "apply_kernel"):
            assert code.instructions.get(TENSOR_CORE[capability]) and code.instructions.get("LDGSTS"), code


@pytest.mark.parametrize("capability", GPUS)
def test_int6_linear(compiled, capability):
    codes = compiled[capability]["int6_linear"]
    assert {code.kernel for code in codes} == {"int6_linear_kernel", "int6_dequantize_kernel"}
    for code in codes:
        if code.kernel == "int6_linear_kernel":
            assert code.instructions.get("HMMA"), code  # tiles of 16 or 32 rows of the weight: no wider instruction
    assert any(code.instructions.get("LDGSTS") for code in codes)


@pytest.mark.parametrize("capability", GPUS)
def test_slot(compiled, capability):
    codes = compiled[capability]["slot"]
    names = ("sweep", "reduce", "project", "add_rows", "descend", "score")
    assert {code.kernel for code in codes} == {f"slot_{name}_kernel" for name in names}
    assert all(code.shared_bytes <= 48 * 1024 for code in codes)
    sweeps = sorted(code.registers for code in codes if code.kernel == "slot_sweep_kernel")
    # Two blocks of 8 warps on each multiprocessor, to keep memory busy; through the norm, one.
    assert len(sweeps) == 3 and sweeps[1] <= 128, sweeps


@pytest.mark.parametrize("capability", GPUS)
def test_newton_schulz_megakernel(compiled, capability):
    codes = compiled[capability]["newton_schulz_megakernel"]
    assert [c.kernel for c in codes] == ["write_addresses_kernel"] + 3 * ["bank_row_squares_kernel", "mega_kernel"]
    for code in codes:
        if code.kernel == "mega_kernel":
            assert code.instructions.get(TENSOR_CORE[capability]) and code.instructions.get("LDGSTS"), code
            # Visibility across multiprocessors: a fence before the release, an emptied first-level cache after the
            # acquire, and no load that may go through the read-only path or by TMA.
            assert code.instructions.get("MEMBAR") and code.instructions.get("CCTL"), code
            assert not code.instructions.get("UTMALDG") and not code.instructions.get("LDG"), code
    assert all(code.wide_loads for code in codes[1:5]), "aligned banks are read 16 bytes at a time"


@pytest.mark.parametrize("capability", GPUS)
def test_optimisers(compiled, capability):
    codes = [code for code in compiled[capability]["optimisers"] if code.kernel != "write_addresses_kernel"]
    assert [code.kernel for code in codes] == 2 * ["momentum_kernel", "update_kernel", "adamw_kernel"]
    for code in codes:
        assert code.registers <= 64, code  # four blocks of 8 warps on each multiprocessor, to keep memory busy
        assert code.wide_loads, "no load is 16 bytes wide"


@pytest.mark.skipif(extension.cuda is None, reason=str(extension.WHY_NOT_CUDA))
def test_no_cuda_kernel_spills():
    found = cuda_kernels()
    assert found and all(found.values())
    for codes in found.values():
        for code in codes:
            assert not code.stack_bytes, code


def test_a_spill_is_seen():
    assert MachineCode("k", 255, 8, 0, {}).spills
    assert MachineCode("k", 255, 8, 0, {"STL": 6, "LDL": 1, "UTMALDG": 6}).spills
    assert MachineCode("k", 255, 8, 0, {"STL": 7, "UTMALDG": 6}).spills
    assert not MachineCode("k", 128, 8, 0, {"STL": 6, "UTMALDG": 6}).spills
    assert not MachineCode("k", 64, 0, 1024, {"HGMMA": 4}).spills


def test_the_page_shows_this_code(compiled, version):
    written = (ROOT / "docs/machine-code.md").read_text()
    if version != triton.__version__ or f"with Triton {version}." not in written:
        pytest.skip("the page is of another version of Triton")
    triton_part, _, cuda_part = page(compiled).partition("| CUDA C++")
    assert written.startswith(triton_part), "run python -m benchmarks.machine_code --write docs/machine-code.md"
    if extension.cuda is not None:
        kernels = re.findall(r"^\| `(.+?)`", cuda_part, re.MULTILINE)
        assert kernels == re.findall(r"^\| `(.+?)`", written.partition("| CUDA C++")[2], re.MULTILINE)
