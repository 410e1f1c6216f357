"""What commands share: exit codes, and what their options say of devices and files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DONE, FAILED, USAGE, INCOMPLETE = 0, 1, 2, 75


def needed(arguments: argparse.Namespace) -> Any:
    from benchmark import data
    from benchmark.checkpoints import Need

    form = data.form(arguments.dataset, data_dir=arguments.data_dir, offline=arguments.offline)
    roots = (Path(arguments.weights),) if arguments.weights else ()
    return Need(form, arguments.norm, roots, arguments.offline, arguments.trust_checkpoint)


def print_findings(found: Sequence[Any]) -> None:
    """A line per check or finding, and what to do about it."""
    marks = {"pass": "OK  ", "warn": "WARN", "fail": "FAIL", "n/a": "–   ", "not run": "–   "}
    for f in found:
        told = getattr(f, "threshold", "") != "" and f.status in ("warn", "fail")
        expected = f" (expected {f.threshold})" if told else ""
        value = f"{f.value:.3g}" if isinstance(f.value, float) else f.value
        print(f"{marks[f.status]} {f.id:<24} {value}{expected}")
        if f.advice and f.status in ("warn", "fail"):
            print(f"     → {f.advice}")


def complain(message: object, code: int) -> int:
    print(f"benchmark: {message}", file=sys.stderr)
    return code
