"""ledger.jsonl beside the run directories: every training run that was ever started there, so that none is forgotten.

A run adds a line when training starts and one when it ends, well or badly; a killed one has no second line. Deleting a
run directory leaves its lines. They are appended in one write each, under a lock; a torn line is skipped.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .config import Config
from .errors import InputError

LEDGER = "ledger.jsonl"
# What may differ between runs of one config: the seed, the name, and what changes no weight beyond rounding.
NOT_COMPARED = (
    *("seed", "preset", "compile", "micro_batch_tokens"),
    *("log_every", "val_every", "val_tokens", "checkpoint_every"),
)
_DEFAULTS = dataclasses.asdict(Config())


@dataclass(frozen=True)
class Entry:
    """One started run. run: its directory's name. started: Unix seconds. steps: done, None if it never said.

    data_sha256: of Dataset.provenance(): the same config on other text is another experiment.

    outcome: "finished", "failed: why", or "" of a run that was killed or is still going.
    """

    id: str
    run: str
    config_sha256: str
    data_sha256: str
    seed: int
    preset: str
    started: float
    outcome: str = ""
    steps: int | None = None

    @property
    def came_to_nothing(self) -> bool:
        """Whether it failed before its first step, so that there was no result that could have been dropped."""
        return self.outcome.startswith("failed") and self.steps == 0

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.started))
        steps = "" if self.steps is None else f" after {self.steps} steps"
        return f"seed {self.seed} ({self.run}, started {when} UTC, {self.outcome or 'killed or running'}{steps})"


def config_sha256(cfg: Config) -> str:
    """The same for all runs of one config: over what differs from the defaults, without NOT_COMPARED."""
    values = {k: v for k, v in dataclasses.asdict(cfg).items() if v != _DEFAULTS[k] and k not in NOT_COMPARED}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differing_fields(a: Config, b: Config) -> list[tuple[str, object, object]]:
    """(field, value in a, value in b) of every field for which two runs are not of one config."""
    ours, theirs = dataclasses.asdict(a), dataclasses.asdict(b)
    return [(k, v, theirs[k]) for k, v in ours.items() if v != theirs[k] and k not in NOT_COMPARED]


class Recorder:
    """Writes a run's lines: `start` the first, leaving the `with` block the last.

    Args:
        run_dir: its parent holds the ledger.
        enabled: False writes nothing (every rank but 0).
    """

    def __init__(self, run_dir: Path, cfg: Config, enabled: bool):
        run_dir = Path(run_dir).resolve()
        self.path, self.run, self.cfg, self.enabled = run_dir.parent / LEDGER, run_dir.name, cfg, enabled
        self.id, self._steps = "", None

    def start(self, data_sha256: str, steps: Callable[[], int], resume: bool = False) -> None:
        """Write the first line.

        Args:
            data_sha256: of the dataset's provenance.
            steps: the steps done, asked at the end.
            resume: the run has its first line already.

        Raises:
            InputError: the ledger cannot be written: a run that is in none cannot be reported later.
        """
        if not self.enabled:
            return
        self._steps, sha256 = steps, config_sha256(self.cfg)
        same_run = (self.run, sha256, self.cfg.seed)
        known = [e for e in read(self.path) if (e.run, e.config_sha256, e.seed) == same_run] if resume else []
        if known:
            self.id = known[-1].id
            _append(self.path, {"event": "resume", "id": self.id, "time": round(time.time(), 3)})
            return
        entry = Entry(
            id=uuid.uuid4().hex,
            run=self.run,
            config_sha256=sha256,
            data_sha256=data_sha256,
            seed=self.cfg.seed,
            preset=self.cfg.preset,
            started=round(time.time(), 3),
        )
        self.id = entry.id
        values = {k: v for k, v in dataclasses.asdict(entry).items() if k not in ("outcome", "steps")}
        _append(self.path, {"event": "start", **values})

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _traceback) -> None:
        if self.id:
            outcome = "finished" if kind is None else f"failed: {kind.__name__}: {error}"[:200]
            line = {"event": "end", "id": self.id, "outcome": outcome, "steps": self._steps()}
            _append(self.path, {**line, "time": round(time.time(), 3)})


def read(path: Path) -> list[Entry]:
    """The runs of a ledger in the order in which they were started; no file: none.

    Raises:
        InputError: the file cannot be read.
    """
    entries: dict[str, Entry] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    for line in lines:
        try:
            values = json.loads(line)
            event = values.pop("event")
            if event == "start":
                entry = Entry(**values)
                entries[entry.id] = entry
            elif event in ("resume", "end"):
                done = {"outcome": values.get("outcome", ""), "steps": values.get("steps")}
                entries[values["id"]] = dataclasses.replace(entries[values["id"]], **done)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # torn: the process or the machine died while it wrote this line
    return list(entries.values())


def _append(path: Path, values: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            torn = size and os.pread(file.fileno(), 1, size - 1) != b"\n"
            file.write(b"\n" * bool(torn) + json.dumps(values).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: could not be written ({error.strerror}); runs are recorded there") from error
