"""The part of a bundled train_gpt.py that compiles its C++ and CUDA at first use, with setup.py's flags.

Only the instruction set that this machine uses is compiled; the tables of the others are empty, and choose() of isa.h
never takes them. What was built stays in the user's cache folder, under the hash of all it was made from. Headers of
pybind11 come with PyTorch.
"""

import concurrent.futures
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PROBE = """#include <cstdio>
#include "common/isa.h"
int main() { std::puts(pgolf::kIsaLevels[pgolf::default_level()]); }
"""


class Builder:
    """Builds an extension module from sources.

    Args:
        sources: text by path below csrc, with bindings_{cpu,cuda}.cpp.
        ops: those in them, by module: {"cpu": [...], "cuda": [...]}.
        flags: csrc/flags.json.
    """

    def __init__(self, sources, ops, flags):
        self.sources, self.ops, self.flags = sources, ops, flags
        self.cxx = os.environ.get("CXX", "g++")

    def __call__(self, name):
        """Path of the library of pgolf_kernels._cpu or _cuda. Raises ImportError, saying why, if there can be none."""
        kind = name.rpartition("_")[2]
        try:
            return self._build(kind)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = (getattr(error, "stderr", "") or "").strip()[-2000:]
            sys.stderr.write(
                f"train_gpt: the {kind} kernels could not be built ({error}); the reference runs instead, slower, and "
                f"scores may differ in their last digits\n{detail}\n"
            )
            raise ImportError(f"it could not be built: {error}") from error

    def _build(self, kind):
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            for path, text in self.sources.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(text)
            compilers, link = self._cpu(root) if kind == "cpu" else self._cuda(root)
            import torch

            include = [root, Path(torch.__file__).parent / "include", sysconfig.get_path("include")]
            include = [f"-I{folder}" for folder in include]
            commands = [
                [*command, *include, "-c", str(root / source), "-o", f"{root / source}.o"]
                for command, source in compilers
            ]
            version = subprocess.run([self.cxx, "--version"], check=True, capture_output=True, text=True).stdout
            made_from = json.dumps([[c[:-4] for c in commands], link, version, self.sources]).replace(temporary, "")
            digest = hashlib.sha256(made_from.encode()).hexdigest()[:16]
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pgolf_kernels")
            library = cache / digest / f"_{kind}{sysconfig.get_config_var('EXT_SUFFIX')}"
            library.parent.mkdir(parents=True, exist_ok=True)
            with (library.parent / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of several ranks one builds, the others wait
                if not library.exists():
                    sys.stderr.write(f"train_gpt: compiling {len(commands)} files into {library}\n")
                    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                        list(pool.map(_run, commands))
                    objects = [f"{root / source}.o" for _, source in compilers]
                    beside = library.with_suffix(".new")
                    _run([self.cxx, "-shared", *objects, "-o", str(beside), *link])
                    beside.replace(library)
            return library

    def _cpu(self, root):
        """The (command, source) of every unit, and the linker's flags."""
        host = [self.cxx, *self.flags["host"], *self.flags["release"], *self.flags["threads"]]
        (root / "probe.cpp").write_text(PROBE)
        _run([*host, "-O0", f"-I{root}", str(root / "probe.cpp"), "-o", str(root / "probe")])
        level = _run([str(root / "probe")]).strip()
        levels = list(self.flags["isa_adds"])
        others = [other for other in levels if other != level]
        stubs = [f'#include "{op}/{op}_kernels.h"' for op in self.ops["cpu"]]
        for op in self.ops["cpu"]:
            stubs += [f"namespace pgolf::{op}::{other} {{ const Kernels kKernels{{}}; }}" for other in others]
        (root / "stubs.cpp").write_text("\n".join(stubs) + "\n")
        isa = [flag for lower in levels[: levels.index(level) + 1] for flag in self.flags["isa_adds"][lower]]
        units = [(host, "bindings_cpu.cpp"), ([*host, "-Wno-missing-field-initializers"], "stubs.cpp")]
        for op in self.ops["cpu"]:
            units += [(host, f"{op}/{op}_cpu.cpp"), ([*host, *isa], f"{op}/{op}_{level}.cpp")]
        return units, self.flags["threads"]

    def _cuda(self, root):
        import torch

        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("/usr/local/cuda/bin/nvcc")
        if nvcc is None:
            raise FileNotFoundError("no nvcc was found; set CUDA_HOME")
        toolkit = Path(nvcc).resolve().parent.parent
        lib = next((p.parent for p in sorted(toolkit.glob("**/libcudart_static.a"))), None)
        if lib is None:
            raise FileNotFoundError(f"{toolkit} has no libcudart_static.a")
        sm = "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "80"
        device = [nvcc, "-ccbin", self.cxx, *self.flags["cuda"], f"-gencode=arch=compute_{sm},code=sm_{sm}"]
        host = [self.cxx, *self.flags["host"], *self.flags["release"], *self.flags["threads"]]
        units = [(host, "bindings_cuda.cpp"), (device, "common/device_cuda.cu")]
        units += [(device, f"{op}/{op}_cuda.cu") for op in self.ops["cuda"]]
        return units, [*self.flags["threads"], f"-L{lib}", *self.flags["cuda_link"]]


def _run(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
