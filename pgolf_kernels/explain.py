"""explain("newton_schulz", g): which implementation of an op would run on these arguments, and why not the others."""

import importlib
import inspect
import threading
from collections.abc import Callable
from typing import NamedTuple

from .dispatch import Impl, require


class Choice(NamedTuple):
    """One implementation. `reason`: None if it can run these arguments. `used`: the one that impl="auto" takes."""

    name: str
    used: bool
    reason: str | None


class _Asked(Exception):
    """Carries what the op asked `choose` out of the op, before anything runs."""

    def __init__(self, impls: tuple[Impl, ...], args: tuple):
        super().__init__()
        self.impls, self.args_asked = impls, args


_LOCK = threading.Lock()


def _ask(_op: str, impls: tuple[Impl, ...], _name: str, *args) -> None:
    raise _Asked(impls, args)


def _question(function: Callable, args: tuple, kwargs: dict) -> _Asked:
    """Run the op's own argument checks up to its call of `choose`, which is answered here instead."""
    namespace = inspect.unwrap(function).__globals__
    with _LOCK:
        choose, namespace["choose"] = namespace["choose"], _ask
        try:
            function(*args, **kwargs)
        except _Asked as asked:
            return asked
        finally:
            namespace["choose"] = choose
    raise AssertionError(f"{function.__name__} returned without choosing an implementation")


def _chooses(value: object) -> bool:
    return inspect.isfunction(value) and "choose" in inspect.unwrap(value).__globals__


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
    ops = {name: value for name, value in public.items() if _chooses(value)}
    require(op_name in ops, "explain", f"op_name must be one of {sorted(ops)}", repr(op_name))
    asked = _question(ops[op_name], args, kwargs)
    choices, found = [], False
    for impl in asked.impls:
        reason = impl.why_not(*asked.args_asked)
        choices.append(Choice(impl.name, used=reason is None and not found, reason=reason))
        found = found or reason is None
    for choice in choices:
        state = "used" if choice.used else choice.reason or "can run; a faster one is used"
        print(f"{op_name}: {choice.name:10} {state}")
    return choices
