"""Generated tables inside Markdown files: what stands between two markers is what a command prints."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from benchmark.errors import RunError

BLOCK = re.compile(r"(<!-- table: python -m benchmark ([^\n]*?) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def render(text: str) -> str:
    """``text`` with every block between ``<!-- table: python -m benchmark … -->`` and ``<!-- /table -->`` made anew.

    A note below a table stands below the first table that has it, and nowhere else in the text.

    Raises:
        RunError: if a command fails.
    """
    noted: set[str] = set()
    return BLOCK.sub(lambda match: match[1] + _once(_output(match[2]), noted) + match[4], text)


def stale(path: Path) -> bool:
    """Whether a block of the file isn't what its command prints."""
    return render(path.read_text()) != path.read_text()


def _once(printed: str, noted: set[str]) -> str:
    """What a command printed without the notes below its last row that are ``noted`` already; then all of them are."""
    lines = printed.splitlines(keepends=True)
    rows = [k for k, line in enumerate(lines) if line.startswith("|")]
    end = rows[-1] + 1 if rows else len(lines)
    notes = [line for line in lines[end:] if line not in noted]
    noted.update(line for line in notes if line.strip())
    return "".join(lines[:end] + notes).rstrip("\n") + "\n"


def _output(command: str) -> str:
    from benchmark.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(shlex.split(command))
    if code:
        raise RunError(f"python -m benchmark {command} ended with {code}")
    return printed.getvalue()
