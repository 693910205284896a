"""T8: every target is scored once, from left to right; the report is the mean of the log; the bytes are the text's.

A declared permutation (windows dealt to slices in turn, as published) is said so and passes: order then only decides
which windows meet. Bytes are compared with the decoded text of the documents that lie whole in the audited stream.
"""

import math

import numpy as np

from ..data.byte_counts import check_against_text
from ..distributed import Ranks
from ..errors import InputError
from .case import Case, Finding

NAME, TITLE, CONDITION = "T8", "Coverage and bytes", "C4"


def run(case: Case) -> Finding:
    gate, N = case.base, case.num_targets
    coverage = gate.coverage(Ranks(0, 1, case.device))
    permuted = getattr(case.evaluator, "permuted", False)
    wrong = []
    if coverage.num_missing:
        wrong.append(f"{coverage.num_missing:,} of {N:,} targets were not scored")
    if coverage.num_repeated:
        wrong.append(f"{coverage.num_repeated:,} targets were scored more than once")
    if not coverage.in_order and not permuted and not coverage.num_repeated:
        wrong.append("targets were not scored from left to right")
    stream_bytes = int(case.byte_counts.count_bytes(case.tokens[1:], case.tokens[:-1]).sum())
    figures = {
        "targets": N,
        "missing": coverage.num_missing,
        "repeated": coverage.num_repeated,
        "order": "left to right" if coverage.in_order else "declared permutation" if permuted else "other",
        "bytes": stream_bytes,
    }
    if report := gate.reported:
        loss = float(gate.nll.nanmean())
        figures["reported"] = {"val_loss": report.val_loss, "tokens": report.tokens, "bytes": report.bytes}
        if not wrong and not math.isclose(report.val_loss, loss, rel_tol=1e-9):
            wrong.append(f"the reported loss is {report.val_loss:.9f}, that of the log {loss:.9f}")
        if not wrong and (report.tokens, report.bytes) != (N, stream_bytes):
            wrong.append(
                f"{report.tokens:,} tokens and {report.bytes:,} bytes are reported, not {N:,} and {stream_bytes:,}"
            )
    if case.dataset is not None:
        try:
            figures["document_bytes"] = _document_bytes(case)
        except InputError as error:
            wrong.append(str(error))
    order = "" if coverage.in_order else " (in a declared permutation)"
    detail = (
        wrong[0] if wrong else f"{N:,} targets scored once each{order}, {stream_bytes:,} bytes charged as the text has"
    )
    return Finding.of(not wrong, detail, **figures)


def _document_bytes(case: Case) -> int:
    """The bytes of the documents that lie whole in the stream; raises where their text has others."""
    tokens, tokenizer = case.tokens.numpy(), case.dataset.tokenizer
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    if len(starts) < 2:
        return 0
    return check_against_text(tokens[starts[0] : starts[-1]], tokenizer, case.byte_counts)
