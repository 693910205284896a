"""T11: training with its calibration, packing, and evaluation, cold and warm, against their limits.

"Cold" is what a stranger waits for: read, decompress, build, score. "Warm" is the scoring alone, as logs quote it. The
audited pass covers part of the text; its seconds are scaled to all of it, which is an estimate where the method's cost
per token changes, as at the first batch. Clocks of training come from the run's log, where there is one.
"""

from ..run import read_log
from .case import Case, Finding

NAME, TITLE, CONDITION = "T11", "Clocks", "budget"
_STAGES = ("end", "calibrate", "pack")


def run(case: Case) -> Finding:
    if case.artifact is None:
        return Finding.not_run("there is no artifact")
    limit, clocks = case.budget.limit_seconds, case.clocks
    scale = max(case.total_targets, case.num_targets) / case.num_targets
    clocks["eval_warm_seconds"] = round(clocks["score_seconds"] * scale, 3)
    clocks["eval_cold_seconds"] = round(clocks["eval_warm_seconds"] + clocks["load_seconds"], 3)
    clocks["scaled_by"] = round(scale, 6)
    events = read_log(case.artifact.parent)
    end, calibrate, pack = (next((e for e in events[::-1] if e["event"] == name), {}) for name in _STAGES)
    parts = [f"evaluation {clocks['eval_cold_seconds']:.1f} s cold, {clocks['eval_warm_seconds']:.1f} s warm"]
    over = [] if clocks["eval_cold_seconds"] <= limit else ["evaluation"]
    if end:
        packing = pack.get("seconds", {})
        clocks["train_seconds"] = end["train_seconds"]
        clocks["calibrate_seconds"] = calibrate.get("seconds", 0.0) + packing.get("calibrating", 0.0)
        clocks["pack_seconds"] = round(sum(packing.values()) - packing.get("calibrating", 0.0), 3)
        total = clocks["train_seconds"] + clocks["calibrate_seconds"]
        parts.insert(0, f"training {total:.1f} s with calibration")
        # The loop ends with the first step behind its limit, so one step may reach beyond it.
        over = ["training"] * (total - end["train_seconds"] / max(end.get("step", 0), 1) > limit) + over
    else:
        parts.insert(0, "training unknown (no log beside the artifact)")
    verdict = f"; over the limit of {limit:g} s: {', '.join(over)}" if over else f"; the limit is {limit:g} s each"
    return Finding.of(not over, "; ".join(parts) + verdict, **clocks, limit_seconds=limit)
