"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from benchmark.cli import reports, runs, tools
from benchmark.cli.common import DONE, FAILED, INCOMPLETE, USAGE, complain
from benchmark.cli.grammar import parser
from benchmark.errors import RunError, UsageError

__all__ = ["COMMANDS", "DONE", "FAILED", "INCOMPLETE", "USAGE", "main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 a run failed, 2 bad usage, 75 incomplete."""
    words = list(sys.argv[1:] if argv is None else argv)
    for k in [k for k, word in enumerate(words[:-1]) if word == "--sort"]:  # -robust is a column here, not an option
        words[k : k + 2] = [f"--sort={words[k + 1]}"]
    try:
        arguments, extra = parser().parse_known_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    if extra:
        return complain(_unknown(extra[0], arguments), USAGE)
    from benchmark.fetch import NetworkForbidden, network

    try:
        with network(allowed=not getattr(arguments, "offline", False)):
            return COMMANDS[arguments.command](arguments) or DONE
    except UsageError as error:
        return complain(error, USAGE)
    except RunError as error:
        return complain(error, FAILED)
    except NetworkForbidden as error:
        return complain(f"{error}; run without --offline once, or bring the file by hand (fetch --list)", USAGE)
    except KeyboardInterrupt:
        return complain("interrupted; the same command continues", INCOMPLETE)
    except BrokenPipeError:
        return DONE
    except OSError as error:
        if error.filename is None:
            raise
        return complain(f"{error.filename}: {error.strerror}; name another file or folder, or make it usable", FAILED)


def _unknown(word: str, arguments: argparse.Namespace) -> str:
    """The message for a word that a command doesn't take: the nearest option, and where all are listed."""
    known = [f"--{name.replace('_', '-')}" for name in vars(arguments)]
    near = get_close_matches(word.partition("=")[0], known, 1)
    hint = f"; did you mean {near[0]}?" if near else ";"
    return f"{arguments.command} takes no {word}{hint} {arguments.command} --help lists what it takes"


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "audit": reports.audit,
    "bench": tools.bench,
    "check": tools.check,
    "diagnose": reports.diagnose,
    "doctor": tools.doctor,
    "fetch": tools.fetch,
    "list": tools.listed,
    "plan": runs.plan,
    "purify": tools.purify,
    "sample": tools.sample,
    "report": reports.report,
    "run": runs.run,
    "status": runs.status,
    "tables": reports.tables,
    "train": tools.train,
    "verify": tools.verify,
}
