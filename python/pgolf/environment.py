"""The published systems' environment variables as a Config; for python/train_gpt.py.

environment_names.py is the whole mapping. A name that does nothing is accepted and answered with one line. A name that
looks like one of these but is none is refused, for a typing error that trains for ten minutes with the default costs a
run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import FIELDS, Config, parse_value
from .environment_names import (
    NAMES,
    OTHERS,
    PREFIXES,
    Choice,
    Detail,
    Field,
    Fixed,
    Ignored,
    Same,
    Stage,
    Switch,
)
from .errors import InputError


@dataclass(frozen=True)
class Request:
    """What the environment asks for. `notes`: a line for every name that changes nothing."""

    config: Config
    data: Path
    tokenizer: Path | None
    run_id: str | None
    notes: tuple[str, ...]


def read_environment(environ: Mapping[str, str], base: str | Config, settings: Sequence[str] = ()) -> Request:
    """A config with the environment's values in place of its own.

    Args:
        base: a preset's name, or a config.
        settings: `field=value`, for what the originals have no name for.

    Raises:
        InputError: a value that is malformed, out of range or not to be had here, two names, or a name and a setting,
            that disagree, a name that resembles a known one, or an unknown preset.
    """
    if isinstance(base, str):
        from .presets import preset

        base = preset(base)
    config = base.with_settings(list(settings))
    for name in environ:
        _refuse_lookalike(name)
    present = {name: rule for name, rule in NAMES.items() if name in environ}
    notes = [f"{n}={environ[n]} has no effect: {r.why}" for n, r in present.items() if isinstance(r, Ignored)]
    if "SLOT_LR" in present and config.slot_optimizer.startswith("lbfgs"):
        del present["SLOT_LR"]
        notes.append(
            f"SLOT_LR={environ['SLOT_LR']} has no effect: the original read it and gave its L-BFGS {config.slot_lr:g}"
        )
    set_fields = [setting.partition("=")[0] for setting in settings]
    changes = {field: getattr(config, field) for field in set_fields}
    sources = dict.fromkeys(set_fields, "the command line")

    def assign(field: str, value: object, name: str) -> None:
        if changes.setdefault(field, value) != value:
            raise InputError(f"environment: {name} must agree with {sources[field]}: both set {field}")
        sources[field] = name

    for name, rule in present.items():
        label, text = f"environment: {name}", environ[name]
        if isinstance(rule, Fixed) and parse_value(label, float, text) != rule.value:
            raise InputError(f"{label} must be {rule.value:g}, got {text!r}: {rule.what}: not part of this program")
        if isinstance(rule, Field):
            value = parse_value(label, FIELDS[rule.name], text)
            assign(rule.name, value if rule.scale == 1.0 else value * rule.scale, name)
        if isinstance(rule, Choice):
            if parse_value(label, bool, text):
                for field, value in ((rule.name, rule.value), *rule.others):
                    assign(field, value, name)
            elif getattr(config, rule.name) == rule.value:
                raise InputError(f"{label} must be 1 with {rule.name}={rule.value}, got {text!r}")
    for name, rule in present.items():
        if isinstance(rule, Detail):
            chosen = isinstance(NAMES.get(sources.get(rule.name)), Choice)
            if changes.get(rule.of, getattr(config, rule.of)) in rule.values and not chosen:
                assign(rule.name, parse_value(f"environment: {name}", FIELDS[rule.name], environ[name]), name)
            else:
                notes.append(f"{name}={environ[name]} has no effect: {rule.why}")
    for name, rule in present.items():
        if isinstance(rule, Stage):
            on = parse_value(f"environment: {name}", bool, environ[name])
            changes["eval_stages"] = rule.apply(changes.get("eval_stages", config.eval_stages), on)
    for name, rule in present.items():
        if isinstance(rule, Switch):  # after the fields: off is off, whatever its details say
            on = parse_value(f"environment: {name}", bool, environ[name])
            for field in (rule.name, *rule.others):
                current = changes.get(field, getattr(config, field))
                changes[field] = type(current)((current or rule.on) if on else 0)
                sources.setdefault(field, name)
    try:
        config = config.replace(**changes)
    except InputError as error:
        causes = [f"{name}={environ[name]}" for field, name in sources.items() if field in str(error)]
        raise InputError(f"environment: {', '.join(causes) or 'these values'}: {error}") from error
    for name, rule in present.items():
        if isinstance(rule, Same):
            value = parse_value(f"environment: {name}", FIELDS[rule.name], environ[name])
            if value != (wanted := getattr(config, rule.name)):
                raise InputError(
                    f"environment: {name} must be {wanted}, got {value}: {rule.what}: not part of this program"
                )
    if "WARMDOWN_ITERS" in environ and config.warmdown_frac:
        raise InputError(
            f"environment: WARMDOWN_ITERS has no effect beside a WARMDOWN_FRAC of {config.warmdown_frac:g}; "
            "drop it or set WARMDOWN_FRAC=0"
        )
    folder = Path(environ.get("DATA_DIR", "data")) / "datasets" / f"fineweb10B_sp{config.vocab_size}"
    tokenizer = environ.get("TOKENIZER_PATH")
    return Request(
        config=config,
        data=Path(environ.get("DATA_PATH", folder)),
        tokenizer=None if tokenizer is None else Path(tokenizer),
        run_id=environ.get("RUN_ID"),
        notes=tuple(notes),
    )


def _refuse_lookalike(name: str) -> None:
    """Raise if `name` is unknown and begins like a known name, or is a slip of the finger away from one."""
    if name in NAMES or name in OTHERS:
        return
    upper = name.upper()
    prefix = next((p for p in PREFIXES if upper.startswith(p)), "")
    candidates = [known for known in NAMES if known.startswith(prefix) and (prefix or len(known) > 3)]
    known = min(candidates, key=lambda known: edit_distance(upper, known))
    if prefix or edit_distance(upper, known) <= (1 if len(known) <= 6 else 2):
        raise InputError(f"environment: unknown name {name}; the nearest known one is {known}: rename or unset it")


def edit_distance(a: str, b: str) -> int:
    """Least number of insertions, deletions, replacements and swaps of neighbours that turn a into b."""
    before, row = [], list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
