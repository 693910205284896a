"""`pgolf stats`: mean and spread over seeds, and whether they beat something by the 0.005 nats that the rules ask for.

Everything is compared in bits per byte, the only unit that two tokenizers share. The bar is in nats per token, so in
bits per byte it depends on the tokenizer: 0.005 nats are 0.0030 bits per byte at 2.44 bytes per token, 0.0019 at 3.7.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from .. import run
from ..errors import InputError
from ..presets import FACTS
from .seeds import Seeds, choose_methods, read_object, read_seeds
from .significance import describe, p_value, seeds_needed

BAR_NATS, ALPHA, POWER = 0.005, 0.01, 0.8
SAME_TEXT = 1e-3  # tokenizers cut the challenge's text to a multiple of 2048 tokens: 0.004 % of the bytes apart
CHALLENGE_BYTES = 151_080_364  # of the published scores' text, as the vocabulary of 1024 has it


@dataclass(frozen=True)
class Reference:
    """What is to be beaten: scores in bits per byte (one: a bare number), of num_bytes of text if that is known."""

    name: str
    val_bpb: tuple[float, ...]
    num_bytes: int | None = None


def stats(
    run_dirs: list[Path],
    against: list[str] = (),
    methods: list[str] = (),
    allow_leaky: bool = False,
    allow_unreported: str | None = None,
) -> dict:
    """Statistics of runs that are seeds of one config.

    Args:
        against: a published system ("pr1217"), bits per byte ("1.1147"), a JSON file or other runs; empty: nothing.
        methods: names of scores as scores.json has them; empty: every whole and causal one.
        allow_leaky, allow_unreported: see seeds.py.

    Returns:
        {"seeds", "runs_started", "runs_reported", "unreported", "unreported_reason", "notes", "methods": {name:
        {"standing", "val_bpb", "val_loss": of `describe`, "seeds": {seed: val_bpb}, "bytes_per_token", "bar_bpb",
        "against": {...}}}}

    Raises:
        InputError: the runs may not be reported together, see seeds.py, or `against` is nothing known.
    """
    seeds = read_seeds(run_dirs, allow_unreported)
    names = choose_methods(seeds, list(methods), allow_leaky)
    result = {
        "runs": [str(r.path) for r in seeds.runs],
        "seeds": [r.cfg.seed for r in seeds.runs],
        "runs_started": seeds.num_started,
        "runs_reported": len(seeds.runs),
        "unreported": [str(entry) for entry in seeds.unreported],
        "unreported_reason": seeds.reason,
        "notes": notes(seeds),
        "methods": {name: summary(seeds, name) for name in names},
    }
    for name in names:
        if reference := find_reference(list(against), name, allow_leaky):
            result["methods"][name]["against"] = compare(seeds, name, reference)
    return result


def summary(seeds: Seeds, method: str) -> dict:
    """One method over the seeds; bits per byte and nats per token."""
    scores = list(seeds.score(method).values())
    ratio = scores[0]["bytes"] / scores[0]["tokens"]
    return {
        "standing": "causal" if all(s["causal"] is True for s in scores) else "INVALID",
        "seeds": {seed: s["val_bpb"] for seed, s in seeds.score(method).items()},
        "val_bpb": describe([s["val_bpb"] for s in scores]),
        "val_loss": describe([s["val_loss"] for s in scores]),
        "bytes_per_token": ratio,
        "bar_bpb": BAR_NATS / math.log(2) / ratio,
    }


def compare(seeds: Seeds, method: str, reference: Reference) -> dict:
    """One method of the seeds against a reference.

    Returns:
        {"name", "mean_bpb", "num_scores", "test": its name, "gain_bpb", "gain_nats": what ours are better by,
        "p_better": that they are at all, "p_bar": that it is by more than the bar, "passes": p_bar < 0.01,
        "seeds_as_observed", "seeds_for_power": seeds in all for that, see `seeds_needed`}

    Raises:
        InputError: the reference is of other text.
    """
    of = summary(seeds, method)
    num_bytes = next(iter(seeds.score(method).values()))["bytes"]
    if reference.num_bytes and abs(num_bytes / reference.num_bytes - 1) > SAME_TEXT:
        raise InputError(
            f"stats: scores of different text do not compare: {reference.name} is of {reference.num_bytes:,} bytes, "
            f"{method} of {num_bytes:,}"
        )
    ours, theirs, bar = list(of["seeds"].values()), list(reference.val_bpb), of["bar_bpb"]
    gain = sum(theirs) / len(theirs) - of["val_bpb"]["mean"]
    p_bar = p_value(ours, theirs, bar)
    return {
        "name": reference.name,
        "mean_bpb": sum(theirs) / len(theirs),
        "num_scores": len(theirs),
        "test": "Welch's t-test" if len(theirs) > 1 else "one-sample t-test",
        "gain_bpb": gain,
        "gain_nats": gain * math.log(2) * of["bytes_per_token"],
        "p_better": p_value(ours, theirs),
        "p_bar": p_bar,
        "passes": p_bar is not None and p_bar < ALPHA,
        "seeds_as_observed": seeds_needed(ours, theirs, bar, ALPHA),
        "seeds_for_power": seeds_needed(ours, theirs, bar, ALPHA, POWER),
    }


def find_reference(against: list[str], method: str, allow_leaky: bool) -> Reference | None:
    """What --against names; of runs, their scores by `method`."""
    if not against:
        return None
    if (Path(against[0]) / run.CONFIG).exists():
        theirs = read_seeds([Path(path) for path in against], "they are only compared with")
        choose_methods(theirs, [method], allow_leaky)
        scores = list(theirs.score(method).values())
        name = f"{theirs.runs[0].cfg.preset}, {len(scores)} runs"
        return Reference(name, tuple(s["val_bpb"] for s in scores), scores[0]["bytes"])
    if len(against) > 1:
        raise InputError(f"stats: several things to compare with must be run directories, got {' '.join(against)}")
    (text,) = against
    if text in FACTS and FACTS[text].seed_bpb:
        return Reference(text, tuple(FACTS[text].seed_bpb.values()), CHALLENGE_BYTES)
    if Path(text).is_file():
        return _from_json(Path(text))
    try:
        return Reference(text, (float(text),))
    except ValueError:
        published = ", ".join(name for name, facts in FACTS.items() if facts.seed_bpb)
        raise InputError(
            f"stats: --against must be a published system ({published}), bits per byte, a JSON file or runs, "
            f"got {text!r}"
        ) from None


def _from_json(path: Path) -> Reference:
    """{"name", "val_bpb": number or list} or "val_loss" with "bytes" and "tokens"; or a submission.json."""
    values = read_object(path)
    found = values.get("val_bpb")
    if isinstance(seeds := values.get("seed_results"), dict):
        found = [s["val_bpb"] for s in seeds.values() if isinstance(s, dict) and "val_bpb" in s] or found
    if found is None and {"val_loss", "bytes", "tokens"} <= values.keys():
        factor = values["tokens"] / values["bytes"] / math.log(2)
        losses = values["val_loss"] if isinstance(values["val_loss"], list) else [values["val_loss"]]
        found = [loss * factor for loss in losses]
    found = found if isinstance(found, list) else [found]
    if not found or not all(isinstance(v, int | float) and math.isfinite(v) for v in found):
        raise InputError(
            f'{path}: must hold "val_bpb", a number or a list of them, or "val_loss" with "tokens" and "bytes", which '
            "turn nats per token into bits per byte"
        )
    return Reference(str(values.get("name", path.stem)), tuple(found), values.get("bytes"))


def notes(seeds: Seeds) -> list[str]:
    """What a reader must know beside the numbers."""
    found = [f"in no ledger, so how many runs were started is unknown: {path}" for path in seeds.unrecorded]
    machines = {r.path: read_object(r.path / run.ENVIRONMENT) for r in seeds.runs}
    for key in ("gpu", "cpu", "world_size", "commit", "versions"):
        if len(kinds := {str(m.get(key)) for m in machines.values()}) > 1:
            found.append(f"the runs differ in {key}: {', '.join(sorted(kinds))}")
    return found


def lines(result: dict) -> list[str]:
    """The result for people."""
    started = "unknown" if result["runs_started"] is None else result["runs_started"]
    found = [f"seeds {', '.join(map(str, result['seeds']))}: {result['runs_reported']} reported of {started} started"]
    found += [f"not reported: {entry}" for entry in result["unreported"]]
    if result["unreported_reason"]:
        found.append(f"the reason given: {result['unreported_reason']}")
    found += [f"note: {note}" for note in result["notes"]]
    for name, m in result["methods"].items():
        stamp = "" if m["standing"] == "causal" else "INVALID "
        label = stamp + name.removeprefix("INVALID ")
        found += [f"{label}: {_spread(m['val_bpb'])} bits per byte", f"  {_spread(m['val_loss'])} nats per token"]
        found.append(f"  the bar of {BAR_NATS} nats per token is {m['bar_bpb']:.5f} bits per byte here")
        if against := m.get("against"):
            found += [f"  {stamp}{line}" for line in against_lines(against)]
    return found


def _spread(d: dict) -> str:
    if d["n"] == 1:
        return f"{d['mean']:.6f}, one seed"
    low, high = d["ci95"]
    return (
        f"mean {d['mean']:.6f}, std {d['std']:.6f} (ddof 1), {d['min']:.6f} to {d['max']:.6f}, "
        f"95 % interval of the mean {low:.6f} to {high:.6f}"
    )


def against_lines(a: dict) -> list[str]:
    """One comparison in sentences."""
    better = "better" if a["gain_bpb"] >= 0 else "worse"
    found = [
        f"against {a['name']} ({a['mean_bpb']:.6f}): {abs(a['gain_bpb']):.6f} bits per byte, "
        f"{abs(a['gain_nats']):.6f} nats per token {better}"
    ]
    if a["p_better"] is None:
        return [*found, "no test without a spread: run more seeds"]
    rule = f"better by more than {BAR_NATS} nats: p = {a['p_bar']:.3g}"
    found.append(f"{a['test']}, one-sided: better at all: p = {a['p_better']:.3g}; {rule}")
    if a["passes"]:
        return [*found, f"this passes p < {ALPHA}"]
    if a["seeds_as_observed"] is None:
        return [*found, f"p < {ALPHA} is out of reach of any number of seeds with this mean and spread"]
    power = f", {a['seeds_for_power']} for a chance of {POWER:.0%}" if a["seeds_for_power"] else ""
    return [
        *found,
        f"p < {ALPHA} takes {a['seeds_as_observed']} seeds in all if mean and spread stay as they are{power}",
    ]
