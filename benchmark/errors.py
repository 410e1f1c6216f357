"""Errors that a user can mend: they name the thing, the value and the remedy, and end without a traceback."""

import difflib


class UsageError(Exception):
    """The request can't be run as it stands (exit code 2)."""


class NotApplicableError(UsageError):
    """An attack or a view asks a defense for what it doesn't have: this cell has no number, the others have."""


class RunError(Exception):
    """A run that was well asked for failed (exit code 1)."""


def unknown(kind: str, name: str, known: list[str]) -> str:
    """The message for a name that doesn't exist: the nearest ones, and the whole list."""
    if ".py" in name:
        return f"unknown {kind} {name!r}: a file is written file:{name.removesuffix('.py')}.py:Class"
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}known: {', '.join(known) or 'none'}"


def raised(error: BaseException) -> str:
    """What an exception says, and the line of code it came from."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    where = error.__traceback__
    while where and where.tb_next:
        where = where.tb_next
    place = f" ({where.tb_frame.f_code.co_filename}:{where.tb_lineno})" if where else ""
    return f"{type(error).__name__}: {error}{place}"
