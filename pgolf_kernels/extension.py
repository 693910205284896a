"""Load the compiled extensions, or remember the sentence why not. Nothing here raises: the reference path always works.

`cpu` and `cuda` are the modules (or None); `WHY_NOT_CPU` and `WHY_NOT_CUDA` are None or the reason users see.
"""

import functools
import importlib
from types import ModuleType

import torch


def _load(name: str, what: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f".{name}", __package__), None
    except ImportError as error:
        bundled = hasattr(__spec__.loader, "program_bytes")  # then there is no setup.py, and the error says what to do
        advice = "" if bundled else "; build it with `python setup.py build_ext --inplace`"
        return None, f"the {what} extension is not available ({error}){advice}"


cpu, WHY_NOT_CPU = _load("_cpu", "CPU")
cuda, WHY_NOT_CUDA = _load("_cuda", "CUDA")


def why_not_cuda(device: torch.device) -> str | None:
    """None if the CUDA extension is built and has machine code for this GPU."""
    if WHY_NOT_CUDA or device.type != "cuda" or torch.compiler.is_compiling():  # what is traced cannot ask a driver
        return WHY_NOT_CUDA
    return _why_not_gpu(device)


@functools.cache
def _why_not_gpu(device: torch.device) -> str | None:
    reason = cuda.why_not(torch.cuda.current_device() if device.index is None else device.index)
    if not reason:
        return None
    return f"the CUDA extension cannot run on {device} ({reason}); build it on that machine, or set PGOLF_CUDA_ARCHS"
