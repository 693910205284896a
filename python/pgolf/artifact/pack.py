"""Pack a model's weights into an artifact file, load one, and take one apart to look inside or change it.

The limit of the challenge, 16,000,000 bytes, counts the file and the program together.
"""

import dataclasses
import functools
import hashlib
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

import pgolf_kernels

from .. import run
from ..config import Config
from ..errors import InputError
from . import container
from .header import Header, TensorEntry
from .quantise import CodedTensor, dequantise_state, quantise_state

LIMIT_BYTES = 16_000_000
CODES, HEADER = "codes.safetensors", "header.json"
_SCALE = "#scale"  # codes.safetensors holds a tensor's codes or values under its name, its scales under name + this


@dataclass(frozen=True)
class PackReport:
    """What packing made; sizes in bytes. code_bytes is the estimate of `code_bytes()`."""

    path: Path
    artifact_bytes: int
    code_bytes: int
    parameters: int
    sha256: str

    @property
    def total_bytes(self) -> int:
        return self.artifact_bytes + self.code_bytes

    @property
    def headroom_bytes(self) -> int:
        """What is left of the limit; negative if there is more than it allows."""
        return LIMIT_BYTES - self.total_bytes

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.artifact_bytes / max(1, self.parameters)

    def as_dict(self) -> dict:
        """All of it as JSON values."""
        derived = {name: getattr(self, name) for name in ("total_bytes", "headroom_bytes", "bits_per_parameter")}
        return {**dataclasses.asdict(self), "path": str(self.path), **derived}


@dataclass(frozen=True, eq=False)
class Artifact:
    """A loaded artifact. state: float32 tensors under the published names. header: its JSON object (header.py)."""

    config: Config
    state: dict[str, Tensor]
    header: dict


def pack_state(
    config: Config,
    state: dict[str, Tensor],
    tokenizer_sha256: str,
    out: Path,
    allow_oversize: bool = False,
    extra: dict | None = None,
) -> PackReport:
    """Quantise a model's export by its config and write it to `out`.

    Args:
        state: name -> tensor as `GPT.export_state` gives it.
        tokenizer_sha256: of the tokenizer the model was trained with, 64 hexadecimal digits.
        allow_oversize: write the file even if file and code together exceed LIMIT_BYTES.
        extra: JSON values to record in the header.

    Raises:
        InputError: a tensor cannot be stored, the result is too large, or `out` cannot be written.
    """
    return pack_tensors(config, quantise_state(config, state), tokenizer_sha256, out, allow_oversize, extra)


def pack_run(run_dir: Path, out: Path, allow_oversize: bool = False) -> PackReport:
    """`pack_state` for the weights that a training run left behind.

    Raises:
        InputError: run_dir is no finished run, or as `pack_state`.
    """
    config = run.read_config(run_dir)
    if not (run_dir / run.MODEL).exists():
        raise InputError(
            f"{run_dir}: holds no {run.MODEL}; finish the run first (`pgolf train --resume --run {run_dir}`)"
        )
    tokenizer = hashlib.sha256(read_bytes(run_dir / run.TOKENIZER)).hexdigest()
    extra = {run.TRAINED_STEPS: run.trained_steps(run_dir)}
    return pack_state(config, _load_safetensors(run_dir / run.MODEL), tokenizer, out, allow_oversize, extra)


def pack_tensors(
    config: Config,
    tensors: dict[str, CodedTensor],
    tokenizer_sha256: str,
    out: Path,
    allow_oversize: bool = False,
    extra: dict | None = None,
) -> PackReport:
    """`pack_state` for tensors that are coded already."""
    data = container.encode(make_content(config, tensors, tokenizer_sha256, extra))
    report = PackReport(
        path=Path(out),
        artifact_bytes=len(data),
        code_bytes=code_bytes(),
        parameters=sum(t.values.numel() for t in tensors.values()),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    if report.headroom_bytes < 0 and not allow_oversize:
        raise InputError(
            f"{out}: artifact and code may take {LIMIT_BYTES:,} bytes together, got {report.artifact_bytes:,} + "
            f"{report.code_bytes:,} = {report.total_bytes:,}; make the model smaller, or allow it with --allow-oversize"
        )
    run.write_atomically(report.path, data)
    return report


def make_content(
    config: Config, tensors: dict[str, CodedTensor], tokenizer_sha256: str, extra: dict | None = None
) -> container.Content:
    """What `container.encode` takes: to measure a size without writing a file."""
    entries = tuple(TensorEntry(name, t.role, tuple(t.shape)) for name, t in tensors.items())
    return container.Content(Header(config, tokenizer_sha256, entries, extra or {}), tensors)


def load_artifact(path: Path) -> Artifact:
    """Read an artifact; its tensors are dequantised to float32. Raises InputError, beginning with the path."""
    content = read_content(path)
    return Artifact(content.header.config, dequantise_state(content.tensors), content.header.as_dict())


def read_content(path: Path) -> container.Content:
    """The codes of an artifact as they are stored. Raises InputError, beginning with the path."""
    data = read_bytes(path)
    try:
        return container.decode(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """A file no larger than an artifact can be."""
    try:
        size = Path(path).stat().st_size
        if size > 2 * container.MAX_CONTENT_BYTES:
            raise InputError(f"{path}: not an artifact: none has {size:,} bytes")
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def unpack(path: Path, out_dir: Path) -> dict[str, Path]:
    """Take an artifact apart into out_dir: codes.safetensors (int8 codes, float16 scales and tensors), header.json.

    Returns:
        {"codes": path, "header": path}; `repack` makes the same bytes of them again.
    """
    content = read_content(path)
    tensors = {name: t.values for name, t in content.tensors.items()}
    tensors |= {name + _SCALE: t.scale for name, t in content.tensors.items() if t.scale is not None}
    paths = {"codes": Path(out_dir) / CODES, "header": Path(out_dir) / HEADER}
    run.write_atomically(paths["codes"], safetensors.torch.save(tensors))
    run.write_atomically(paths["header"], json.dumps(content.header.as_dict(), indent=1).encode())
    return paths


def repack(directory: Path, out: Path, allow_oversize: bool = False) -> PackReport:
    """Pack what `unpack` wrote. Raises InputError if the two files do not fit each other."""
    text = read_bytes(Path(directory) / HEADER)
    try:
        header = Header.from_json(text)
    except InputError as error:
        raise InputError(f"{directory}/{HEADER}: {error}") from error
    stored = _load_safetensors(Path(directory) / CODES)
    names = {e.name for e in header.tensors} | {e.name + _SCALE for e in header.tensors if e.role != "float16"}
    if names != set(stored):
        odd = sorted(names ^ set(stored))
        raise InputError(f"{directory}: {HEADER} and {CODES} must name the same tensors, but differ in {odd[:5]}")
    tensors = {}
    for e in header.tensors:
        try:
            tensors[e.name] = CodedTensor(e.role, e.shape, stored[e.name], stored.get(e.name + _SCALE))
        except InputError as error:
            raise InputError(f"{directory}/{CODES}: {e.name}: {error}") from error
    return pack_tensors(header.config, tensors, header.tokenizer_sha256, out, allow_oversize, header.extra)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error


@functools.cache
def code_bytes() -> int:
    """The sources of pgolf and pgolf_kernels (Python, C++, CUDA), concatenated and compressed by lzma.

    An estimate of what a submission's program takes: a bundle leaves out what the model does not use.
    """
    package = Path(pgolf_kernels.__file__).parent
    roots = (Path(__file__).parent.parent, package, package.parent / "csrc")
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    sources = [p for root in roots if root.is_dir() for p in sorted(root.rglob("*")) if p.suffix in suffixes]
    return len(lzma.compress(b"".join(p.read_bytes() for p in sources), preset=9))
