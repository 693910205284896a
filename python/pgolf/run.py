"""A run directory: config.json, environment.json, log.jsonl, tokenizer.model, checkpoints/, model.safetensors, with
GPTQ hessians.safetensors, then artifact.pgolf, scores.json and report.html. Only rank 0 writes to it."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch

from .config import Config
from .errors import InputError

CONFIG, ENVIRONMENT, LOG = "config.json", "environment.json", "log.jsonl"
TOKENIZER, MODEL, ARTIFACT, SCORES, REPORT = (
    "tokenizer.model",
    "model.safetensors",
    "artifact.pgolf",
    "scores.json",
    "report.html",
)
TRAINED_STEPS = "train_steps"  # in the metadata of MODEL, then in the header of ARTIFACT
IMPLEMENTATIONS = "implementations"  # an event of LOG, then in the header of ARTIFACT


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` so that a crash or a full disk leaves the old file.

    Raises:
        InputError: the disk is full or not writable.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: could not be written ({error}); what was there before is untouched") from error


def read_config(run_dir: Path) -> Config:
    path = run_dir / CONFIG
    if not path.exists():
        raise InputError(f"{run_dir}: not a run directory (no {CONFIG}); train one with `pgolf train --run {run_dir}`")
    return Config.from_json(path.read_text())


def trained_steps(run_dir: Path) -> int:
    """Steps behind the weights of a run. They say which layers its model runs twice: Config.recurs_after."""
    path = run_dir / MODEL
    try:
        with safetensors.safe_open(path, "pt") as f:
            return int((f.metadata() or {}).get(TRAINED_STEPS, 0))
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise InputError(f"{path}: not a safetensors file of weights ({error})") from error


class RunLog:
    """Appends one JSON object a line. Every line has "event" and "time" (Unix seconds).

    Args: on_event: called with (event, values) of each line.
    """

    def __init__(self, path: Path, on_event: Callable[[str, dict], None] | None = None):
        self._on_event = on_event
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and not path.read_bytes().endswith(b"\n")  # killed while it wrote a line
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def write(self, event: str, **values: object) -> None:
        self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()
        if self._on_event:
            self._on_event(event, values)

    def close(self) -> None:
        self._file.close()


def read_log(run_dir: Path) -> list[dict]:
    """The events of a run in order; a step repeated after a resume appears once, as last written."""
    events, position_of_step = [], {}
    path = run_dir / LOG
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # the process was killed while it wrote this line
        if event["event"] == "step" and event["step"] in position_of_step:
            events[position_of_step[event["step"]]] = event
            continue
        if event["event"] == "step":
            position_of_step[event["step"]] = len(events)
        events.append(event)
    return events


def implementations(run_dir: Path) -> dict[str, str]:
    """Which implementation each op of the training used, by its log; empty if that says nothing."""
    found = {}
    for event in read_log(run_dir):
        found |= event[IMPLEMENTATIONS] if event["event"] == IMPLEMENTATIONS else {}
    return found


def read_scores(folder: Path) -> dict[str, dict]:
    """What scores.json in a folder holds, by name; empty if there is none. Raises InputError if it is damaged."""
    path = folder / SCORES
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it and score again") from error


def update_json(path: Path, key: str, value: object) -> None:
    """Set one key of a JSON object in a file, keeping the others."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content[key] = value
    write_atomically(path, json.dumps(content, indent=2).encode())


def describe_environment(device: torch.device, world_size: int) -> dict:
    """Versions, processor, GPU and commit: what someone needs to know to compare two runs."""
    versions = {}
    for package in ("torch", "triton", "numpy", "sentencepiece", "brotli", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    environment = {
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(terse=True),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "world_size": world_size,
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment["gpu"] = properties.name
        environment["gpu_memory_bytes"] = properties.total_memory
        environment["cuda"] = torch.version.cuda
    return environment


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    folder = Path(__file__).parent
    if not folder.is_dir():  # a bundled program, whose modules lie in no folder
        return None
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip() or None
