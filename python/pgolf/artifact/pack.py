"""Pack a model's weights into an artifact file, and read one.

The limit of the challenge, 16,000,000 bytes, counts the file and the program together.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from .. import run
from ..config import Config
from ..errors import InputError
from ..progress import StageClock
from . import account, container
from .header import Header, TensorEntry
from .prune import Pruning, layer_by_layer, prune
from .quantise import (
    CodedTensor,
    dequantise_state,
    quantise_state,
    relative_errors,
    tensor_kind,
    wanted_hessians,
)

LIMIT_BYTES = 16_000_000
PACKING_FIELDS = (  # prefixes of the settings that a run may be packed with
    *("attn_bits", "attn_gptq", "mlp_bits", "mlp_clip", "mlp_gptq", "embed_bits", "embed_clip", "embed_gptq"),
    *("int6_", "gptq_", "calibration", "float16_max_values", "target_bytes", "compressor"),
)


@dataclass(frozen=True)
class PackReport:
    """What packing made; sizes in bytes. code_bytes is that of `code_bytes()`.

    Of `pack_state` and `pack_run` only: errors (relative, Frobenius) and stored bytes by kind of tensor, what pruning
    did if it was asked for, seconds by stage.
    """

    path: Path
    artifact_bytes: int
    code_bytes: int
    parameters: int
    sha256: str
    errors: dict[str, float] = field(default_factory=dict, compare=False)
    bytes_by_kind: dict[str, int] = field(default_factory=dict, compare=False)
    pruned: Pruning | None = field(default=None, compare=False)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)

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


OnProgress = Callable[[str, int, int], None]  # stage, done, total; total 0: unknown


def pack_state(
    config: Config,
    state: dict[str, Tensor],
    tokenizer_sha256: str,
    out: Path,
    allow_oversize: bool = False,
    extra: dict | None = None,
    hessians: dict[str, Tensor] | None = None,
    on_progress: OnProgress | None = None,
) -> PackReport:
    """Quantise a model's export by its config and write it to `out`.

    Args:
        state: name -> tensor as `GPT.export_state` gives it.
        tokenizer_sha256: of the tokenizer the model was trained with, 64 hexadecimal digits.
        allow_oversize: write the file even if file and code together exceed LIMIT_BYTES.
        extra: JSON values to record in the header.
        hessians: of calibration.py; needed if config uses GPTQ.

    Raises:
        InputError: a tensor cannot be stored, the result is too large, or `out` cannot be written.
    """
    clock = StageClock(on_progress)
    with clock.stage("quantising") as progress:
        tensors = quantise_state(config, state, hessians, progress)
    pruned, data = None, b""

    def encode(tensors: dict[str, CodedTensor]) -> bytes:
        return container.encode(make_content(config, tensors, tokenizer_sha256, extra))

    if config.target_bytes:
        program = code_bytes(config, extra)
        with clock.stage("pruning") as progress:
            kinds = {name: tensor_kind(config, name, tuple(t.shape)) for name, t in tensors.items()}
            matrices = layer_by_layer(name for name, kind in kinds.items() if kind in ("attn", "mlp"))

            def measure(tensors: dict[str, CodedTensor]) -> int:
                nonlocal data
                encoded = encode(tensors)
                if len(encoded) + program <= config.target_bytes:
                    data = encoded  # the last that fits is the one with the fewest zeros
                return len(encoded) + program

            tensors, pruned = prune(tensors, matrices, config.target_bytes, measure, progress)
    else:
        with clock.stage("compressing"):
            data = encode(tensors)
    report = _write(data, tensors, out, allow_oversize, code_bytes(config, extra))
    with clock.stage("accounting"):
        errors = relative_errors(config, state, tensors)
        by_kind = account.kind_bytes(config, tensors, account.plane_bytes(data))
    return dataclasses.replace(report, errors=errors, bytes_by_kind=by_kind, pruned=pruned, seconds=clock.seconds)


def pack_run(
    run_dir: Path,
    out: Path,
    allow_oversize: bool = False,
    settings: list[str] = (),
    data: Path | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> PackReport:
    """`pack_state` for the weights that a training run left behind; the run's log gets a line.

    Args:
        settings, data, device: of `load_run`.

    Raises:
        InputError: as `load_run` and `pack_state`.
    """
    loaded = load_run(run_dir, settings, data, device, on_progress)
    report = pack_state(
        loaded.config, loaded.state, loaded.tokenizer, out, allow_oversize, loaded.extra, loaded.hessians, on_progress
    )
    report = dataclasses.replace(report, seconds={**loaded.seconds, **report.seconds})
    log_packing(run_dir, report, settings)
    return report


class LoadedRun(NamedTuple):
    """What `pack_state` needs of a run: config, export, SHA-256 of the tokenizer, extra, Hessians; seconds by stage."""

    config: Config
    state: dict[str, Tensor]
    tokenizer: str
    extra: dict
    hessians: dict[str, Tensor] | None
    seconds: dict[str, float]


def load_run(
    run_dir: Path,
    settings: list[str] = (),
    data: Path | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> LoadedRun:
    """The weights that a training run left behind, calibrated if its config uses GPTQ.

    Args:
        settings: `field=value` changes of the run's config, for what concerns the artifact.
        data: the run's dataset, for calibration where the run has not kept the Hessians that GPTQ needs.
        device: where such calibration runs; the rest is done on the CPU.

    Raises:
        InputError: run_dir is no finished run, or settings concern something else.
    """
    for setting in settings:
        if not setting.startswith(PACKING_FIELDS):
            raise InputError(f"pack: {setting!r} is not about the artifact; the run fixes the model and its training")
    config = run.read_config(run_dir).with_settings(list(settings))
    if not (run_dir / run.MODEL).exists():
        raise InputError(
            f"{run_dir}: holds no {run.MODEL}; finish the run first (`pgolf train --resume --run {run_dir}`)"
        )
    tokenizer = hashlib.sha256(read_bytes(run_dir / run.TOKENIZER)).hexdigest()
    state, hessians, clock = load_safetensors(run_dir / run.MODEL), None, StageClock(on_progress)
    wanted = wanted_hessians(config, {name: tuple(t.shape) for name, t in state.items()})
    if wanted:
        from .calibration import hessians_of_run  # imports the model, which packing without GPTQ does not need

        with clock.stage("calibrating") as progress:
            hessians = hessians_of_run(run_dir, config, state, wanted, data, device, progress)
    extra = {run.TRAINED_STEPS: run.trained_steps(run_dir), run.IMPLEMENTATIONS: run.implementations(run_dir)}
    return LoadedRun(config, state, tokenizer, extra, hessians, clock.seconds)


def log_packing(run_dir: Path, report: PackReport, settings: list[str]) -> None:
    """A line of the run's log: sizes, clocks, and what was set over its config."""
    log = run.RunLog(run_dir / run.LOG)
    sizes = {name: getattr(report, name) for name in ("artifact_bytes", "code_bytes", "sha256")}
    log.write("pack", **sizes, seconds=report.seconds, settings=list(settings))
    log.close()


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
    return _write(data, tensors, out, allow_oversize, code_bytes(config, extra))


def _write(
    data: bytes, tensors: dict[str, CodedTensor], out: Path, allow_oversize: bool, program_bytes: int
) -> PackReport:
    report = PackReport(
        path=Path(out),
        artifact_bytes=len(data),
        code_bytes=program_bytes,
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


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises InputError if it is none."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error


def code_bytes(config: Config, extra: dict | None = None) -> int:
    """What counts beside an artifact: the program that `pgolf bundle` would make of its run before it is scored.

    A bundled program knows its own size.

    Args:
        extra: of the artifact's header, which names the implementations that the training used.
    """
    own = getattr(sys.modules[__name__].__spec__.loader, "program_bytes", None)
    if own is not None:
        return own
    from ..publish.bundle import counted_bytes

    return counted_bytes(config, extra or {})
