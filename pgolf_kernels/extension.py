"""Load the compiled extensions, or remember the sentence why not. Nothing here raises: the reference path always works.

`cpu` and `cuda` are the modules (or None); `WHY_NOT_CPU` and `WHY_NOT_CUDA` are None or the reason users see.
"""

import importlib
from types import ModuleType


def _load(name: str, what: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f".{name}", __package__), None
    except ImportError as error:
        return (
            None,
            f"the {what} extension is not available ({error}); build it with `python setup.py build_ext --inplace`",
        )


cpu, WHY_NOT_CPU = _load("_cpu", "CPU")
cuda, WHY_NOT_CUDA = _load("_cuda", "CUDA")
