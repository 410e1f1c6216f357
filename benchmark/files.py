"""Files that are written whole or not at all, by one process at a time, and whose damage is said."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from filelock import FileLock, Timeout

from benchmark.errors import RunError, UsageError


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failing disk into an error that says what became of the run."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{folder}: can't write ({error.strerror or error}); what is recorded stays readable. "
            "Free space or choose a writable --out, then give the same command again"
        ) from error


@contextmanager
def sole(path: Path, otherwise: str) -> Iterator[None]:
    """Hold the lock ``path`` while work goes on in its folder; the system frees it if the process is killed.

    Raises:
        RunError: if another process holds it, with the remedy ``otherwise``.
    """
    lock = FileLock(path, timeout=0)
    with writing(path.parent):
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"{path.parent}: another process is at work on this, so nothing was begun; let it end, or {otherwise}"
            ) from None
    try:
        yield
    finally:
        lock.release()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a last one without an end is being written, or was torn."""
    return [read_json(path, line, k) for k, line in enumerate(path.read_text().split("\n")[:-1], 1)]


def read_json(path: Path, text: str | None = None, line: int = 0) -> Any:
    """What a file, or a line of it, says.

    Raises:
        UsageError: if it is damaged.
    """
    with reading(path, line):
        return json.loads(path.read_text() if text is None else text)


@contextmanager
def reading(path: Path, line: int = 0) -> Iterator[None]:
    """Turn what is torn or changed in a run's file into an error that says where.

    Raises:
        UsageError: if it is damaged.
    """
    try:
        yield
    except (ValueError, KeyError, EOFError, BadZipFile) as error:  # what json and numpy raise
        where = f"line {line} of {path}" if line else str(path)
        raise UsageError(
            f"{where} is damaged ({error or 'it ends too early'}): restore it, or delete {path.parent} and run again"
        ) from error
