"""All tests on one evaluator, in order, and what they say together.

T9 proves that one of the four conditions is broken, not which: it counts as condition 1 unless another test names one.
"""

import math
import time
from collections.abc import Callable, Sequence

from ..errors import InputError
from . import (
    t1_future_flip,
    t2_self_target,
    t3_suffix,
    t4_batches_and_ranks,
    t5_kraft,
    t6_state,
    t7_provenance,
    t8_coverage,
    t9_self_sample,
    t10_data,
    t11_clocks,
    t12_bytes,
)
from .case import FAIL, Case, Finding

TESTS = (
    t1_future_flip,
    t2_self_target,
    t3_suffix,
    t4_batches_and_ranks,
    t5_kraft,
    t6_state,
    t7_provenance,
    t8_coverage,
    t9_self_sample,
    t10_data,
    t11_clocks,
    t12_bytes,
)
CONDITIONS = {
    "C1": "Condition 1: strict causal dependence",
    "C2": "Condition 2: full normalised distribution",
    "C3": "Condition 3: score before update",
    "C4": "Condition 4: single left-to-right pass",
    "data": "Data",
    "budget": "Budgets",
}


def check_names(names: Sequence[str]) -> None:
    """Raise InputError if there is no such test."""
    if unknown := set(names) - {test.NAME for test in TESTS}:
        raise InputError(f"audit: tests are T1 to T{len(TESTS)}, got {', '.join(sorted(unknown))}")


def run_tests(
    case: Case,
    names: Sequence[str] = (),
    on_test: Callable[[str, int, int], None] | None = None,
) -> list[dict]:
    """The results of all tests, as audit.json holds them.

    Args:
        names: run these alone and say of the others that they were not run; none: run all.
        on_test: called with (title, done, of how many).
    """
    results = []
    for done, test in enumerate(TESTS):
        if on_test:
            on_test(f"{test.NAME} {test.TITLE.lower()}", done, len(TESTS))
        started = time.perf_counter()
        finding = test.run(case) if not names or test.NAME in names else Finding.not_run("left out on request")
        results.append(
            {
                "name": test.NAME,
                "title": test.TITLE,
                "condition": test.CONDITION,
                "verdict": finding.verdict,
                "detail": finding.detail,
                "seconds": round(time.perf_counter() - started, 3),
                "figures": _finite(finding.figures),
            }
        )
    if on_test:
        on_test("done", len(TESTS), len(TESTS))
    return results


def violated(results: list[dict]) -> list[str]:
    """The conditions that failed tests stand for, in the order of CONDITIONS."""
    failed = [r for r in results if r["verdict"] == FAIL]
    found = {r["condition"] for r in failed if r["name"] != t9_self_sample.NAME}
    if not found & {"C1", "C2", "C3", "C4"} and any(r["name"] == t9_self_sample.NAME for r in failed):
        found.add(t9_self_sample.CONDITION)
    return [condition for condition in CONDITIONS if condition in found]


def _finite(value: object) -> object:
    """Infinities and NaN as words: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
