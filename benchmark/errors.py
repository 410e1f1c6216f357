"""Errors that a user can mend: they name the thing, the value and the remedy, and end without a traceback."""


class UsageError(Exception):
    """The request can't be run as it stands (exit code 2)."""


class NotApplicableError(UsageError):
    """An attack or a view asks a defense for what it doesn't have: this cell has no number, the others have."""


class RunError(Exception):
    """A run that was well asked for failed (exit code 1)."""
