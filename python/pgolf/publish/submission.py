"""`pgolf submit`: the folder of a pull request to openai/parameter-golf, or the sentence why there is none yet.

Everything is checked before a file is written, and the folder appears by a rename. Whatever it says of compliance comes
from the audits; whatever it says of clocks and sizes is measured on the strict side.
"""

import datetime
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import run
from ..artifact.pack import LIMIT_BYTES, read_content
from ..errors import InputError
from ..script import log_lines, score_lines
from .clocks import LIMIT_S, clocks, seconds_over
from .compliance import AUDIT, audit_of, fields
from .seeds import SeedRun, Seeds, choose_methods, read_object, read_seeds
from .stats import Reference, compare, find_reference, summary

RECORD, NON_RECORD = "10min_16mb", "non_record_16mb"
MIN_SEEDS = 3
PROGRAM = "train_gpt.py"


@dataclass(frozen=True)
class Author:
    """Who submits, and what they call it. blurb: one paragraph on what is different."""

    author: str
    github_id: str
    name: str
    blurb: str


@dataclass(frozen=True)
class Submission:
    """Runs that have passed every check. audits, clocks, artifact_bytes: in the order of the runs."""

    author: Author
    track: str
    seeds: Seeds
    method: str
    audits: list[dict]
    clocks: list[dict]
    artifact_bytes: list[int]
    code_bytes: int
    reference: Reference | None

    @property
    def runs(self) -> list[SeedRun]:
        return self.seeds.runs

    @property
    def environment(self) -> dict:
        return read_object(self.runs[0].path / run.ENVIRONMENT)

    @property
    def hardware(self) -> str:
        e = self.environment
        return f"{e.get('world_size', 1)}x {e.get('gpu') or e.get('cpu') or 'unknown'}"

    @property
    def date(self) -> str:
        """The day of the last event of any run."""
        last = max(e["time"] for r in self.runs for e in r.events)
        return datetime.datetime.fromtimestamp(last, datetime.UTC).strftime("%Y-%m-%d")


def submit(
    run_dirs: list[Path],
    out: Path,
    author: Author,
    *,
    method: str | None = None,
    against: list[str] = (),
    track: str = RECORD,
    allow_unreported: str | None = None,
) -> dict:
    """Write the folder.

    Args:
        run_dirs: the seeds; packed, scored and audited.
        out: must not exist or be empty.
        method: the score that counts; None: the one that is audited.
        against, allow_unreported: as in `stats`.
        track: RECORD or NON_RECORD; the latter asks neither for three seeds nor for the clocks.

    Returns:
        {"out", "files": {name: bytes}, "submission": the content of submission.json}

    Raises:
        InputError: a check fails; nothing is written.
    """
    from .readme import render

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: must be a new or an empty folder; delete it or name another with --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        checked = check(run_dirs, author, partial, method, against, track, allow_unreported)
        content = submission_json(checked)
        files = {
            "submission.json": json.dumps(content, indent=2) + "\n",
            "requirements.txt": requirements(checked.environment),
            **{f"train_seed{r.cfg.seed}.log": training_log(r, checked.method) for r in checked.runs},
        }
        for r in checked.runs:
            shutil.copyfile(r.path / AUDIT, partial / f"audit_seed{r.cfg.seed}.json")
        if not checked.runs[0].data.get("name", "").startswith("fineweb10B"):
            shutil.copyfile(checked.runs[0].path / run.TOKENIZER, partial / run.TOKENIZER)
        names = sorted({*files, *(p.name for p in partial.iterdir())})
        files["README.md"] = render(checked, content, names)
        for name, text in files.items():
            run.write_atomically(partial / name, text.encode())
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sizes = {p.name: p.stat().st_size for p in sorted(out.iterdir())}
    return {"out": str(out), "files": sizes, "submission": content}


def check(
    run_dirs: list[Path],
    author: Author,
    out: Path,
    method: str | None,
    against: list[str],
    track: str,
    allow_unreported: str | None,
) -> Submission:
    """Every reason why runs may not be submitted; leaves the program, whose size counts, in `out`."""
    seeds = read_seeds(run_dirs, allow_unreported)
    if seeds.unrecorded and not allow_unreported:
        raise InputError(
            f"{seeds.unrecorded[0]}: is in no ledger, so how many runs were started is unknown; keep its folder's "
            "ledger.jsonl, or say what happened with --allow-unreported REASON, which is published"
        )
    for r in seeds.runs:
        _check_finished(r)
    method = method or _audited_method(seeds)
    choose_methods(seeds, [method])
    audits = [audit_of(r, method) for r in seeds.runs]
    if track == RECORD and len(seeds.runs) < MIN_SEEDS:
        raise InputError(
            f"submit: a record takes {MIN_SEEDS} seeds, got {len(seeds.runs)}; run more, or use --track {NON_RECORD}"
        )
    times = [clocks(r, method) for r in seeds.runs]
    if track == RECORD:
        for r, t in zip(seeds.runs, times, strict=True):
            _check_clocks(r, t)
    sizes, code = [(r.path / run.ARTIFACT).stat().st_size for r in seeds.runs], write_program(seeds.runs[0].path, out)
    for r, size in zip(seeds.runs, sizes, strict=True):
        if size + code > LIMIT_BYTES:
            raise InputError(
                f"{r.path}: artifact and code may take {LIMIT_BYTES:,} bytes together, got {size:,} + {code:,} = "
                f"{size + code:,}, {size + code - LIMIT_BYTES:,} too many; pack it again with target_bytes"
            )
    reference = find_reference(list(against), method, allow_leaky=False)
    return Submission(author, track, seeds, method, audits, times, sizes, code, reference)


def write_program(run_dir: Path, out: Path) -> int:
    """Write the run's bundled train_gpt.py into `out` and return its counted bytes."""
    from .bundle import write_bundle

    return write_bundle(run_dir, out, form="wrapped").counted_bytes


def _check_finished(r: SeedRun) -> None:
    artifact = r.path / run.ARTIFACT
    if not r.last("end"):
        raise InputError(f"{r.path}: training has not finished; continue it with `pgolf train --resume`")
    if not artifact.exists():
        raise InputError(f"{r.path}: holds no {run.ARTIFACT}; make it with `pgolf pack {r.path}`")
    read_content(artifact)  # raises where the file does not fit its own digest


def _audited_method(seeds: Seeds) -> str:
    """The name of the score that the first run's audit is of."""
    from .compliance import read_audit

    first = seeds.runs[0]
    audited = read_audit(first.path / AUDIT)["method"]
    names = [name for name, score in first.scores.items() if name == audited and score["method"] == audited]
    if not names:
        raise InputError(f"{first.path}: has no whole, causal score by {audited!r}, which its audit is of")
    return names[0]


def _check_clocks(r: SeedRun, times: dict[str, float]) -> None:
    for what, over in seconds_over(times).items():
        if over > 0:
            raise InputError(
                f"{r.path}: {what} may take {LIMIT_S:g} s, took {LIMIT_S + over:.1f} s, {over:.1f} s too long"
            )


def submission_json(s: Submission) -> dict:
    """The fields that readers of submission.json know, then ours; all flat but the two that they know as objects."""
    of, pre = summary(s.seeds, s.method), [r.last("end") for r in s.runs]
    bpb, loss = of["val_bpb"], of["val_loss"]
    e, totals = s.environment, [size + s.code_bytes for size in s.artifact_bytes]
    content = {
        "author": s.author.author,
        "github_id": s.author.github_id,
        "name": s.author.name,
        "blurb": s.author.blurb,
        "date": s.date,
        "track": s.track,
        "val_bpb": round(bpb["mean"], 8),
        "val_bpb_std": _rounded(bpb["std"]),
        "val_loss": round(loss["mean"], 8),
        "val_loss_std": _rounded(loss["std"]),
        "std_ddof": 1,
        "pre_quant_val_bpb": round(statistics.fmean(end["val_bpb"] for end in pre), 8),
        "bytes_total": max(totals),
        "bytes_code": s.code_bytes,
        "artifact_bytes_mean": round(statistics.fmean(s.artifact_bytes)),
        "artifact_bytes_max": max(s.artifact_bytes),
        "step_stop": min(end["step"] for end in pre),
        "wallclock_seconds": max(t["train_strict"] for t in s.clocks),
        "eval_seconds": max(t["eval_strict"] for t in s.clocks),
        "hardware": s.hardware,
        "pytorch_version": (e.get("versions") or {}).get("torch"),
        "cuda_version": e.get("cuda"),
        "method": s.audits[0]["method"],
        "seeds": [r.cfg.seed for r in s.runs],
        "seed_results": {str(r.cfg.seed): _seed_result(s, i) for i, r in enumerate(s.runs)},
        "runs_started": s.seeds.num_started,
        "runs_reported": len(s.runs),
        "compliance": fields(s.audits, s.clocks, totals),
        "audit_sha256": ",".join(audit["sha256"] for audit in s.audits),
    }
    if s.seeds.reason:
        content["unreported_reason"] = s.seeds.reason
    if s.reference:
        a = compare(s.seeds, s.method, s.reference)
        content |= {
            "comparison_baseline": a["name"],
            "comparison_val_bpb": a["mean_bpb"],
            "delta_bpb": round(-a["gain_bpb"], 8),
            "delta_nats": round(-a["gain_nats"], 8),
            "test": f"{a['test']}, one-sided",
            "p_value": a["p_better"],
            "p_value_0_005_nats": a["p_bar"],
        }
    return content


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 8)


def _seed_result(s: Submission, i: int) -> dict:
    r, t = s.runs[i], s.clocks[i]
    score, end = r.scores[s.method], r.last("end")
    return {
        "val_bpb": round(score["val_bpb"], 8),
        "val_loss": round(score["val_loss"], 8),
        "pre_quant_val_bpb": round(end["val_bpb"], 8),
        "artifact_bytes": s.artifact_bytes[i],
        "steps": end["step"],
        "step_avg_ms": round(1e3 * end["train_seconds"] / max(end["step"], 1), 2),
        "train_time_s": t["train_strict"],
        "eval_time_s": t["eval_strict"],
        "audit_sha256": s.audits[i]["sha256"],
    }


def requirements(environment: dict) -> str:
    """requirements.txt: the packages of the run's environment at its versions, without the build of a local index."""
    versions = environment.get("versions") or {}
    return "".join(f"{name}=={version.partition('+')[0]}\n" for name, version in versions.items() if version)


def training_log(r: SeedRun, method: str) -> str:
    """The run's log in the text form of the published systems, then its packing, its scores and its clocks."""
    score, data = r.scores[method], r.data
    lines = [
        f"seed:{r.cfg.seed} preset:{r.cfg.preset}",
        f"train_shards:{data.get('train_shards')} train_tokens:{data.get('train_tokens')} val_tokens:{score['tokens']}",
    ]
    write: Callable[[str, dict], None] = log_lines(r.cfg, lines.append)
    for event in r.events:
        write(event["event"], event)
        if event["event"] == "calibrate":
            lines.append(f"calibration: {event['batches']} batches time:{1e3 * event['seconds']:.0f}ms")
        elif event["event"] == "pack":
            stages = " ".join(f"{stage}:{1e3 * seconds:.0f}ms" for stage, seconds in event["seconds"].items())
            lines.append(f"Serialized model int6+{r.cfg.compressor}: {event['artifact_bytes']} bytes ({stages})")
    cfg = r.cfg.replace(**{k: tuple(v) if isinstance(v, list) else v for k, v in score["settings"].items()})
    lines += score_lines(cfg, score["method"], score)
    lines += [f"clock {name}: {seconds:.3f} s" for name, seconds in clocks(r, method).items()]
    return "\n".join(lines) + "\n"
