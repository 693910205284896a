"""Build csrc/ into pgolf_kernels._cpu and, where nvcc is, pgolf_kernels._cuda: one ninja graph per module.

torch is never imported, so one build serves every torch version. Which compiler flags a file gets is its name:
    <op>/<op>_cpu.cpp                            baseline; the choice among the units below
    <op>/<op>_{generic,avx2,avx512,...}.cpp      one instruction set each (ISA_FLAGS); x86-64 only, but for generic
    <op>/<op>_cuda.cu                            every architecture of PGOLF_CUDA_ARCHS
    <op>/<op>_sm90.cu                            sm_90a alone: wgmma and TMA exist nowhere else
and csrc/bindings_{cpu,cuda}.cpp are the modules. A new op needs no change here. The flags themselves are in
csrc/flags.json, because `pgolf bundle` builds with them too.

Environment: PGOLF_CUDA=auto|0|1, PGOLF_CUDA_ARCHS="80+PTX;90", PGOLF_SANITIZE=address,undefined|thread,
PGOLF_DEBUG=1, PGOLF_EMULATE_AMX=1 (level amx on ordinary registers, for tests), MAX_JOBS, CXX, CUDA_HOME.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")
CXX = os.environ.get("CXX", "g++")
DEBUG = os.environ.get("PGOLF_DEBUG", "0") == "1"
SANITIZE = os.environ.get("PGOLF_SANITIZE", "")

EMULATE_AMX = os.environ.get("PGOLF_EMULATE_AMX", "0") == "1"
FLAGS = json.loads((CSRC / "flags.json").read_text())
# A level has the flags of those below it. -Wuninitialized is off from AVX-512 on: GCC 12's own headers provoke it.
ISA_FLAGS: dict[str, list[str]] = {}
for level, added in FLAGS["isa_adds"].items():
    below = next(reversed(ISA_FLAGS.values()), [])
    ISA_FLAGS[level] = [*below, *([] if level == "amx" and EMULATE_AMX else added)]


class Unit(NamedTuple):
    """One source file and what its compiler gets."""

    source: Path
    flags: list[str]
    rule: str  # "cxx" or "nvcc"


class Cuda(NamedTuple):
    nvcc: str
    lib: Path  # holds libcudart_static.a


def fail(problem: str, remedy: str) -> None:
    raise SystemExit(f"pgolf_kernels: {problem}; {remedy}")


def host_flags() -> list[str]:
    optimise = ["-O1", "-g", "-D_GLIBCXX_ASSERTIONS"] if DEBUG else ["-O2", "-g1"] if SANITIZE else FLAGS["release"]
    flags = [*FLAGS["host"], *optimise]
    flags += ["-DPGOLF_EMULATE_AMX"] if EMULATE_AMX else []
    return flags + sanitizer_flags() + thread_flags()


def sanitizer_flags() -> list[str]:
    if not SANITIZE:
        return []
    flags = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    # Kernels work on the caller's memory. Watching every local vector of an inlined loop too takes minutes a file.
    flags += ["--param=asan-stack=0", "--param=asan-instrumentation-with-call-threshold=0"]
    # AddressSanitizer sees what object-size sees, and a misaligned vector instruction faults by itself:
    # those two checks made the build three times as long.
    return [*flags, "-fno-sanitize=null,pointer-overflow,alignment,object-size"]


def thread_flags() -> list[str]:
    # libgomp is not instrumented, so ThreadSanitizer sees races in every OpenMP region.
    return ["-pthread", "-DPGOLF_STD_THREADS"] if "thread" in SANITIZE else FLAGS["threads"]


def find_nvcc() -> Cuda | None:
    """The CUDA compiler that CUDA_HOME, PATH or the usual place names, if it works."""
    candidates = [Path(os.environ["CUDA_HOME"], "bin/nvcc")] if os.environ.get("CUDA_HOME") else []
    candidates += [Path("/usr/local/cuda/bin/nvcc"), Path(shutil.which("nvcc") or "nvcc-is-not-on-PATH")]
    for nvcc in filter(Path.exists, candidates):
        # nvcc may be a wrapper script elsewhere, so its own word for its root is the one that counts.
        told = subprocess.run([nvcc, "-dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        if root := re.search(r"TOP=(\S+)", told):
            for lib in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
                if (Path(root[1], lib) / "libcudart_static.a").exists():
                    return Cuda(str(nvcc), Path(root[1], lib).resolve())
    return None


def architecture_flags(archs: str) -> list[str]:
    """ "80+PTX;90" -> sm_80 machine code and PTX for what comes after, sm_90 machine code."""
    flags = []
    for arch in archs.split(";"):
        sm = arch.removesuffix("+PTX")
        code = f"[sm_{sm},compute_{sm}]" if arch.endswith("+PTX") else f"sm_{sm}"
        flags.append(f"-gencode=arch=compute_{sm},code={code}")
    return flags


def cpu_extension() -> Extension:
    units = [Unit(CSRC / "bindings_cpu.cpp", host_flags(), "cxx")]
    units += [Unit(source, host_flags(), "cxx") for source in sorted(CSRC.glob("*/*_cpu.cpp"))]
    for isa, flags in ISA_FLAGS.items():
        if X86 or isa == "generic":
            units += [Unit(source, host_flags() + flags, "cxx") for source in sorted(CSRC.glob(f"*/*_{isa}.cpp"))]
    return extension("_cpu", units, [*sanitizer_flags(), *thread_flags()])


def cuda_extension() -> Extension | None:
    wanted = os.environ.get("PGOLF_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        fail(f"PGOLF_CUDA must be auto, 0 or 1, got {wanted!r}", "unset it for auto")
    kernels = sorted(CSRC.glob("*/*.cu"))
    if wanted == "0" or not kernels:
        return None
    if (cuda := find_nvcc()) is None:
        if wanted == "1":
            fail("PGOLF_CUDA=1 but no working nvcc was found", "set CUDA_HOME, or PGOLF_CUDA=0 for a CPU build")
        print("pgolf_kernels: nvcc not found, building without CUDA")
        return None
    # sm_80's machine code also runs on 8.6 and 8.9; newer GPUs than 9.0 compile the PTX for themselves.
    generic = architecture_flags(os.environ.get("PGOLF_CUDA_ARCHS", "80+PTX;90"))
    units = [Unit(CSRC / "bindings_cuda.cpp", host_flags(), "cxx")]
    for source in kernels:
        archs = architecture_flags("90a") if source.stem.endswith("_sm90") else generic
        units.append(Unit(source, FLAGS["cuda"] + archs, "nvcc"))
    link = [*sanitizer_flags(), *thread_flags(), f"-L{cuda.lib}", *FLAGS["cuda_link"]]
    return extension("_cuda", units, link, cuda.nvcc)


def extension(name: str, units: list[Unit], link: list[str], nvcc: str = "") -> Extension:
    ext = Extension(f"pgolf_kernels.{name}", [str(unit.source.relative_to(ROOT)) for unit in units])
    ext.units, ext.link, ext.nvcc = units, link, nvcc
    return ext


def include_flags() -> list[str]:
    """Our headers, pybind11's and Python's; what is missing is said in one line."""
    if shutil.which(CXX) is None:
        fail(f"the C++ compiler {CXX!r} was not found", "install g++ or set CXX")
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        fail(f"{python}/Python.h was not found", "install Python's development files (python3-dev)")
    try:
        import pybind11
    except ImportError:
        fail("pybind11 is not installed", "run `pip install pybind11`")
    return [f"-I{CSRC}", "-isystem", pybind11.get_include(), "-isystem", str(python)]


def find_ninja() -> str:
    if path := shutil.which("ninja"):
        return path
    try:
        import ninja
    except ImportError:
        fail("ninja is not installed", "run `pip install ninja`")
    return str(Path(ninja.BIN_DIR, "ninja"))


RULES = """\
ninja_required_version = 1.5
rule cxx
  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CXX $in
rule nvcc
  command = {nvcc} -ccbin {cxx} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = NVCC $in
rule link
  command = {cxx} -shared $in -o $out $flags
  description = LINK $out
"""


def ninja_graph(ext: Extension, folder: Path, library: Path) -> str:
    """build.ninja of one extension: an object per unit, linked into `library`."""

    def path(p: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(p))

    includes, lines, objects = include_flags(), [], []
    for unit in ext.units:
        objects.append(path(folder / f"{unit.source.relative_to(CSRC)}.o".replace("/", "-")))
        lines.append(f"build {objects[-1]}: {unit.rule} {path(unit.source)}")
        # pip gives pybind11 another path every time; kernels, which do without it, are not compiled again.
        needed = includes if unit.source.stem.startswith("bindings") else includes[:1]
        lines.append(f"  flags = {shlex.join(unit.flags + needed)}")
    lines.append(f"build {path(library)}: link {' '.join(objects)}")
    lines.append(f"  flags = {shlex.join(ext.link)}")
    rules = RULES.format(cxx=CXX, nvcc=ext.nvcc or "nvcc")
    return "\n".join([rules, f"builddir = {path(folder)}", *lines, f"default {path(library)}", ""])


class BuildWithNinja(build_ext):
    """setuptools decides where the module belongs; ninja builds it."""

    def finalize_options(self) -> None:
        # One place for the objects unless --build-temp names another: pip gives every installation an empty folder.
        asked = self.build_temp
        super().finalize_options()
        self.build_temp = asked or str(ROOT / "build" / "objects")

    def build_extension(self, ext: Extension) -> None:
        # A folder per set of sanitizers: switching back must not find the other build's objects newer than its own.
        variant = re.sub(r"\W+", "-", SANITIZE) + ("-debug" if DEBUG else "") + ("-emulated" if EMULATE_AMX else "")
        folder = Path(self.build_temp).resolve() / (ext.name + variant)
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / Path(self.get_ext_filename(ext.name)).name
        (folder / "build.ninja").write_text(ninja_graph(ext, folder, library))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([find_ninja(), "-C", str(folder), "--quiet", *jobs]).returncode:
            fail(f"building {ext.name} failed", "the compiler's message is above")
        built = Path(self.get_ext_fullpath(ext.name))
        built.parent.mkdir(parents=True, exist_ok=True)
        # Whatever is there: it may be newer and of another variant. By renaming, because a process may be running it.
        beside = built.with_suffix(".new")
        shutil.copyfile(library, beside)
        beside.replace(built)


setup(
    ext_modules=[ext for ext in (cpu_extension(), cuda_extension()) if ext],
    cmdclass={"build_ext": BuildWithNinja},
)
