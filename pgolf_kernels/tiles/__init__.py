"""Tile sizes of the Triton kernels: one JSON table per GPU architecture, beside this file.

Nothing is tuned by itself, because compiling candidates costs minutes of a timed job. `python -m benchmarks.tune
--write` searches on the GPU at hand and leaves a table in `own_folder()`, which then comes before the shipped ones.

    {"capabilities": [[9, 0]], "measured_on": "NVIDIA H200",
     "newton_schulz": {"symmetric": [{"max_size": 512, "block_m": 64, ...}, {"block_m": 128, ...}]}}

A kernel's rows are read in order, and the first one whose bounds hold is taken: "max_size": 512 holds where the launch
says size <= 512, "min_..." the other way round. What else a row has are the fields of the kernel's tile.
"""

import functools
import json
import os
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

SHIPPED = ("sm_100", "sm_120", "sm_80", "sm_86", "sm_90")
TileT = TypeVar("TileT", bound=tuple)


class Gpu(NamedTuple):
    """What a launch has to know of the machine."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_bytes: int  # per block, opt-in


HOPPER = Gpu("NVIDIA H200", (9, 0), 132, 232_448)  # also what the interpreter on a CPU stands for


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The GPU behind a device."""
    if device.type != "cuda":
        return HOPPER
    found = torch.cuda.get_device_properties(device)
    capability = found.major, found.minor
    return Gpu(found.name, capability, found.multi_processor_count, found.shared_memory_per_block_optin)


def own_folder() -> Path:
    """Where tables tuned on this machine live: PGOLF_TILES, or pgolf_kernels/tiles in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PGOLF_TILES") or Path(cache, "pgolf_kernels", "tiles"))


def own_file(on: Gpu) -> Path:
    """The table that `benchmarks.tune --write` leaves for this GPU."""
    return own_folder() / (re.sub(r"\W+", "_", on.name) + ".json")


def shipped() -> dict[str, dict]:
    """The tables of this package, "sm_90" -> table."""
    return {name: _parse(f"{name}.json", pkgutil.get_data(__package__, f"{name}.json").decode()) for name in SHIPPED}


def read(path: Path) -> dict:
    """Raises ValueError, naming the file, unless it holds kernels' rows."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); write it again") from error
    return _parse(str(path), text)


def _parse(path: str, text: str) -> dict:
    try:
        table = json.loads(text)
        kernels = [rows for op in table.values() if isinstance(op, dict) for rows in op.values()]
        valid = all(isinstance(row, dict) for rows in kernels for row in rows)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a table of tiles ({error}); write it again, or delete it") from error
    if not valid:
        raise ValueError(f"{path}: not a table of tiles (rows must be objects); write it again, or delete it")
    return table


def write(path: Path, table: dict) -> None:
    """As `read` reads it, one row a line."""

    def kernel(name: str, rows: list[dict]) -> str:
        return f'    "{name}": [\n      ' + ",\n      ".join(map(json.dumps, rows)) + "\n    ]"

    parts = []
    for key, value in table.items():
        if isinstance(value, dict):
            parts.append(f'  "{key}": {{\n' + ",\n".join(kernel(*item) for item in value.items()) + "\n  }")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


@functools.cache
def _tables(on: Gpu) -> tuple[tuple[str, dict], ...]:
    """(name, table) in order of preference: this machine's own, its architecture's, the nearest that fits."""
    ship = shipped()
    known = [name for name, table in ship.items() if list(on.capability) in table["capabilities"]]
    fitting = [name for name, table in ship.items() if table["shared_bytes"] <= on.shared_bytes]
    nearest = known or sorted(fitting, key=lambda name: ship[name]["shared_bytes"])[-1:] or ["sm_86"]
    tables = [(f"{name}.json", ship[name]) for name in nearest]
    own = own_file(on)
    return ((str(own), read(own)), *tables) if own.exists() else tuple(tables)


@functools.cache
def tile(on: Gpu, op: str, kernel: str, kind: type[TileT], **facts: int) -> TileT:
    """The tile that kernel `kernel` of `op` takes on a GPU, as a `kind` (a NamedTuple), for a launch of these facts.

    Raises:
        ValueError: a table's row is not a `kind`, or none fits the facts.
    """
    for name, table in _tables(on):
        for row in table.get(op, {}).get(kernel, ()):
            bounds = {key: row[key] for key in row if key[:4] in ("min_", "max_")}
            if not all(_holds(key, bound, facts, name) for key, bound in bounds.items()):
                continue
            try:
                return kind(**{key: value for key, value in row.items() if key not in bounds})
            except TypeError as error:
                message = f"{name}: a row of {op}.{kernel} must have the fields {list(kind._fields)}"
                raise ValueError(f"{message} ({error}); write it again, or delete it") from error
    raise ValueError(f"no table of tiles has a row of {op}.{kernel} for {facts} on {on.name}")


def _holds(key: str, bound: int, facts: dict[str, int], name: str) -> bool:
    if key[4:] not in facts:
        raise ValueError(f"{name}: {key!r} bounds {key[4:]!r}, which is none of {sorted(facts)}; write it again")
    return facts[key[4:]] <= bound if key.startswith("max_") else facts[key[4:]] >= bound
