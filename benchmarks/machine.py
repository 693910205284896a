"""What the machine is and what it can do at best, measured in the process that reports a fraction of it."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch


@dataclass
class Limits:
    """Matmul peak per dtype (operations/s, measured when first asked for) and memory read bandwidth (bytes/s)."""

    device: str
    read_bytes: float
    peaks: dict[torch.dtype, float] = field(default_factory=dict)

    def seconds(self, flops: float, bytes_moved: float, dtype: torch.dtype) -> float:
        """Least time for that much arithmetic and traffic, if the two overlap perfectly."""
        if dtype not in self.peaks:
            self.peaks[dtype] = _matmul_peak(self.device, dtype)
        return max(flops / self.peaks[dtype], bytes_moved / self.read_bytes)


def _best_seconds(call: Callable[[], object], device: str, budget_seconds: float = 0.5) -> float:
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    best, begin = float("inf"), time.perf_counter()
    call()
    while time.perf_counter() - begin < budget_seconds:
        sync()
        start = time.perf_counter()
        call()
        sync()
        best = min(best, time.perf_counter() - start)
    return best


def _matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Operations/s of the vendor library on a large square product of random data (zeros would run faster)."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: a @ b, device)


def measure_limits(device: str) -> Limits:
    """Read bandwidth from the sum of a tensor that fits no cache."""
    count = (2 << 30) // 4 if device == "cuda" else (256 << 20) // 4
    x = torch.randn(count, device=device)
    return Limits(device, read_bytes=4 * count / _best_seconds(x.sum, device))


def _cpu_model() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown driver"


def describe_machine(device: str) -> dict[str, str | int]:
    """The columns of a result row that say where it was measured."""
    machine = f"{_cpu_model()}, {os.cpu_count()} CPUs"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, driver {_driver()}"
    try:
        triton_version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton_version = "none"
    return {
        "machine": machine,
        "torch": torch.__version__,
        "triton": triton_version,
        "threads": torch.get_num_threads(),
    }
