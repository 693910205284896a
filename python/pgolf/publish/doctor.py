"""What this machine offers: versions, processor, GPU, compilers, and the implementation each op would choose.

Of the ops only their own checks run, no kernel; a part that is missing is a sentence, never an error.
"""

import contextlib
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import pgolf_kernels
from pgolf_kernels import extension
from pgolf_kernels.ops.int6_linear import Int6Weight
from pgolf_kernels.ops.slot import AdamW

from ..config import Config
from ..model import activation_dtype
from ..run import cpu_name

D, HIDDEN, HEADS, KV_HEADS, VOCAB, TOKENS = 512, 1536, 8, 4, 1024, 128  # a layer of the Parameter Golf systems


def examine() -> dict:
    """What this machine offers, as a flat dict of strings and numbers.

    Ops have keys "<op>.<device>". Their value names the implementation that impl="auto" takes for a typical input, the
    dtype of that input, and for every implementation that cannot run the reason why.
    """
    facts = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _package("triton"),
        "platform": platform.platform(terse=True),
        "cpu": cpu_name(),
        "cpu_features": _cpu_features(),
        "cpu_kernels": _cpu_kernels(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": _gpu(),
        "cpu_extension": extension.WHY_NOT_CPU or "built",
        "cuda_extension": extension.WHY_NOT_CUDA or "built",
        "compiler": _tool(os.environ.get("CXX", "g++")),
        "nvcc": _nvcc(),
    }
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        dtype = activation_dtype(Config(), torch.device(device))
        for op, sample in SAMPLES.items():
            facts[f"{op}.{device}"] = _choice(op, sample, torch.device(device), dtype)
    return facts


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_features() -> str:
    if extension.cpu is None:
        return f"{torch.backends.cpu.get_cpu_capability()} (PyTorch's word; the CPU extension would say more)"
    return (
        ", ".join(name for name, present in extension.cpu.cpu_features().items() if present) or "none that kernels use"
    )


def _cpu_kernels() -> str:
    """The instruction set level of our own kernels."""
    if extension.cpu is None:
        return "none: the CPU extension is not built"
    try:
        return f"{extension.cpu.isa()} (this CPU can run {', '.join(extension.cpu.isa_levels())})"
    except ValueError as error:  # PGOLF_ISA names a level that this CPU cannot run
        return f"none: {error}"


def _gpu() -> str:
    if torch.cuda.is_available():
        found = []
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found.append(f"{p.name} ({p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor})")
        return f"{', '.join(found)}; CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        return f"none: this PyTorch ({torch.__version__}) is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "none: CUDA_VISIBLE_DEVICES is empty, which hides every GPU"
    if shutil.which("nvidia-smi") is None and not Path("/dev/nvidiactl").exists():
        return "none: no NVIDIA driver is installed"
    return f"none: PyTorch (CUDA {torch.version.cuda}) finds no usable GPU; is the driver recent enough?"


def _tool(name: str, pick: Callable[[list[str]], str] = lambda lines: lines[0]) -> str:
    """Path and version line of a program."""
    path = shutil.which(name)
    if path is None:
        return f"{name} is not on PATH"
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in told.stdout.splitlines() if line.strip()]
    return f"{path}: {pick(lines)}" if told.returncode == 0 and lines else f"{path}: does not run"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] * bool(home) + ["/usr/local/cuda/bin/nvcc", "nvcc"]  # the order of setup.py
    found = next((place for place in places if shutil.which(place)), "nvcc")
    return _tool(found, lambda lines: next((line for line in lines if "release" in line), lines[-1]))


def _choice(op: str, sample: "Sample", device: torch.device, dtype: torch.dtype) -> str:
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # explain prints; here its answer is a value
        args, kwargs = sample(device, dtype)
        choices = pgolf_kernels.explain(op, *args, **kwargs)
    used = next(choice.name for choice in choices if choice.used)
    refused = "; ".join(f"{choice.name}: {choice.reason}" for choice in choices if choice.reason)
    return f"{used}, {str(dtype).removeprefix('torch.')}" + (f" ({refused})" if refused else "")


Sample = Callable[[torch.device, torch.dtype], tuple[tuple, dict]]


def _newton_schulz(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    return (torch.zeros(2, D, D, device=device),), {"dtype": dtype}


def _newton_schulz_banks(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    return ([torch.zeros(shape, device=device) for shape in ((2, D, D), (1, HIDDEN, D))],), {"dtype": dtype}


def _leaky_relu2_mlp(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    return tuple(
        torch.zeros(shape, device=device, dtype=dtype) for shape in ((TOKENS, D), (HIDDEN, D), (D, HIDDEN))
    ), {}


def _causal_attention(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(torch.zeros(1, TOKENS, h, D // HEADS, device=device, dtype=dtype) for h in heads), {}


def _int6_linear(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    packed = torch.zeros(HIDDEN, 3 * D // 4, device=device, dtype=torch.uint8)
    weight = Int6Weight(packed, torch.ones(HIDDEN, device=device, dtype=torch.float16), (HIDDEN, D))
    return (torch.zeros(TOKENS, D, device=device, dtype=dtype), weight), {}


def _head(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.zeros(2, TOKENS, D, device=device, dtype=dtype)
    weight = torch.zeros(VOCAB, D, device=device, dtype=dtype)
    return hidden, weight, torch.zeros(2, TOKENS, device=device, dtype=torch.int64)


def _softcapped_cross_entropy(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    return _head(device, dtype), {}


def _slot_fit(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    mask = torch.ones(2, TOKENS, device=device, dtype=torch.bool)
    return (*_head(device, dtype), mask), {"parameters": "bias", "optimizer": AdamW(), "steps": 8}


def _slot_score(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    rows = torch.ones(2, TOKENS, device=device, dtype=torch.bool)
    return (*_head(device, dtype), None), {"rows": rows}


SAMPLES: dict[str, Sample] = {  # what the trainer and the evaluator pass
    "causal_attention": _causal_attention,
    "int6_linear": _int6_linear,
    "leaky_relu2_mlp": _leaky_relu2_mlp,
    "newton_schulz": _newton_schulz,
    "newton_schulz_banks": _newton_schulz_banks,
    "slot_fit": _slot_fit,
    "slot_score": _slot_score,
    "softcapped_cross_entropy": _softcapped_cross_entropy,
}
