"""Memory that ends where the process may not touch another byte, and processes in which to find out.

Guard pages see what sanitizers do not: AMX's tile loads and stores, and vector loads of code built without them.
"""

import ctypes
import faulthandler
import functools
import mmap
import os
import shutil
import subprocess
from pathlib import Path


class Guarded:
    """Memory of `like`'s contents that ends (or starts) where the process may not touch another byte."""

    def __init__(self, like, at_end):
        like = like.contiguous()
        page, size = mmap.PAGESIZE, like.numel() * like.element_size()
        inside = -(-max(size, 1) // page) * page
        self.memory = mmap.mmap(-1, inside + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for fence in (start, start + page + inside):
            assert protect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
        self.address = start + page + (inside - size if at_end else 0)
        ctypes.memmove(self.address, like.data_ptr(), size)


def in_child(body):
    """Run body() in a forked child; return how it ended: 0, or minus the signal."""
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()  # a crash is an answer here
            body()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@functools.cache
def address_sanitizer():
    """The environment of a process that runs under AddressSanitizer; empty without g++ or its library.

    libstdc++ too: the sanitizer must find the function that throws before Python's modules bring it.
    """
    if shutil.which("g++") is None:
        return {}
    asked = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in asked]
    if not all(Path(path).is_absolute() for path in found):
        return {}
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
