"""Checks: a question to a defense, a row, a record or a machine, and its answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Check(NamedTuple):
    """One question and its answer.

    Attributes:
        id: its name.
        status: "pass", "warn", "not run", "fail" or "n/a".
        value: what was found.
        threshold: what was expected.
        advice: what to do about it, if it didn't pass.
    """

    id: str
    status: str
    value: float | str
    threshold: float | str = ""
    advice: str = ""

    @classmethod
    def of(
        cls, name: str, good: bool, value: float | str, threshold: float | str, advice: str, *, bad: str = "fail"
    ) -> Check:
        """A check that passes, or has the status ``bad``."""
        return cls(name, "pass" if good else bad, value, threshold, advice)


def failures(checks: Iterable[Check]) -> list[Check]:
    """Those that failed."""
    return [one for one in checks if one.status == "fail"]
