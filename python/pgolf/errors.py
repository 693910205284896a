"""The one exception that means "the input is wrong": the command line prints its text as one line and exits with 2."""


class InputError(ValueError):
    """What must hold, what came, and what to do about it."""
