"""What a submission may say about its own honesty: only what audit.json proves of this very artifact and method."""

from .. import run
from ..artifact.pack import LIMIT_BYTES
from ..audit.record import AUDIT
from ..audit.record import read as read_audit
from ..errors import InputError
from .clocks import seconds_over
from .seeds import SeedRun

EVALUATOR = "pgolf"  # audit.json's name for the evaluator of `pgolf eval`


def audit_of(r: SeedRun, method: str) -> dict:
    """The run's audit, checked to be of its artifact, of `method` as it was scored, and passed.

    Raises:
        InputError: it is not; a failed one names the violated conditions.
    """
    path = r.path / AUDIT
    audit, score = read_audit(path, r.path / run.ARTIFACT), r.scores[method]
    if audit["evaluator"] != EVALUATOR:
        raise InputError(f"{path}: audits the evaluator {audit['evaluator']!r}, the score is by `pgolf eval`")
    if audit["method"] != score["method"]:
        raise InputError(f"{path}: audits the method {audit['method']!r}, the score is of {score['method']!r}")
    ours, theirs = score["settings"], audit["settings"]
    if fields := sorted(name for name, value in ours.items() if name not in theirs or theirs[name] != value):
        shown = "; ".join(f"{name} is {theirs.get(name)!r} there and {ours[name]!r} in the score" for name in fields)
        raise InputError(f"{path}: audits other settings: {shown}")
    if audit["verdict"] != "pass":
        raise InputError(
            f"{path}: the audit did not pass; violated: {', '.join(map(str, audit['violated'])) or 'none'}"
        )
    return audit


def verdict(audit: dict, condition: str) -> str:
    """Of one condition: "fail" if a test failed, "pass" if one ran and none failed, "not run" if none ran."""
    verdicts = {t["verdict"] for t in audit["tests"] if t["condition"] == condition}
    return "fail" if "fail" in verdicts else "pass" if "pass" in verdicts else "not run"


def holds(audits: list[dict], condition: str) -> bool:
    """Whether every seed's audit passes the condition."""
    return all(verdict(audit, condition) == "pass" for audit in audits)


def fields(audits: list[dict], clocks: list[dict], totals: list[int]) -> dict:
    """The flat truth values of submission.json, under the names that its readers know."""
    parts = set(audits[0]["method"].split("+"))
    over = [seconds_over(c) for c in clocks]
    return {
        "train_under_600s": all(o["training and calibration"] <= 0 for o in over),
        "eval_under_600s": all(o["loading and scoring"] <= 0 for o in over),
        "artifact_under_16mb": all(total <= LIMIT_BYTES for total in totals),
        "three_seeds": len(audits) >= 3,
        "c1_causal": holds(audits, "C1"),
        "c2_normalised": holds(audits, "C2"),
        "c3_score_before_update": holds(audits, "C3"),
        "c4_single_pass": holds(audits, "C4"),
        "no_slot": "slot" not in parts,
        "no_etlb": "etlb" not in parts,
        "no_ngram_cache": "ctw" not in parts and holds(audits, "C2"),
        "score_first_ttt": "ttt" in parts and holds(audits, "C3"),
        "no_pre_quant_ttt": holds(audits, "C3"),
    }
