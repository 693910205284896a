"""What the machine is and what it can do at best, measured in the process that reports a fraction of it."""

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from pgolf_kernels import extension

# glibc returns tensors above 32 MB to the system at once, and every new one costs page faults: up to half of torch's
# time on large batches. With this GLIBC_TUNABLES it keeps them, for both sides.
TUNED_MALLOC = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"

# What lowers PyTorch's instruction set to each of our levels: its own loops, oneDNN's and MKL's.
PEER_ISA = {
    "generic": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
}


def environment_for(isa: str | None, malloc: str) -> dict[str, str]:
    """Variables that must be set before Python starts, for benchmarks under another instruction set or allocator."""
    variables = {}
    if isa in PEER_ISA:
        aten, onednn, mkl = PEER_ISA[isa]
        variables |= {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
        # torch.compile's cache does not know of levels: what it kept for a better one gives infinities on this one.
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"pgolf_torchinductor_{isa}"))
    if isa:
        variables["PGOLF_ISA"] = isa
    if malloc == "tuned":
        variables["GLIBC_TUNABLES"] = TUNED_MALLOC
    return variables


@dataclass
class Limits:
    """Matrix-product peak per dtype (operations/s) and read bandwidth per level of memory, measured when first needed.

    On a CPU both are those of the instruction set in use, on as many threads as torch has; the peak is the better of
    our innermost loop on operands in the first-level cache and of torch's large square product.
    """

    device: str
    levels: list[tuple[float, float]] = field(default_factory=list)  # (bytes that fit, bytes/s), smallest first
    peaks: dict[torch.dtype, float] = field(default_factory=dict)

    def seconds(self, flops: float, bytes_moved: float, dtype: torch.dtype, working_set: float) -> float:
        """Least time for that much arithmetic and traffic, if the two overlap perfectly.

        working_set: bytes that are touched before the same ones are touched again; they fit the level that counts.
        """
        if dtype not in self.peaks:
            self.peaks[dtype] = _matmul_peak(self.device, dtype)
        bandwidth = next(rate for fits, rate in self.levels if working_set <= fits)
        return max(flops / self.peaks[dtype], bytes_moved / bandwidth)


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
    peak = 2 * size**3 / _best_seconds(lambda: a @ b, device)
    if device == "cpu" and extension.cpu and dtype in (torch.float32, torch.bfloat16):
        threads = torch.get_num_threads()
        peak = max(peak, extension.cpu.peak_operations(bf16=dtype == torch.bfloat16, threads=threads))
    return peak


def measure_limits(device: str) -> Limits:
    """Memory only; products are measured when a dtype is first asked for."""
    if device == "cpu" and extension.cpu:
        return Limits(device, _cpu_levels())
    count = (2 << 30) // 4 if device == "cuda" else (256 << 20) // 4
    x = torch.randn(count, device=device)  # fits no cache
    return Limits(device, [(float("inf"), 4 * count / _best_seconds(x.sum, device))])


def _cpu_levels() -> list[tuple[float, float]]:
    """Each cache from the second level on, read by all threads from half of what each has of it; then memory."""
    threads, levels, largest = torch.get_num_threads(), [], 0
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, size = int((index / "level").read_text()), (index / "size").read_text().strip()
        if level < 2 or (index / "type").read_text().strip() == "Instruction":
            continue
        shared = level > 2  # by all cores; the second level is a core's own
        total = int(size.removesuffix("K")) * 1024 * (1 if shared else threads)
        levels.append((total, extension.cpu.read_bandwidth(bytes=total // 2 // threads, threads=threads)))
        largest = max(largest, total)
    beyond = max(4 * largest, 256 << 20)
    return [*levels, (float("inf"), extension.cpu.read_bandwidth(bytes=beyond // threads, threads=threads))]


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name, family and model: virtual machines of several generations all call themselves "AMD EPYC"."""
    facts: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')} model {facts.get('model', '?')})"


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
    on_cpu = device == "cpu" and extension.cpu is not None
    return {
        "machine": machine,
        "torch": torch.__version__,
        "triton": triton_version,
        "threads": torch.get_num_threads(),
        "isa": extension.cpu.isa() if on_cpu else "",  # of our kernels, and with --isa of the peers too
        "malloc": "tuned" if os.environ.get("GLIBC_TUNABLES") == TUNED_MALLOC else "default",
    }
