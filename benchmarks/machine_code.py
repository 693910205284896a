"""What the compilers make of every GPU kernel, without a GPU: `python -m benchmarks.machine_code [--write PAGE.md]`.

Triton kernels are compiled for each architecture as their launchers would launch them at real sizes, with the tiles of
the shipped tables; CUDA kernels are read from the extension. The surprise is the specialisation: a kernel compiled with
other divisibilities than its launch has is another kernel, so it is the launchers that run, with compilation in place
of launches. Another version of Triton is a folder put before the installed one on PYTHONPATH.
"""

import argparse
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from benchmarks.launches import LAUNCHERS
from pgolf_kernels import extension, tiles
from pgolf_kernels.tiles import Gpu

GPUS = {
    80: Gpu("A100", (8, 0), 108, 166_912),
    90: Gpu("H100", (9, 0), 132, 232_448),
    100: Gpu("B200", (10, 0), 148, 232_448),
    120: Gpu("RTX 5090", (12, 0), 170, 101_376),
}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# LDG counts only where it may go through the read-only cache.
_INSTRUCTIONS = r"\b(HGMMA|HMMA|UTCHMMA|UTMALDG|UTMASTG|LDGSTS|STL|LDL|MEMBAR|CCTL|LDG(?=[.\w]*\.CONSTANT))\b"


@dataclass(frozen=True)
class MachineCode:
    """One kernel as ptxas left it. `instructions` counts the SASS mnemonics named in _INSTRUCTIONS (Triton only)."""

    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    wide_loads: int = 0  # from global memory to registers, 16 bytes each (Triton only)

    @property
    def spills(self) -> bool:
        """Whether registers go through memory. A TMA load's own 8 bytes of stack, never read back, are no spill: ptxas
        12.8 leaves them on sm_120, one store a load."""
        tma_only = self.stack_bytes == 8 and 0 < self.instructions.get("UTMALDG", 0) == self.instructions.get("STL", 0)
        return "LDL" in self.instructions or (self.stack_bytes > 0 and not tma_only)


class _NoGpu(DriverBase):
    """Answers the questions a compilation asks, for a GPU that is not there."""

    def __init__(self, capability: int):
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_benchmarker(self):
        raise RuntimeError("nothing can be timed without a GPU")


def compile_triton(capability: int) -> dict[str, list[MachineCode]]:
    """Each kernel that LAUNCHERS launch, once, by op; capability as in 90 for sm_90.

    It replaces Triton's driver, the GPU and torch.mm for good: call it in a process of its own.

    Raises:
        AssertionError: no launcher takes some row of this architecture's table of tiles.
    """
    triton.runtime.driver.set_active(_NoGpu(capability))
    tiles.gpu = lambda device: GPUS[capability]
    taken, choose_tile, compiled, run = set(), tiles.tile, [], JITFunction.run

    def recording(on, op, kernel, kind, **facts):
        tile = choose_tile(on, op, kernel, kind, **facts)
        taken.add((op, kernel, *tile))
        return tile

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    tiles.tile, JITFunction.run = recording, compile_only
    torch.mm = lambda a, b, out: out  # a product of real size takes seconds on a CPU
    found = {}
    for launch in LAUNCHERS:
        compiled.clear()
        launch()
        found[launch.__name__] = list({kernel.hash: kernel for kernel in compiled}.values())
    codes = iter(_inspect(sum(found.values(), []), capability))
    found = {op: [next(codes) for _ in kernels] for op, kernels in found.items()}
    missed = _rows(tiles.shipped()[f"sm_{capability}"]) - taken
    assert not missed, f"no launcher takes {missed} of sm_{capability}.json"
    return found


def _rows(table: dict) -> set[tuple]:
    """Every tile of a table: op, kernel, fields."""
    ops = {op: kernels for op, kernels in table.items() if isinstance(kernels, dict)}
    return {
        (op, kernel, *(value for key, value in row.items() if key[:4] not in ("min_", "max_")))
        for op, kernels in ops.items()
        for kernel, rows in kernels.items()
        for row in rows
    }


def _inspect(kernels: list, capability: int) -> list[MachineCode]:
    """All at once, because nvdisasm needs a second to start: it gets the instructions of all, one behind the other."""
    texts = [_instructions(kernel.asm["cubin"]) for kernel in kernels]
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(b"".join(texts))
        listing = _run("nvdisasm", "--binary", f"SM{capability}", file.name)
        lines = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/(.+;)", listing)]
        codes, start, position = [], 0, 0
        for kernel, text in zip(kernels, texts, strict=True):
            Path(file.name).write_bytes(kernel.asm["cubin"])
            usage = _run("cuobjdump", "--dump-resource-usage", file.name)
            registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
            first, start = position, start + len(text)
            while position < len(lines) and lines[position][0] < start:
                position += 1
            sass = "\n".join(line for _, line in lines[first:position])
            assert position - first == len(text) // 16, f"nvdisasm left out instructions of {kernel.metadata.name}"
            counts, wide_loads = Counter(re.findall(_INSTRUCTIONS, sass)), len(re.findall(r"\bLDG\.E\.128\b", sass))
            metadata = kernel.metadata
            codes.append(MachineCode(metadata.name, registers, stack, metadata.shared, dict(counts), wide_loads))
    return codes


def _instructions(cubin: bytes) -> bytes:
    """The .text sections of an ELF file."""
    at, size, count, names = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]  # name ... offset, length
    called = cubin[headers[names][4] :]
    return b"".join(cubin[h[4] : h[4] + h[5]] for h in headers if called[h[0] :].startswith(b".text."))


def _run(tool: str, *args: str) -> str:
    return subprocess.run([_TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


def cuda_kernels() -> dict[str, list[MachineCode]]:
    """Every kernel of the CUDA extension, by architecture as in "sm_90"; empty if it is not built."""
    found: dict[str, list[MachineCode]] = {}
    if extension.cuda is None:
        return found
    arch = name = ""
    for line in _run("cuobjdump", "--dump-resource-usage", extension.cuda.__file__).splitlines():
        if told := re.match(r"arch = (\w+)", line):
            arch = told[1]
        elif told := re.match(r" Function (\S+):", line):
            name = subprocess.run(["c++filt", told[1]], capture_output=True, text=True, check=True).stdout.strip()
            name = re.sub(r"^void |\(anonymous namespace\)::|pgolf::|\w+::cuda::|\(.*\)$", "", name)
        elif told := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, told.groups())
            found.setdefault(arch, []).append(MachineCode(name, registers, stack + local, shared, {}))
    return {arch: sorted(codes, key=lambda code: code.kernel) for arch, codes in sorted(found.items())}


def compile_elsewhere(triton_folder: Path | None = None) -> dict[int, dict[str, list[MachineCode]]]:
    """compile_triton of every architecture, by capability. triton_folder: where another version of Triton lies."""
    root = str(Path(__file__).parent.parent)
    path = [*([str(triton_folder)] if triton_folder else []), root, os.environ.get("PYTHONPATH", "")]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.machine_code", "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"compiling failed:\n{process.stderr[-4000:]}")
    return {
        int(capability): {op: [MachineCode(**code) for code in codes] for op, codes in ops.items()}
        for capability, ops in json.loads(process.stdout).items()
    }


def page(triton_kernels: dict[int, dict[str, list[MachineCode]]]) -> str:
    """docs/machine-code.md from compile_triton's results by capability, and the CUDA extension."""
    columns = {f"sm_{capability}": sum(ops.values(), []) for capability, ops in triton_kernels.items()}
    return "\n".join(
        [
            "# The GPU kernels' machine code",
            "",
            "`python -m benchmarks.machine_code --write docs/machine-code.md` writes this page, "
            f"here with Triton {triton.__version__}.",
            "A cell has the registers per thread, the shared memory per block and the tensor cores' instruction; a",
            "kernel that is compiled several times has a range. None spills: the tests look.",
            "",
            *_table("Triton", columns, {f"sm_{capability}": name for capability, name in TENSOR_CORE.items()}),
            "",
            *_table("CUDA C++", cuda_kernels(), {}),
            "",
        ]
    )


def _table(title: str, columns: dict[str, list[MachineCode]], tensor_core: dict[str, str]) -> list[str]:
    """Lines of a table: a row per kernel, a column per architecture."""
    names = list(dict.fromkeys(code.kernel for codes in columns.values() for code in codes))
    lines = [f"| {title} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for name in names:
        cells = []
        for arch, codes in columns.items():
            own = [code for code in codes if code.kernel == name]
            registers = sorted({code.registers for code in own})
            shared = max((code.shared_bytes for code in own), default=0)
            parts = ["-".join(map(str, dict.fromkeys((registers[0], registers[-1]))))] if own else []
            parts += [f"{shared / 1024:.0f} KiB"] if shared >= 512 else []
            parts += [tensor_core[arch]] if any(code.instructions.get(tensor_core.get(arch)) for code in own) else []
            cells.append(", ".join(parts))
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the Triton kernels as JSON instead")
    parser.add_argument("--write", metavar="PAGE.md", help="write the page there instead of printing it")
    options = parser.parse_args()
    # Forked: one import of torch and Triton serves all. A process compiles for one architecture, see compile_triton.
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
        found = dict(zip(GPUS, pool.map(compile_triton, GPUS, chunksize=1), strict=True))
    if options.json:
        plain = {sm: {op: [asdict(code) for code in codes] for op, codes in ops.items()} for sm, ops in found.items()}
        print(json.dumps(plain))
        return
    text = page(found)
    if options.write:
        Path(options.write).write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
