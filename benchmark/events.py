"""What runs tell others while they work: a JSON line per event, for any tracker that can follow a file."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmark.files import writing

FILE = "events.jsonl"


def tell(out: Path, event: str, **facts: Any) -> None:
    """Append an event to ``out/events.jsonl``.

    Args:
        out: the root of the runs.
        event: "begin", "progress" after each group of images, "end", or "pause" when the time was over.
        facts: of the run, e.g. ``run``, ``done`` of ``n`` images, ``robust`` so far with its interval.
    """
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event} | facts)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with (out / FILE).open("a") as file:
            file.write(line + "\n")
