"""All clocks of a run, read strictly and leniently, from its log.

The rules give training 600 s and evaluation 600 s and leave open what they begin and end with. Lenient is what most
published logs print: the training loop; the scoring. Strict adds whatever reads training data afterwards, wherever it
was done (GPTQ's calibration), and reading and rebuilding the model from the file before the scoring. The loop ends with
the first step behind its limit, as the published ones do (#1128 stopped at 600.1 s), so one step may reach beyond it.
"""

from .seeds import SeedRun

LIMIT_S = 600.0


def clocks(run: SeedRun, method: str) -> dict[str, float]:
    """Seconds of a finished, packed and scored run.

    Returns:
        {"train_lenient": the loop, "train_strict": with calibration, "artifact": until the file was there,
        "eval_lenient": the scoring, "eval_strict": with loading}; a stage that the log does not have counts as 0. And
        "step", the mean.
    """
    end, pack, score = run.last("end"), run.last("pack").get("seconds", {}), run.scores[method]
    loop = end.get("train_seconds", 0.0)
    strict = loop + run.last("calibrate").get("seconds", 0.0) + pack.get("calibrating", 0.0)
    packing = sum(seconds for stage, seconds in pack.items() if stage != "calibrating")
    scored = [e for e in run.events if e["event"] == "eval" and e["method"] == score["method"]]
    loading = max((e["load_seconds"] for e in scored if e["seconds"] == score["seconds"]), default=0.0)
    return {
        "step": round(loop / max(end.get("step", 0), 1), 6),
        "train_lenient": round(loop, 3),
        "train_strict": round(strict, 3),
        "artifact": round(strict + packing, 3),
        "eval_lenient": round(score["seconds"], 3),
        "eval_strict": round(score["seconds"] + loading, 3),
    }


def seconds_over(clocks: dict[str, float]) -> dict[str, float]:
    """By how much training and scoring exceed LIMIT_S, read strictly; at most 0 where they do not."""
    return {
        "training and calibration": clocks["train_strict"] - clocks["step"] - LIMIT_S,
        "loading and scoring": clocks["eval_strict"] - LIMIT_S,
    }
