"""What a run will cost, before it starts: passes counted, one batch timed, memory measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attacks import PRECISIONS, Attack, Calls, NotApplicable
from attacks._calls import Request
from attacks._gradient import ce
from benchmark.errors import NotApplicableError
from purifiers import Tape

if TYPE_CHECKING:
    from benchmark.cell import Cell


@dataclass(frozen=True)
class Plan:
    """Draws of the defense per image, and image passes of the purifier's network in all.

    A pass is one image through the network once, forward or backward. For a third-party attack it is roughly an
    upper bound: images that break leave early. So it is for an attack that retires images.
    """

    n: int
    nfe: int
    forwards: int
    backwards: int
    upper_bound: bool

    @property
    def passes(self) -> int:
        return self.n * self.nfe * (self.forwards + self.backwards)

    def __str__(self) -> str:
        bound = "about " if self.upper_bound else ""
        return (
            f"plan: {self.n} images × ({bound}{self.forwards:,} forward + {self.backwards:,} backward draws) × "
            f"{self.nfe} network evaluations = {bound}{self.passes:,} image passes"
        )


def plan(
    attack: Attack, *, stochastic: bool, nfe: int, n: int, select: int, draws: int, null: int | None = None
) -> Plan:
    """The plan of one cell: the attack, the null floor (``null`` draws at x), selection, three verdicts.

    Without ``null`` it is the attack's different draws.
    """
    observed = attack.evaluations(stochastic)
    verdicts = 3 * draws + (attack.versions(stochastic) + 1) * select
    if null is None:
        null = max(attack.distinct(stochastic), attack.looks(stochastic)) if stochastic else 0
    return Plan(
        n, nfe, observed + null + verdicts, attack.gradients(stochastic),
        attack.package(stochastic) is not None or attack.retire > 0,
    )  # fmt: skip


class Price(NamedTuple):
    """What one cell costs on this device.

    Attributes:
        rows: rows of a network call.
        forward, gradient: seconds of a call of the whole defense, without and with its gradient.
        hours: of what isn't recorded yet, were every call full; None if it doesn't fit.
        keep: how many of the purifier's last stages keep their graphs; None for all.
        fits: "fits", "fits with K rows" where memory allows fewer than would be taken, or "doesn't fit".
        graph_bytes: what a gradient at this row count stores.
        disk_bytes: images and logits that the run will write, before compression.
    """

    rows: int
    forward: float
    gradient: float
    hours: float | None
    keep: int | None
    fits: str
    graph_bytes: float
    disk_bytes: int

    def __str__(self) -> str:
        if self.hours is None:
            return f"      doesn't fit: the gradient of 32 rows stores {_size(self.graph_bytes)}"
        graphs = "all graphs kept" if self.keep is None else f"graphs of the last {self.keep} stages kept"
        gradient = f", {self.gradient:.2g} s with its gradient" if self.gradient else ""
        return (
            f"      about {duration(self.hours)}: {self.forward:.2g} s a call of {self.rows} rows{gradient}; "
            f"{self.fits}, {graphs} ({_size(self.graph_bytes)}); {_size(self.disk_bytes)} of disk"
        )


def price(cell: Cell) -> Price:
    """Time one call of each kind, and measure memory.

    Raises:
        NotApplicableError: if the cell's view asks the purifier for what it doesn't have.
    """
    cell.check_classes()
    classes, shape = cell.data.form.classes, cell.data.shape
    pixels = shape[0] * shape[1] * shape[2]
    disk = 4 * cell.n * (pixels + classes * (3 * cell.draws + cell.select))
    feet = cell.footprint
    if cell.settings.rows is None and cell.fitting == 0:
        return Price(32, 0, 0, None, 0, "doesn't fit", 32 * (feet.inputs + max(feet.graphs)), disk)
    rows = cell.rows
    fits = "fits" if rows >= min(cell.most_rows, cell.settings.rows or rows) else f"fits with {rows} rows"
    index = torch.arange(rows) % len(cell.data)
    x, y = cell.data.images(index).to(cell.device), cell.data.labels[index].to(cell.device)
    tape = Tape(cell.settings.seed, "preflight", cell.data.ids[index], torch.arange(rows) // len(cell.data))
    tape = tape.to(cell.device)
    cell.prepare()
    calls = Calls(rows, PRECISIONS[cell.settings.precision]())
    forward = _seconds(calls, Request(cell.defense, None, x, tape, 1), cell.device)
    gradient = 0.0
    if cell.plan.backwards:
        view = cell.view(keep=cell.keep)
        try:
            gradient = _seconds(
                calls, Request(cell.attacker, view, x, tape, 1, ce, (y,), gradient=True), cell.device
            )  # fmt: skip
        except NotApplicable as error:
            raise NotApplicableError(f"{cell}: not applicable: {error}") from error
    p = cell.plan
    a_row = (p.forwards - p.backwards) * forward + p.backwards * gradient
    kept = sum(feet.graphs[len(feet.graphs) - cell.keep :]) if cell.keep is not None else sum(feet.graphs)
    kept += feet.inputs + max(feet.graphs) if cell.keep is not None else 0
    return Price(rows, forward, gradient, len(cell.left()) * a_row / rows / 3600, cell.keep, fits, rows * kept, disk)


def total(prices: list[Price], devices: int) -> dict[str, Any]:
    """Hours of all cells, on this device and, their images split among them, on several."""
    hours = sum(p.hours or 0 for p in prices)
    return {
        "hours": hours, "devices": devices, "hours_on_devices": hours / devices,
        "disk_bytes": sum(p.disk_bytes for p in prices),
    }  # fmt: skip


def duration(hours: float) -> str:
    """Hours as people say them."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{max(hours * 3600, 1):.0f} s"


def _seconds(calls: Calls, request: Request, device: torch.device) -> float:
    began = time.perf_counter()
    calls.ask(request)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _size(count: float) -> str:
    """Bytes in a unit that fits."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
