"""`pgolf audit ARTIFACT --data DIR`: the real evaluator, or a user's, against tests T1 to T12; audit.json and a page.

A method that leaks is audited without further ado: finding that out is what an audit is for. Its score is nowhere
recorded as a score, and the verdict names the conditions that it violates.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import distributed, run
from ..errors import InputError
from ..evaluate import check_request, open_request, scoring_settings
from ..scoring.validation import validation_tokens
from . import record
from .case import Budget, Case
from .page import write_page
from .passes import AuditGate, run_pass
from .protocol import PgolfEvaluator, Subject, load_evaluator
from .verdict import check_names, run_tests, violated

PAGE = "audit.html"
DEFAULT_TOKENS = 4096


@dataclass(frozen=True)
class Prepared:
    """An accepted request: what is audited, and what audit.json says about it."""

    case: Case
    tests: Sequence[str]
    facts: dict


def prepare(
    artifact: Path,
    data: Path,
    method: str = "sliding",
    *,
    evaluator: str | None = None,
    settings: Sequence[str] = (),
    tokens: int = 0,
    seed: int = 0,
    budget: Budget | None = None,
    device: str = "auto",
    tokenizer: Path | None = None,
    tests: Sequence[str] = (),
) -> Prepared:
    """Read and build everything, and refuse what cannot be audited.

    Args:
        method: as for `evaluate`, one of them. With an evaluator of the user's it only says which windows the model's
            own stream (T9) is sampled in: the artifact's.
        evaluator: "module:object" that makes an Evaluator from a Subject; None: pgolf's own.
        settings: `field=value` overrides of the artifact's config, for what concerns scoring.
        tokens: audit the first so many targets of the validation text. 0: 4,096, or as many as the method needs to
            learn from what it has scored.
        seed: of the flips, the places and the sampled stream.
        tests: only these, such as "T1"; none: all.

    Raises:
        InputError: wrong input.
    """
    check_names(tests)
    started = time.perf_counter()
    ranks = distributed.start(device)
    if ranks.world_size > 1:
        distributed.stop()
        raise InputError("audit: must be one process, it starts its own ranks; run it without torchrun")
    request = check_request(artifact, method, settings, allow_leaky=True)
    if len(request.methods) > 1:
        raise InputError(f"audit: one method at a time, got {method!r}")
    method, cfg = request.methods[0], request.cfg
    model, dataset = open_request(request, artifact, data, tokenizer, ranks.device)
    stream = validation_tokens(cfg, dataset)
    own = PgolfEvaluator(method, cfg, model, dataset.byte_counts)
    audited = load_evaluator(evaluator, Subject(model, cfg, dataset.byte_counts)) if evaluator else own
    count, total = _num_targets(audited, tokens, len(stream) - 1, cfg.eval_seq_len), len(stream) - 1
    case = Case(
        evaluator=audited,
        tokens=stream[: count + 1],
        vocab_size=cfg.vocab_size,
        byte_counts=dataset.byte_counts,
        device=ranks.device,
        seed=seed,
        budget=budget or Budget(),
        source=model,
        cfg=cfg,
        dataset=dataset,
        artifact=artifact,
        clocks={"load_seconds": round(time.perf_counter() - started, 3)},
        total_targets=total,
    )
    facts = {
        "version": record.VERSION,
        "artifact_sha256": hashlib.sha256(artifact.read_bytes()).hexdigest(),
        "tokenizer_sha256": dataset.tokenizer.sha256,
        "data_sha256": hashlib.sha256(case.tokens.numpy().astype("<u2").tobytes()).hexdigest(),
        "method": method,
        "evaluator": evaluator or "pgolf",
        "settings": scoring_settings(cfg, method),
        "tokens": count,
        "total_tokens": total,
        "seed": seed,
        "environment": run.describe_environment(ranks.device, 1),
    }
    return Prepared(case, tests, facts)


def audit(prepared: Prepared, on_test: Callable[[str, int, int], None] | None = None) -> dict:
    """Run the tests; write audit.json and audit.html beside the artifact.

    Returns:
        The content of audit.json (see record.py).
    """
    case, started = prepared.case, time.perf_counter()
    first = run_pass(case.evaluator, case.tokens, case.device)
    score = _score(case, first, time.perf_counter() - started)
    case.clocks["score_seconds"] = score["seconds"]
    results = run_tests(case, prepared.tests, on_test)
    found = violated(results)
    sizes = next(r["figures"] for r in results if r["name"] == "T12")
    result = record.seal(
        {
            **prepared.facts,
            "tests": results,
            "verdict": "fail" if found else "pass",
            "violated": found,
            "score": score,
            "clocks": case.clocks,
            "bytes": {name: sizes[name] for name in ("artifact", "code", "total") if sizes},
            "seconds": round(time.perf_counter() - started + case.clocks["load_seconds"], 3),
        }
    )
    record.write(result, case.artifact.parent / record.AUDIT)
    write_page(result, case.artifact.parent / PAGE)
    return result


def _num_targets(audited, wanted: int, total: int, seq_len: int) -> int:
    """How many targets to audit: enough for what the method learns from its own scores to show in later ones."""
    chunk = getattr(audited, "learns_after", 0)
    needed = min(chunk + 4 * seq_len, total) if chunk else 1
    if wanted and min(wanted, total) < needed:
        raise InputError(
            f"audit: this method learns from what it has scored only after {chunk:,} tokens; "
            f"audit at least {needed:,}, got {wanted:,}"
        )
    return min(wanted or max(DEFAULT_TOKENS, needed), total)


def _score(case: Case, gate: AuditGate, seconds: float) -> dict:
    """Of the audited targets, from the gate's own log."""
    num_bytes = int(case.byte_counts.count_bytes(case.tokens[1:], case.tokens[:-1]).sum())
    nll = float(gate.nll.nansum())
    return {
        "val_loss": nll / case.num_targets,
        "val_bpb": nll / math.log(2) / max(num_bytes, 1),
        "tokens": case.num_targets,
        "bytes": num_bytes,
        "seconds": round(seconds, 3),
    }
