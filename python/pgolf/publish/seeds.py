"""Several runs that are to be reported as the seeds of one config, and every reason why they may not be.

Fields that differ, other data, a score that some lack, a score of another artifact, and runs that were started but are
not among them: each stops with what is wrong, because each has been published unnoticed.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from .. import ledger, run
from ..config import Config
from ..errors import InputError


@dataclass(frozen=True)
class SeedRun:
    """One run: its config, its log, its scores by name as scores.json has them."""

    path: Path
    cfg: Config
    events: list[dict]
    scores: dict[str, dict]

    def last(self, event: str) -> dict:
        """The last event of that name; {} if there is none."""
        return next((e for e in reversed(self.events) if e["event"] == event), {})

    @property
    def data(self) -> dict:
        """The provenance of the training data; {} if the log does not say."""
        return self.last("start").get("data", {})


@dataclass(frozen=True)
class Seeds:
    """The runs, in the order of their seeds. unreported: runs of this config and data that are not among them;
    unrecorded: those among them that no ledger knows; reason: why that is accepted, as the user said."""

    runs: list[SeedRun]
    unreported: list[ledger.Entry]
    unrecorded: list[Path]
    reason: str | None

    @property
    def num_started(self) -> int | None:
        """Runs of this config ever started; None if no ledger can tell."""
        return None if self.unrecorded else len(self.runs) + len(self.unreported)

    def score(self, method: str) -> dict[int, dict]:
        """Seed -> score."""
        return {r.cfg.seed: r.scores[method] for r in self.runs}


def read_seeds(run_dirs: list[Path], allow_unreported: str | None = None) -> Seeds:
    """Read runs and check that they are seeds of one config, all of those that were started.

    Args:
        allow_unreported: the reason for which started runs may be missing here; it goes into what is published.

    Raises:
        InputError: they are not; the message says in what they differ or which are missing.
    """
    runs = sorted((_read(Path(path)) for path in run_dirs), key=lambda r: r.cfg.seed)
    first = runs[0]
    for other in runs[1:]:
        if fields := ledger.differing_fields(first.cfg, other.cfg):
            shown = "; ".join(f"{name} is {a!r} and {b!r}" for name, a, b in fields)
            raise InputError(f"{first.path} and {other.path} must be runs of one config, but {shown}")
        if other.cfg.seed == first.cfg.seed or other.cfg.seed in {r.cfg.seed for r in runs if r is not other}:
            raise InputError(f"{other.path}: each seed may be reported once, got seed {other.cfg.seed} twice")
        for name in ("tokenizer_sha256", "sha256"):
            ours, theirs = first.data.get(name), other.data.get(name)
            if ours != theirs:
                what = "tokenizer" if name == "tokenizer_sha256" else "training data"
                raise InputError(f"{first.path} and {other.path} must share their {what}: {ours} and {theirs}")
    unreported, unrecorded = _missing(runs)
    if unreported and not allow_unreported:
        names = "; ".join(map(str, unreported))
        raise InputError(
            f"{len(runs)} of {len(runs) + len(unreported)} started runs of this config are given; missing: {names}. "
            "Report them too, or say why not with --allow-unreported REASON, which is published"
        )
    return Seeds(runs, unreported, unrecorded, allow_unreported if unreported or unrecorded else None)


def choose_methods(seeds: Seeds, wanted: list[str], allow_leaky: bool = False) -> list[str]:
    """The scores to report: `wanted`, or every whole and causal one; of all runs, made in the same way.

    Raises:
        InputError: a run lacks one, they are of other text or settings, or one leaks and allow_leaky is False.
    """
    known = list(dict.fromkeys(name for r in seeds.runs for name in r.scores))
    whole = [n for n in known if ", first " not in n]
    methods = wanted or [
        n for n in whole if allow_leaky or all(_causal(r.scores[n]) for r in seeds.runs if n in r.scores)
    ]
    if not methods:
        got = ", ".join(known) or "none"
        raise InputError(f"{seeds.runs[0].path}: holds no score to report (has: {got}); `pgolf eval` makes one")
    for name in methods:
        for r in seeds.runs:
            if name not in r.scores:
                has = ", ".join(r.scores) or "none"
                raise InputError(f"{r.path}: has no score {name!r} (has: {has}); make it with `pgolf eval`")
            if not _causal(r.scores[name]) and not allow_leaky:
                raise InputError(
                    f"{r.path}: {name} is {r.scores[name]['standing']}; --allow-leaky reports it all the same, stamped"
                )
        _check_alike(name, seeds)
    return methods


def _read(path: Path) -> SeedRun:
    cfg = run.read_config(path)
    scores = read_object(path / run.SCORES)
    artifact, digest = path / run.ARTIFACT, None
    if artifact.exists():
        digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
    for name, score in scores.items():
        if digest and score.get("artifact_sha256", digest) != digest:
            raise InputError(
                f"{path}: score {name!r} is of another artifact than {run.ARTIFACT}, which has changed since; score it "
                "again with `pgolf eval`"
            )
        bpb = score["val_loss"] / math.log(2) * score["tokens"] / max(score["bytes"], 1)
        if not math.isfinite(score["val_bpb"]) or abs(bpb - score["val_bpb"]) > 1e-6 * abs(bpb):
            raise InputError(f"{path}: score {name!r} does not add up: {score['val_bpb']} bits per byte, but {bpb}")
    return SeedRun(path, cfg, run.read_log(path), scores)


def read_object(path: Path) -> dict:
    """A JSON object; {} if there is no file. Raises InputError if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: must be JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value


def _missing(runs: list[SeedRun]) -> tuple[list[ledger.Entry], list[Path]]:
    """Started runs of this config and data that are not among `runs`, and those of `runs` that are in no ledger."""
    reported, entries, unrecorded = set(), {}, []
    for r in runs:
        place, sha256 = r.path.resolve(), ledger.config_sha256(r.cfg)
        same = [e for e in ledger.read(place.parent / ledger.LEDGER) if e.config_sha256 == sha256]
        same = [e for e in same if e.data_sha256 == r.data.get("sha256", e.data_sha256)]
        entries |= {e.id: e for e in same}
        mine = [e.id for e in same if e.run == place.name and e.seed == r.cfg.seed]
        reported |= set(mine[-1:])  # an earlier one of that name was deleted, and counts as a run of its own
        unrecorded += [r.path] * (not mine)
    return [e for e in entries.values() if e.id not in reported and not e.came_to_nothing], unrecorded


def _causal(score: dict) -> bool:
    return score.get("causal") is True


def _check_alike(name: str, seeds: Seeds) -> None:
    """One method's scores are of the same text and were made with the same settings."""
    first = seeds.runs[0]
    for r in seeds.runs[1:]:
        ours, theirs = first.scores[name], r.scores[name]
        for key in ("tokens", "bytes", "text"):
            if ours.get(key) != theirs.get(key):
                raise InputError(
                    f"{first.path} and {r.path}: {name!r} must be of the same text, but {key} is {ours.get(key)} and "
                    f"{theirs.get(key)}"
                )
        a, b = ours.get("settings", {}), theirs.get("settings", {})
        if fields := [k for k in {**a, **b} if a.get(k) != b.get(k)]:
            shown = "; ".join(f"{k} is {a.get(k)!r} and {b.get(k)!r}" for k in fields)
            raise InputError(f"{first.path} and {r.path}: {name!r} must be scored with the same settings, but {shown}")
