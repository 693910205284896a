"""T6: nothing an evaluator keeps may change between the moment it meets the targets and the moment they are scored.

All tensors and numbers that can be reached from what it watches (weights, optimisers, fits, caches) and the state of
the random numbers are hashed before and after each batch is scored.
"""

from .case import Case, Finding

NAME, TITLE, CONDITION = "T6", "State around scoring", "C3"


def run(case: Case) -> Finding:
    gate = case.base
    if not gate.watched:
        return Finding.not_run("the evaluator watches nothing: it must call gate.watch with what holds its state")
    batches = len(gate.batches)
    detail = (
        f"state changed while {gate.num_changed} of {batches} batches were scored"
        if gate.num_changed
        else f"{gate.num_hashed} tensors had the same hash before and after each of {batches} batches was scored"
    )
    figures = {"batches": batches, "batches_with_changes": gate.num_changed, "tensors": gate.num_hashed}
    return Finding.of(not gate.num_changed, detail, **figures)
