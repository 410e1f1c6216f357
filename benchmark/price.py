"""What a run will cost on this device, before it starts: one batch timed, memory measured."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attacks import PRECISIONS, Calls, NotApplicable
from attacks._calls import Request
from attacks._gradient import ce
from attacks._recompute import ROWS
from benchmark import memory
from benchmark.defenses import as_it_was
from benchmark.errors import NotApplicableError
from benchmark.gate import check_shapes
from purifiers import Defense, Tape

if TYPE_CHECKING:
    from benchmark.cell import Cell


class Price(NamedTuple):
    """What one cell costs on this device.

    Attributes:
        rows: rows of a network call.
        forward, gradient: seconds of a call of the whole defense, without and with its gradient.
        hours: of what isn't recorded yet, were every call full; None if it doesn't fit.
        keep: how many of the purifier's last stages keep their graphs; None for all.
        fits: "fits", "fits with K rows" where memory allows fewer than would be taken, or "doesn't fit".
        graph_bytes: what a gradient at this row count stores.
        disk_bytes: images and logits that are still to be written, before compression.
        upper_bound: whether images may leave the attack early, which makes it shorter.
    """

    rows: int
    forward: float
    gradient: float
    hours: float | None
    keep: int | None
    fits: str
    graph_bytes: float
    disk_bytes: int
    upper_bound: bool = False

    def __str__(self) -> str:
        if self.hours is None:
            return f"      doesn't fit: the gradient of 32 rows stores {memory.size(self.graph_bytes)}"
        if self.hours == 0:
            return "      all images are recorded: nothing to compute"
        most = "at most " if self.upper_bound else ""
        parts = [f"{most}about {duration(self.hours)}: {_time(self.forward)} a call of {self.rows} rows"]
        if self.gradient:
            graphs = {None: "all graphs kept", 0: "every step recomputed"}.get(
                self.keep, f"graphs of the last {self.keep} stages kept"
            )
            parts[0] += f", {_time(self.gradient)} with its gradient"
            parts.append(f"{self.fits}, {graphs} ({memory.size(self.graph_bytes)})")
        return "      " + "; ".join([*parts, f"{memory.size(self.disk_bytes)} of disk"])


LONG = 5.0
"""Seconds of one image on a CPU from which on no whole call is timed."""
TIMED: WeakKeyDictionary[Defense, dict[tuple, float]] = WeakKeyDictionary()
"""Seconds of calls that were timed, by defense: the cells of a grid share them."""


def price(cell: Cell) -> Price:
    """Time one call of each kind, and measure memory.

    Raises:
        NotApplicableError: if the cell's view asks the purifier for what it doesn't have.
    """
    with as_it_was(cell.defense, cell.attacker):
        return _price(cell)


def _price(cell: Cell) -> Price:
    check_shapes(cell)
    left = len(cell.left())
    classes, pixels = cell.data.form.classes, math.prod(cell.data.shape)
    disk = 4 * left * (pixels + classes * (3 * cell.draws + cell.select))
    if not left:
        return Price(cell.rows, 0, 0, 0, None, "fits", 0, 0)
    try:
        feet, wanted, fitting = cell.footprint, cell.most_rows, cell.fitting
        if fitting == 0:
            return Price(ROWS, 0, 0, None, 0, "doesn't fit", ROWS * feet.least, disk)
        fits = "fits" if fitting >= wanted else f"fits with {fitting} rows"
        cell.prepare()
        while True:
            try:
                forward, gradient = _forward(cell), _gradient(cell)
                break
            except torch.cuda.OutOfMemoryError:
                pass
            cell.halve()
            fits = f"fits with {cell.rows} rows"
    except NotApplicable as error:
        raise NotApplicableError(f"{cell}: not applicable: {error}") from error
    except torch.cuda.OutOfMemoryError:  # for a single image
        return Price(ROWS, 0, 0, None, 0, "doesn't fit", float("nan"), disk)
    p = cell.plan
    seconds = cell.searched() * ((p.forwards - p.backwards) * forward + p.backwards * gradient) / cell.rows
    graphs = cell.rows * feet.stored(cell.keep)
    return Price(cell.rows, forward, gradient, seconds / 3600, cell.keep, fits, graphs, disk, cell.plan.upper_bound)


def total(prices: list[Price], devices: int) -> dict[str, Any]:
    """Hours of all cells that fit, on this device and, their images split among them, on several."""
    hours = sum(p.hours or 0 for p in prices)
    return {
        "hours": hours, "devices": devices, "hours_on_devices": hours / devices,
        "disk_bytes": sum(p.disk_bytes for p in prices),
    }  # fmt: skip


def duration(hours: float) -> str:
    """Hours as people say them."""
    for unit, of in (("h", 1.0), ("min", 1 / 60)):
        if hours >= of:
            return f"{hours / of:,.1f} {unit}" if hours < 10 * of else f"{hours / of:,.0f} {unit}"
    return f"{max(hours * 3600, 1):.0f} s"


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _batch(cell: Cell) -> tuple[Tensor, Tensor, Tape]:
    """As many images as a call takes, their labels and noise."""
    index = torch.arange(cell.rows) % len(cell.data)
    tape = Tape(cell.settings.seed, "preflight", cell.data.ids[index], torch.arange(cell.rows) // len(cell.data))
    return cell.data.images(index).to(cell.device), cell.data.labels[index].to(cell.device), tape.to(cell.device)


def _forward(cell: Cell) -> float:
    """Seconds of a call of the defense that is judged."""
    x, _, tape = _batch(cell)
    return _seconds(cell, cell.defense, "forward", Request(cell.defense, None, x, tape, 1))


def _gradient(cell: Cell) -> float:
    """Seconds of a call of what the attacker differentiates; 0 for one who doesn't."""
    if not cell.plan.backwards:
        return 0.0
    x, y, tape = _batch(cell)
    request = Request(cell.attacker, cell.view(keep=cell.keep), x, tape, 1, ce, (y,), gradient=True)
    return _seconds(cell, cell.attacker, f"{cell.view} {cell.identity.precision}", request)


def _seconds(cell: Cell, defense: Defense, what: str, request: Request) -> float:
    """How long a call takes: the second one, unless the first took so long that what it sets up is lost in it.

    On a CPU a call of a large network is ``rows`` times the time of one image.
    """
    precision = PRECISIONS[cell.identity.precision]()
    calls, one = Calls(cell.rows, precision), slice(0, 1)
    timed = TIMED.setdefault(defense, {})
    key = (what, str(cell.device), cell.rows, cell.keep)
    if key not in timed and cell.device.type == "cpu" and not cell.settings.compile:
        columns = tuple(column[one] for column in request.columns)
        alone = request._replace(x=request.x[one], noise=request.noise[one], columns=columns)
        if (seconds := stopwatch(Calls(1, precision), alone)) > LONG:
            timed[key] = cell.rows * seconds
    if key not in timed:
        timed[key] = stopwatch(calls, request)
        if timed[key] < 5 or cell.settings.compile:
            timed[key] = stopwatch(calls, request)
    return timed[key]


def stopwatch(calls: Calls, request: Request) -> float:
    """How long an answer takes, until the device has it."""
    device = request.x.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    calls.ask(request)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
