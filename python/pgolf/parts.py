"""The optional parts of the program: which a run needs, and which modules they are made of.

A bundled program holds only the parts that its run needs, so it refuses before any work what would need another.
"""

from collections.abc import Iterable

from .config import Config
from .errors import InputError

LOADERS = ("sequential", "coprime", "shuffled")
MODULES = {
    **{f"{loader} loader": (f"pgolf.data.loader_{loader}",) for loader in LOADERS},
    "gptq": ("pgolf.artifact.calibration", "pgolf.artifact.gptq", "pgolf.generate"),
    "generated": ("pgolf.kv_cache",),
    "pruning": ("pgolf.artifact.prune",),
    "slot": ("pgolf.scoring.slot",),
    "slot_autograd": ("pgolf.scoring.slot_autograd",),
    "slot_cache": ("pgolf.scoring.slot_cache",),
    "ttt": ("pgolf.scoring.ttt",),
    "ctw": ("pgolf.scoring.context_tree",),
}


def needed_parts(cfg: Config, methods: Iterable[str] = ()) -> set[str]:
    """What a run of cfg needs, scored by its eval_stages and by `methods`: names of MODULES."""
    scorings = {part for method in (*cfg.eval_stages.split(","), *methods) for part in method.split("+")}
    conditions = {
        **{f"{loader} loader": cfg.loader == loader for loader in LOADERS},
        "gptq": cfg.uses_gptq,
        "generated": cfg.uses_gptq and cfg.calibration == "generated",
        "pruning": cfg.target_bytes > 0,
        "slot": "slot" in scorings and cfg.slot_parameters != "cache",
        "slot_cache": "slot" in scorings and cfg.slot_parameters == "cache",
        "slot_autograd": "slot" in scorings and (cfg.slot_buckets > 0 or cfg.slot_parameters == "temperature"),
        "ttt": "ttt" in scorings,
        "ctw": "ctw" in scorings,
    }
    return {part for part, needed in conditions.items() if needed}


def refuse_missing(needed: set[str], present: set[str]) -> None:
    """Raise InputError if a part is needed that the program was bundled without."""
    if missing := sorted(needed - present):
        raise InputError(
            f"this program must do without {', '.join(missing)}, which its run did not use; drop the settings or the "
            "method that need it, or bundle a run that uses it"
        )
