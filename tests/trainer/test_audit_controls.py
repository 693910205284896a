"""The auditor on evaluators whose verdicts are known: every cheat fails exactly its tests, every honest one none."""

from pathlib import Path

import pytest

from pgolf.audit.controls import CONTROLS, TESTED, expected_table, run_controls

HONEST = {"plain", "sliding", "slot-cache", "slot-cache-carried", "slot-window", "slot-frontier", "slot-carried", "ttt"}


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    return {result["name"]: result for result in run_controls()}


@pytest.mark.parametrize("name", CONTROLS)
def test_every_verdict_is_as_expected(name, results):
    control, found = CONTROLS[name], results[name]
    assert bool(control.fails) == (name not in HONEST)
    assert control.named is None or control.named in control.fails
    verdicts = {test["name"]: test["verdict"] for test in found["tests"]}
    details = {test["name"]: test["detail"] for test in found["tests"]}
    assert verdicts == {test: "fail" if test in control.fails else "pass" for test in TESTED}, details
    assert found["as_expected"]


def test_every_test_has_a_control_that_it_fails():
    assert set().union(*(control.fails for control in CONTROLS.values())) == set(TESTED)


def test_the_documentation_has_the_expected_verdicts():
    docs = Path(__file__).parent.parent.parent / "docs/auditing.md"
    assert f"\n{expected_table()}\n" in docs.read_text()


def test_the_unadapted_evaluator_wins_exactly_nothing(results):
    """The sampled stream is drawn from the very rows that plain sliding scores: p and q are the same bits."""
    figures = next(test["figures"] for test in results["sliding"]["tests"] if test["name"] == "T9")
    assert figures["bits_won"] == figures["most_bits_won"] == 0.0
    assert figures["rounding_bits"] < 0.01 and figures["model_bits"] > 2000


def test_the_expected_bits_of_the_leaks(results):
    won = {
        name: next(t["figures"]["most_bits_won"] for t in result["tests"] if t["name"] == "T9")
        for name, result in results.items()
    }
    assert all(won[name] > 20 for name, control in CONTROLS.items() if "T9" in control.fails)
    assert all(won[name] < 10 for name in HONEST), won
