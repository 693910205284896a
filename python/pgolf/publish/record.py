"""What a run directory holds, read once for the report; whatever is missing is None or empty."""

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import run
from ..artifact.inspect import inspect
from ..config import Config
from ..presets import PRESETS

# The stages of a run's score, in the order in which a report tells them; those of EXPECTED are missed if they lack.
TRAINED = "Trained weights"
SCORE_NAMES = {
    "plain": "After int6",
    "sliding": "Sliding window",
    "slot": "Sliding + SLOT",
    "ttt": "Sliding + TTT",
    "slot+ttt": "SLOT + TTT",
    "ctw": "Sliding + context tree",
}
EXPECTED = ("plain", "sliding", "slot")
INVALID = "INVALID "


@dataclass(frozen=True)
class ScoreName:
    """The key of a score in scores.json, taken apart: [INVALID ]METHOD[ VARIANT][, PART]."""

    method: str
    variant: str
    part: str
    valid: bool

    @classmethod
    def of(cls, key: str, score: dict) -> "ScoreName":
        name, _, part = key.removeprefix(INVALID).partition(", ")
        method, _, variant = name.partition(" ")
        return cls(method, variant, part, score.get("causal", True) and not key.startswith(INVALID))

    @property
    def order(self) -> tuple:
        """Valid and whole ones first, then as SCORE_NAMES has them."""
        known = list(SCORE_NAMES)
        place = known.index(self.method) if self.method in known else len(known)
        return not self.valid, self.part, place, self.method, self.variant

    def __str__(self) -> str:
        text = SCORE_NAMES.get(self.method, self.method)
        text += f" ({self.variant})" if self.variant else ""
        return f"{'' if self.valid else INVALID}{text}{', ' if self.part else ''}{self.part}"


@dataclass(frozen=True)
class RunRecord:
    """One run. scores: all of scores.json, by name in reading order; `artifact_error`: why an artifact is not read."""

    name: str
    cfg: Config
    environment: dict
    events: list[dict]
    scores: dict[ScoreName, dict]
    artifact: dict | None
    artifact_error: str | None

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """Raises InputError where there is no run."""
        cfg = run.read_config(run_dir)
        artifact, error = None, None
        if (run_dir / run.ARTIFACT).exists():
            try:
                artifact = inspect(run_dir / run.ARTIFACT)
            except ValueError as problem:
                error = str(problem)
        named = [(ScoreName.of(key, score), score) for key, score in _read_object(run_dir / run.SCORES).items()]
        return cls(
            name=run_dir.resolve().name,
            cfg=cfg,
            environment=_read_object(run_dir / run.ENVIRONMENT),
            events=run.read_log(run_dir),
            scores=dict(sorted(named, key=lambda pair: pair[0].order)),
            artifact=artifact,
            artifact_error=error,
        )

    def of(self, event: str) -> list[dict]:
        return [e for e in self.events if e["event"] == event]

    @property
    def start(self) -> dict | None:
        """The first start: a resumed run has several."""
        return next(iter(self.of("start")), None)

    @property
    def end(self) -> dict | None:
        return next(iter(self.of("end")[::-1]), None)

    @property
    def resumed_at(self) -> list[int]:
        return [e["step"] for e in self.of("start")[1:]]

    @functools.cached_property
    def steps(self) -> dict[str, np.ndarray]:
        """Columns of the step events: step, loss, grad_norm, lr, step_ms, elapsed_s; empty arrays if there are none."""
        events = sorted(self.of("step"), key=lambda e: e["step"])
        names = ("step", "loss", "grad_norm", "lr", "step_ms", "elapsed_s")
        return {name: np.array([e[name] for e in events], dtype=np.float64) for name in names}

    @property
    def implementations(self) -> dict[str, str]:
        """Op to implementation, over all starts and the end; a later one wins."""
        merged = {}
        for event in self.events:
            merged |= event.get("implementations", {})
        return merged

    @property
    def last_step(self) -> int:
        return int(self.end["step"] if self.end else max(self.steps["step"], default=0))

    @property
    def train_seconds(self) -> float:
        return float(self.end["train_seconds"] if self.end else max(self.steps["elapsed_s"], default=0.0))

    @property
    def tokens_per_second(self) -> float | None:
        if self.end:
            return self.end["tokens_per_second"]
        return self.last_step * self.cfg.train_batch_tokens / self.train_seconds if self.train_seconds else None

    @property
    def stages(self) -> list[tuple[str, float]]:
        """(name, bits per byte) of what may be compared: the trained weights and every valid score of all the text."""
        trained = [(TRAINED, self.end["val_bpb"])] if self.end else []
        return trained + [(str(name), score["val_bpb"]) for name, score in self._comparable.items()]

    @property
    def _comparable(self) -> dict[ScoreName, dict]:
        return {name: score for name, score in self.scores.items() if name.valid and not name.part}

    @property
    def same_text(self) -> bool:
        """Whether `stages` are of the same tokens: their bytes per token, val_loss / (ln 2 val_bpb), tell."""
        scores = [*self._comparable.values(), *([self.end] if self.end else [])]
        ratios = np.array([score["val_loss"] / (score["val_bpb"] or np.nan) for score in scores])
        counts = {score["tokens"] for score in self._comparable.values()}
        return len(counts) <= 1 and np.allclose(ratios, ratios[:1], rtol=1e-9, atol=0)

    def base_config(self) -> tuple[str, Config]:
        """What the settings are compared with: the preset, or the defaults where the preset has no such name."""
        if self.cfg.preset in PRESETS:
            return f"preset {self.cfg.preset}", PRESETS[self.cfg.preset]
        return "default", Config(preset=self.cfg.preset)

    def changed_settings(self) -> list[tuple[str, object, object]]:
        """(field, value in this run, value it is compared with) of every field that differs."""
        _, base = self.base_config()
        ours, theirs = dataclasses.asdict(self.cfg), dataclasses.asdict(base)
        return [(name, value, theirs[name]) for name, value in ours.items() if value != theirs[name]]


def _read_object(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min {rest} s"
