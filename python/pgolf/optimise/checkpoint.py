"""Checkpoints of a training run: safetensors + JSON in one folder that appears by a rename, so it is whole or absent.

A crash or a full disk while saving leaves the previous checkpoint as it was.
"""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import Config
from ..errors import InputError

TENSORS, STATE = "tensors.safetensors", "state.json"


def save(run_dir: Path, step: int, tensors: dict[str, Tensor], state: dict) -> Path:
    """Write checkpoint `step` and drop older ones.

    Args:
        tensors: name -> tensor, on any device.
        state: JSON-serialisable.

    Raises:
        InputError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    folder = run_dir / "checkpoints"
    final, partial = folder / f"step_{step:08d}", folder / f"step_{step:08d}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # Clones: safetensors refuses tensors that share memory, and views of a bank do.
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial / TENSORS)
        (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
        for path in (partial / TENSORS, partial / STATE):
            with path.open("rb") as f:
                os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest(run_dir)
        raise InputError(
            f"checkpoint {final}: could not be written ({error}); "
            + (f"the previous one, {kept.name}, is untouched" if kept else "no earlier checkpoint exists")
        ) from error
    for old in folder.iterdir():
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    folder = run_dir / "checkpoints"
    found = sorted(p for p in folder.glob("step_*") if p.suffix != ".partial") if folder.is_dir() else []
    return found[-1] if found else None


def check(run_dir: Path, config: Config) -> None:
    """Refuse a newest checkpoint that another run wrote; its tensors are not read.

    Raises:
        InputError: its config is another one, or it cannot be read.
    """
    path = latest(run_dir)
    if path is None:
        return
    try:
        found = json.loads((path / STATE).read_text()).get("config") or {}
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"checkpoint {path}: cannot be read ({error}); delete it to start again") from error
    for name, ours in json.loads(config.to_json()).items():
        if found.get(name) != ours:
            raise InputError(
                f"checkpoint {path}: belongs to another run: its {name} is {found.get(name)!r}, this run's {ours!r}; "
                f"put the run's own checkpoint back or delete {path} to start again"
            )


def load(run_dir: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (on the CPU) and state of the newest checkpoint.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = latest(run_dir)
    if path is None:
        raise InputError(f"{run_dir}: no checkpoint; train first (`pgolf train --run {run_dir}`)")
    try:
        return load_file(path / TENSORS), json.loads((path / STATE).read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"checkpoint {path}: cannot be read ({error}); delete it to start again") from error
