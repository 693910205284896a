"""audit.html: the verdict in the words of the four conditions, then every test with what it found."""

from pathlib import Path

from .. import run
from ..publish.page import Html, code, document, element, note, section, table
from ..publish.record import duration
from .case import FAIL, NOT_RUN, PASS
from .verdict import CONDITIONS

STATEMENTS = {
    "C1": "Each distribution is a function of the artifact and of the tokens before its target alone. It does not "
    "depend on the target, on a later token, on which windows share a batch, or on the number of ranks.",
    "C2": "Before a target is seen there is one distribution over the whole vocabulary; it sums to 1, whichever token "
    "comes.",
    "C3": "The score of a target is fixed and in the total before anything learns from it.",
    "C4": "One pass over the text; every target is scored once, none is left out, none is scored again.",
    "data": "No validation document is in the training text; what is charged as bytes is the text's.",
    "budget": "Seconds and bytes against their limits.",
}
WORDS = {PASS: "passed", FAIL: "violated", NOT_RUN: "not run"}
COLORS = {PASS: "c3", FAIL: "c2", NOT_RUN: "faint"}


def write_page(record: dict, path: Path) -> None:
    """Write the page of a sealed record."""
    run.write_atomically(path, render(record).encode())


def render(record: dict) -> str:
    """The whole page; the same record gives the same bytes."""
    method = record["method"] if record["evaluator"] == "pgolf" else record["evaluator"]
    return document(
        f"{method}: pgolf audit",
        _header(record, method),
        _conditions(record),
        *(_condition(record, name) for name in CONDITIONS),
        _provenance(record),
    )


def _header(record: dict, method: str) -> Html:
    facts = [
        f"first {record['tokens']:,} of {record['total_tokens']:,} validation tokens",
        f"seed {record['seed']}",
        f"audited in {duration(record['seconds'])}",
        record["environment"].get("gpu") or record["environment"].get("cpu"),
    ]
    failed = [CONDITIONS[name] for name in record["violated"]]
    verdict = f"Violated: {'; '.join(failed)}." if failed else "Nothing found against it."
    return element(
        "header",
        element("p", "pgolf audit", class_="eyebrow"),
        element("h1", f"{'INVALID: ' if failed else ''}{method}"),
        element("p", *(element("span", fact) for fact in facts if fact), class_="facts"),
        note(verdict, "" if failed else " Passing is no proof where a test says that it was not run."),
    )


def _verdict_of(record: dict, condition: str) -> str:
    verdicts = [t["verdict"] for t in record["tests"] if t["condition"] == condition]
    if condition in record["violated"]:
        return FAIL
    return PASS if PASS in verdicts else NOT_RUN


def _conditions(record: dict) -> Html:
    score = record["score"]
    cells = []
    for name in ("C1", "C2", "C3", "C4"):
        title, _, statement = CONDITIONS[name].partition(": ")
        found = _verdict_of(record, name)
        mark = element("span", statement, class_=f"key square {COLORS[found]}")
        cells.append(
            element("div", element("dt", title), element("dd", WORDS[found], class_="big"), element("dd", mark))
        )
    cells.append(
        element(
            "div",
            element("dt", "Score"),
            element("dd", "INVALID" if record["violated"] else f"{score['val_bpb']:.4f}", class_="big"),
            element("dd", "bits/byte of the audited tokens"),
        )
    )
    return element("dl", *cells, class_="card ladder")


def _condition(record: dict, name: str) -> Html | None:
    tests = [t for t in record["tests"] if t["condition"] == name]
    if not tests:
        return None
    rows = [
        (
            element("span", f"{t['name']} {t['title']}", class_=f"key square {COLORS[t['verdict']]}"),
            t["verdict"],
            f"{t['seconds']:.1f}",
            t["detail"],
        )
        for t in tests
    ]
    head = ("test", "verdict", "seconds", "what it found")
    body = element("div", table(head, rows, [2], caption=""), class_="card columns")
    return section(CONDITIONS[name], element("p", STATEMENTS[name]), body)


def _provenance(record: dict) -> Html:
    rows = [
        ("artifact", code(record["artifact_sha256"])),
        ("tokenizer", code(record["tokenizer_sha256"])),
        ("audited tokens", code(record["data_sha256"])),
        ("this audit", code(record["sha256"])),
        ("evaluator", code(record["evaluator"])),
    ]
    settings = [(code(name), str(value)) for name, value in record["settings"].items()]
    shown = element("details", element("summary", f"All {len(settings)} settings"), table(("field", "value"), settings))
    return section("What was audited", element("div", table(("", ""), rows), class_="card"), shown)
