"""Whether a defense, asked again once its attack is over, says what the verdict heard."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from attacks import PRECISIONS, Calls
from attacks._calls import Request
from attacks._gradient import ce
from attacks._recompute import ROWS
from benchmark import defenses, elsewhere, evidence, stats
from benchmark.checks import Check
from benchmark.errors import RunError
from benchmark.grades import MARGIN
from benchmark.verdict import classes
from purifiers import Tape

if TYPE_CHECKING:
    from benchmark.cell import Cell

LOOKS = 4
"""Draws that the attacker takes of an image again."""
DOUBT = 1e-3
"""The level of these tests. Who lies is far below it; at 0.025 one honest defense in twenty that draws would fail by
chance in one of its runs, and in the same at every repetition."""
FEWEST = 10
"""Images that can tell at that level: 2^-10 is below it."""


def afterwards(cell: Cell) -> list[Check]:
    """Questions about the first recorded adversarial images, after which their verdict should stand.

    - ``verdict-again``: the verdict's own draws, of the images in another order and in calls of another size. A defense
      that remembers, that sees its neighbours, or that is another one in large calls answers otherwise.
    - ``attacker-hears-the-verdict``: fresh draws as the attack has them, with gradients where it takes them. A defense
      that tells the attacker from the judge is wrong for one and right for the other.
    - ``verdict-elsewhere``: the verdict's draws again, of a defense built in a process of its own. One that
      remembers outside of its modules, e.g. in a cache of its file, or that goes by the clock or by how often it was
      asked, answers otherwise. Of the benchmark's own code nobody has to ask that.

    Each fails where the verdict, paired over images, was better by more than 5 points and not by chance (``DOUBT``).
    """
    done, ids = cell.folder.done(), cell.data.ids.tolist()
    rows = [p for p in range(cell.n) if ids[p] in done][: 2 * ROWS]
    stored = np.load(cell.folder.folder / "adversarial.npy", mmap_mode="r")
    x_adv = torch.from_numpy(np.array(stored[rows])).to(cell.device)
    y = cell.data.labels[rows].to(cell.device)
    heard = evidence.shares([done[ids[p]] for p in rows])
    checks = [_again(cell, x_adv, y, rows, heard), _as_attacker(cell, x_adv, y, rows, heard)]
    if elsewhere.others_code(cell):
        checks.append(_elsewhere(cell, x_adv, y, rows, heard))
    return checks


def _again(cell: Cell, x_adv: Tensor, y: Tensor, rows: list[int], heard: np.ndarray) -> Check:
    """The verdict's draws, backwards."""
    order = torch.arange(len(rows) - 1, -1, -1)
    tape = Tape(cell.settings.seed, "verdict", cell.data.ids[rows][order]).to(cell.device)
    request = Request(cell.defense, None, x_adv[order], tape, cell.draws)
    try:
        share = _share(Calls(ROWS if cell.rows > ROWS else 2 * ROWS), request, y[order])
    except torch.cuda.OutOfMemoryError:  # of 32 rows, and twice as many don't fit
        share = _share(Calls(ROWS), request, y[order])
    share = share[order.numpy()]
    return _same(
        "verdict-again", share, heard,
        "it answers otherwise in another order, or in calls of another size: keep no state between calls, and let no "
        "row see another",
    )  # fmt: skip


def _as_attacker(cell: Cell, x_adv: Tensor, y: Tensor, rows: list[int], heard: np.ndarray) -> Check:
    """Fresh draws of the attack's role, through its view."""
    name = "attacker-hears-the-verdict"
    if cell.attacker is not cell.defense or cell.view.spec.name == "blind" or cell.view.foreknown:
        return Check(name, "n/a", "", "", "the attacker asks another defense, or knows the verdict's draws")
    tape = Tape(cell.settings.seed, "attack", cell.data.ids[rows]).to(cell.device).fold("afterwards")
    gradient = cell.attack.gradients(cell.drawing) > 0
    view, draws = cell.view(keep=cell.keep) if gradient else None, LOOKS if cell.stochastic else 1
    request = Request(cell.defense, view, x_adv, tape, draws, ce if gradient else None, (y,) * gradient, gradient)
    calls = Calls(cell.rows, PRECISIONS[cell.identity.precision]())
    return _same(
        name, _share(calls, request, y), heard,
        "it is right for the judge where it is wrong for the attacker: the search climbed another defense than the one "
        "that was judged",
    )  # fmt: skip


def _elsewhere(cell: Cell, x_adv: Tensor, y: Tensor, rows: list[int], heard: np.ndarray) -> Check:
    """The verdict's draws in another process, where only these images were ever asked."""
    name = "verdict-elsewhere"
    if defenses.built_by_hand(asdict(cell.identity)):
        return Check(name, "n/a", "", "", "it was built in Python: write file:PATH.py:Class to have it built anew")
    try:
        logits = elsewhere.logits(cell, x_adv, cell.data.ids[rows])
    except RunError as error:
        advice = "what the defense is built of has to be there in any process; then the same command asks again"
        return Check(name, "not run", str(error), "no fewer than in the verdict", advice)
    return _same(
        name, _right(logits, y.cpu(), cell.draws), heard,
        "it answers otherwise in a process of its own: keep no state outside the module, e.g. in a cache of the file, "
        "and go neither by the clock nor by how often it was asked",
    )  # fmt: skip


def _share(calls: Calls, request: Request, y: Tensor) -> np.ndarray:
    return _right(calls.ask(request).logits, y, request.draws)


def _right(logits: Tensor, y: Tensor, draws: int) -> np.ndarray:
    """The share of correct draws per image."""
    return (classes(logits).unflatten(0, (-1, draws)) == y[:, None]).double().mean(1).cpu().numpy()


def _same(name: str, share: np.ndarray, heard: np.ndarray, advice: str) -> Check:
    if len(heard) < FEWEST:
        return Check(name, "n/a", "", "", f"fewer than {FEWEST} images can't tell")
    better = stats.compare(heard, share, one_sided=True)
    told = f"{100 * share.mean():.1f} % right, {100 * heard.mean():.1f} % in the verdict, of {len(heard)} images"
    flattered = better.difference > MARGIN and better.p < DOUBT
    return Check.of(name, not flattered, told, "no fewer than in the verdict", advice)
