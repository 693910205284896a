"""The one exception that means "the input is wrong": the command line prints its text as one line and exits with 2."""


class InputError(ValueError):
    """What must hold, what came, and what to do about it."""


class FailedElsewhereError(InputError):
    """Rank 0 could not do its part and says why; the other ranks end with this, and say nothing of their own."""
