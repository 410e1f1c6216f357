"""The loop behind every number: searches under way, several at a time, saved, judged and recorded as they end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attacks import PRECISIONS, AttackError, Batcher, Victim
from attacks._calls import Search
from benchmark import events, stats
from benchmark.errors import RunError
from benchmark.verdict import Judge, Judged
from purifiers import Tape

if TYPE_CHECKING:
    from benchmark.cell import Cell

BLOCK = 32
"""Images of one search, and the unit in which a third-party attack runs and resumes."""
SAVE_EVERY = 120.0
"""Seconds between saves of the searches under way."""


class Incomplete(Exception):
    """Stopped on request before the end; the same command continues (exit code 75)."""


class Engine:
    """Runs a cell on this machine.

    Images are searched in groups. While one group waits for its evaluation others go on, so that every call is full
    until the last images: continuous batching. An attack that retires images searches each by itself, so that the next
    takes the place of one that left. A package's attack gets aligned groups, one after another, as do modules whose
    noise depends on their neighbours.
    """

    def __init__(self, cell: Cell):
        self.cell, self.began = cell, time.monotonic()
        self.calls = Batcher(cell.rows, PRECISIONS[cell.identity.precision]())
        self.judge = Judge(cell, self.calls)
        self.view = cell.view(keep=cell.keep)
        self.done: dict[int, dict[str, Any]] = {}
        self.under_way: dict[int, dict[str, Any]] = {}
        self.saved = self.noted = self.began
        self.counted = self.calls.count
        self.length = self._length()

    def run(self, began: float) -> None:
        """Search and judge every image that isn't recorded yet.

        Raises:
            Incomplete: if the time is over; what is under way is saved.
            RunError: if the attack leaves its threat model.
        """
        cell, self.began = self.cell, began
        self.done = cell.folder.done()
        with tqdm(
            total=cell.searched() * self.length, unit="it", smoothing=0.1, disable=cell.settings.quiet,
            desc=cell.names["display"], mininterval=0.5 if sys.stderr.isatty() else 20,
        ) as self.bar:  # fmt: skip
            try:
                self._tell("begin")
                for positions, judged in self.calls.run(self._searches(), self._capacity()):
                    self._record(positions, judged)
                    self._tell("progress")
                self._tell("end")
            except Incomplete:
                self._tell("pause")
                raise
            except KeyboardInterrupt:  # the same command continues where the last whole iterations ended
                if self.under_way:
                    cell.folder.save_state(list(self.under_way.values()))
                raise

    def _length(self) -> int:
        """The iterations of an image, and as many as its judging is worth: a null floor is many draws."""
        attack, drawing = self.cell.attack, self.cell.drawing
        iterations, observed = attack.length(drawing), attack.evaluations(drawing)
        judging = self.cell.plan.forwards - observed
        return iterations + round(iterations * judging / max(observed + attack.gradients(drawing), 1))

    def _capacity(self) -> int:
        """How many images are searched at a time: enough to fill two calls, or one group where groups don't mix."""
        if not self.cell.mixes:
            return BLOCK
        draws = self.cell.attack.eot if hasattr(self.cell.attack, "eot") else 1
        return max(2 * BLOCK, -(-2 * self.cell.rows // draws))

    def _searches(self) -> Iterator[Search]:
        """What is left to search: what was under way first, then the others in order."""
        taken: set[int] = set()
        for lane in self.cell.folder.load_state(self.cell.device):
            positions = lane["positions"].tolist()
            if self._wanted(positions):
                taken |= set(positions)
                self.bar.update(len(positions) * int(lane["state"]["done"]))
                yield self._search(positions, lane["state"])
        for positions in self._groups(taken):
            yield self._search(positions, None)

    def _wanted(self, positions: list[int]) -> bool:
        """Whether a search that was under way is one of this run's, which may be of another n than that one's, and
        hasn't ended since it was saved."""
        left = set(self.cell.left())
        if self.cell.package:
            return positions == self._aligned(positions[0]) and not left.isdisjoint(positions)
        return left.issuperset(positions)

    def _groups(self, taken: set[int]) -> Iterator[list[int]]:
        left = [p for p in self.cell.left() if p not in taken]
        if self.cell.package:
            yield from (self._aligned(first) for first in sorted({p // BLOCK * BLOCK for p in left}))
            return
        size = 1 if self.cell.attack.retire else BLOCK
        if self.cell.mixes or self.cell.attack.retire:
            yield from (left[k : k + size] for k in range(0, len(left), size))
            return
        for first in sorted({p // BLOCK * BLOCK for p in left}):
            yield [p for p in left if first <= p < first + BLOCK]

    def _aligned(self, first: int) -> list[int]:
        """A package's search depends on its whole group: so that raising n extends the run, none is cut short.

        But for the last, at the end of what is loaded.
        """
        return list(range(first, min(first + BLOCK, len(self.cell.data))))

    def _search(self, positions: list[int], state: dict[str, Tensor] | None) -> Search:
        cell, first = self.cell, positions[0]
        rows = torch.tensor(positions)
        lane: dict[str, Any] = {"positions": rows, "state": state}

        def watch(k: int, state: dict[str, Tensor]) -> None:
            self.bar.update(len(positions))
            lane["state"] = state
            self.under_way[first] = lane
            self._pause()

        def work() -> tuple[list[int], Judged]:
            x, y = cell.data.images(rows).to(cell.device), cell.data.labels[rows].to(cell.device)
            ids = cell.data.ids[rows]
            if state is not None:
                self.under_way[first] = lane
            tape = Tape(cell.settings.seed, "verdict" if cell.view.foreknown else "attack", ids).to(cell.device)
            victim = Victim(
                cell.attacker, self.view, tape, self.calls, stochastic=cell.drawing, foreknown=cell.view.foreknown
            )
            try:
                found = cell.attack.perturb(x, y, victim, cell.threat, state=state, watch=watch)
            except AttackError as error:
                raise RunError(f"{cell}: {error}") from error
            return positions, self.judge.verdict(found, x, y, ids)

        return Search(work, len(positions))

    def _pause(self) -> None:
        """Save what is under way when it is time, and stop when the time is over."""
        now, stop_after = time.monotonic(), self.cell.settings.stop_after
        over = stop_after is not None and now - self.began > stop_after
        if over or now - self.saved > SAVE_EVERY:
            self.cell.folder.save_state(list(self.under_way.values()))
            self.saved = now
        if over:
            raise Incomplete

    def _record(self, positions: list[int], judged: Judged) -> None:
        """Write what ended, and how long it took."""
        cell, now = self.cell, time.monotonic()
        lane = self.under_way.pop(positions[0], None)
        self.bar.update(len(positions) * (self.length - (int(lane["state"]["done"]) if lane else 0)))
        new = [k for k, p in enumerate(positions) if p < cell.n and int(cell.data.ids[p]) not in self.done]
        cell.folder.write(
            [positions[k] for k in new], [judged.records[k] for k in new], judged.x_adv.cpu().numpy()[new],
            {name: logits.cpu().numpy()[new] for name, logits in judged.logits.items()},
        )  # fmt: skip
        self.done.update((judged.records[k]["id"], judged.records[k]) for k in new)
        count = self.calls.count - self.counted
        cell.folder.note_time(
            {
                "first": positions[0], "images": len(new), "seconds": now - self.noted, **count._asdict(),
                "batch": cell.rows, "keep": cell.keep,
                "peak_bytes": torch.cuda.max_memory_allocated() if cell.device.type == "cuda" else 0,
            }
        )  # fmt: skip
        self.noted, self.counted = now, self.calls.count
        self.bar.set_postfix_str(said(self._so_far()))

    def _so_far(self) -> dict[str, Any]:
        """How many images are done, their robust accuracy, and how soon the loop saw draws go wrong."""
        facts: dict[str, Any] = {"done": len(self.done), "n": self.cell.n}
        if not self.done:
            return facts
        shares = np.array([np.mean(np.array(r["adv"]) == r["label"]) for r in self.done.values()])
        robust = stats.accuracy(shares, self.cell.draws)
        facts |= {"robust": robust.mean, "robust_low": robust.low, "robust_high": robust.high}
        broken = [r["broken_at"] for r in self.done.values() if r["broken_at"] >= 0]
        if self.cell.watched:
            facts |= {"broken": len(broken) / len(self.done), "half_by": int(np.median(broken)) if broken else None}
        return facts

    def _tell(self, event: str) -> None:
        """Write an event for others to follow."""
        rate, left = self.bar.format_dict["rate"], self.bar.total - self.bar.n
        facts = self._so_far() | ({"identity": self.cell.folder.settings["identity"]} if event == "begin" else {})
        events.tell(
            Path(self.cell.settings.out), event, run=str(self.cell.folder.folder), **self.cell.names, **facts,
            seconds=round(time.monotonic() - self.began, 1), eta_seconds=round(left / rate, 1) if rate else None,
        )  # fmt: skip


def said(facts: dict[str, Any]) -> str:
    """What is known so far, in a line."""
    low, high = 100 * facts["robust_low"], 100 * facts["robust_high"]
    line = f"robust {facts['robust']:.1%} [{low:.0f}, {high:.0f}] of {facts['done']}"
    if not facts.get("broken"):
        return line
    return f"{line}, {facts['broken']:.0%} broken in the loop, half of those by iteration {facts['half_by']}"
