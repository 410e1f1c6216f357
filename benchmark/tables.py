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

    Raises:
        RunError: if a command fails.
    """
    return BLOCK.sub(lambda match: match[1] + _output(match[2]) + match[4], text)


def stale(path: Path) -> bool:
    """Whether a block of the file isn't what its command prints."""
    return render(path.read_text()) != path.read_text()


def _output(command: str) -> str:
    from benchmark.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(shlex.split(command))
    if code:
        raise RunError(f"python -m benchmark {command} ended with {code}")
    return printed.getvalue()
