"""explain("newton_schulz", g): which implementation of an op would run on these arguments, and why not the others."""

import importlib
import inspect
from typing import NamedTuple

from .dispatch import ASK, Asked, require


class Choice(NamedTuple):
    """One implementation. `reason`: None if it can run these arguments. `used`: the one that impl="auto" takes."""

    name: str
    used: bool
    reason: str | None


def explain(op_name: str, *args, **kwargs) -> list[Choice]:
    """Print every implementation of an op, in order of preference, with the reason why it is or is not used.

    Args:
        op_name: the public name, such as "newton_schulz".
        *args, **kwargs: what the op would be called with; nothing is computed.

    Returns:
        One Choice per implementation, fastest first.

    Raises:
        ValueError: no op has that name, or the op refuses these arguments.
    """
    public = vars(importlib.import_module(__package__))
    ops = {name: f for name, f in public.items() if inspect.isfunction(f) and "impl" in inspect.signature(f).parameters}
    require(op_name in ops, "explain", f"op_name must be one of {sorted(ops)}", repr(op_name))
    try:
        ops[op_name](*args, **kwargs, impl=ASK)
    except Asked as question:
        asked = question
    choices, found = [], False
    for impl in asked.impls:
        reason = impl.why_not(*asked.arguments)
        choices.append(Choice(impl.name, used=reason is None and not found, reason=reason))
        found = found or reason is None
    for choice in choices:
        state = "used" if choice.used else choice.reason or "can run; a faster one is used"
        print(f"{op_name}: {choice.name:10} {state}")
    return choices
