"""T7: every target that a fit or a training step saw came from the gate, behind or before what it may see.

A fit sees what lies before the first target that it scores, a learner what is already in the total. Outside an audit
the gate raises at the first request that does not keep to this; here it counts them.
"""

from .case import Case, Finding

NAME, TITLE, CONDITION = "T7", "Provenance of learned targets", "C3"


def run(case: Case) -> Finding:
    gate = case.base
    if gate.num_violations:
        detail = f"targets still to be scored were asked for {gate.num_violations} times: {gate.violations[0]}"
    else:
        detail = "no fit and no training step asked for a target that was still to be scored by what it made"
    return Finding.of(not gate.num_violations, detail, violations=gate.num_violations, examples=gate.violations[:3])
