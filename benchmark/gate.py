"""What a cell has to pass before its first image: its shapes, what is recorded of it, its preflight."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from attacks import PRECISIONS, Calls
from attacks._recompute import ROWS
from benchmark import defenses
from benchmark.afterwards import afterwards
from benchmark.checks import failures
from benchmark.dataset import FORMS
from benchmark.errors import RunError, UsageError, raised
from benchmark.preflight import accuracy_check, climb_check, declared_check, integral_check, preflight
from benchmark.repeatable import make_repeatable
from benchmark.results import logits
from benchmark.settings import KNOWN
from benchmark.verdict import Judge, classes
from purifiers import Tape

if TYPE_CHECKING:
    from benchmark.cell import Cell


NEAR = ", near the images"
"""What is said of a check that isn't of the images themselves."""


def check_shapes(cell: Cell) -> None:
    """Whether the classifier's outputs fit the images, the labels and the attack's losses."""
    x = cell.data.images(slice(0, 1)).to(cell.device)
    try:
        with torch.no_grad():
            logits = cell.defense.classifier(x)
    except Exception as error:  # torch's own, of shapes that don't fit, or whatever a user's module raises
        raise UsageError(
            f"{cell}: the classifier takes no images of shape {tuple(x.shape[1:])}: {raised(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(
            f"{cell}: the classifier returned {what}; it has to return logits, a tensor of shape (images, classes)"
        )
    classes = logits.shape[1]
    form, least = cell.data.form, cell.attack.least_classes(cell.drawing)
    if form.family in FORMS and classes != form.classes:
        raise UsageError(
            f"{cell}: {form.family} has {form.classes} classes, the classifier has {classes} outputs: wrap it in a "
            f"function that returns the {form.classes} logits in the data set's order (file:mine.py:NAME), "
            "without any that rejects an image"
        )
    highest = int(cell.data.labels.max())
    if highest >= classes:
        raise UsageError(f"{cell}: labels go up to {highest}, the classifier has {classes} outputs")
    if classes < least:
        raise UsageError(
            f"{cell}: the attack's losses need at least {least} classes, the classifier has {classes}; "
            "aim at fewer targets, or use pgd, whose cross-entropy needs two"
        )


def check_past(cell: Cell) -> None:
    """Whether a defense that its own code decides still says what it said of images that are recorded.

    Its fingerprint doesn't see what that code reads from files or the environment. A shipped component's weights
    and protocol say all.

    Raises:
        UsageError: if logits at the first recorded images are others.
    """
    done, identity = cell.folder.done(), cell.identity
    by_hand = defenses.built_by_hand({"weights": identity.weights})
    own = by_hand or "file:" in identity.purifier + identity.classifier
    known = [p for p in range(cell.n) if int(cell.data.ids[p]) in done][:8]
    if not (own and known) or (cell.stochastic and cell.folder.settings["noise"] == "global"):
        return
    make_repeatable(cell.device)
    x, ids = cell.data.images(torch.tensor(known)).to(cell.device), cell.data.ids[known]
    now = Judge(cell, Calls(cell.folder.begun_rows() or ROWS)).clean(x, ids).cpu()
    stored = logits(cell.folder.folder, "clean")
    other = sum(
        _other(logits, stored[i]) if i in stored else classes(logits).tolist() != done[i]["clean"]
        for logits, i in zip(now, ids.tolist(), strict=True)
    )
    if other:
        raise UsageError(
            f"{cell.folder.folder}: for {other} of {len(known)} recorded images the defense now answers differently, "
            "though its fingerprint is the same (does it read a file that has changed?): nothing was overwritten; "
            "choose another --out or delete the folder"
        )


def check_defense(cell: Cell) -> None:
    """The preflight, at unperturbed images and at randomly perturbed ones; what only warns is noted in the run.

    Raises:
        RunError: if a check fails: the run would measure a fault.
    """
    if not cell.settings.preflight:
        return
    few = slice(0, min(8, len(cell.data)))
    x, y, ids = cell.data.images(few).to(cell.device), cell.data.labels[few].to(cell.device), cell.data.ids[few]
    view = cell.view(keep=1) if cell.attack.gradients(cell.drawing) else None
    # a defense may be another where it takes an image for an attacked one
    near = cell.threat.control(x, Tape(cell.settings.seed, "preflight", ids).to(cell.device).fold("near"))
    checks = [
        check if images is x else check._replace(id=f"{check.id}{NEAR}")
        for images in (x, near)
        for check in preflight(
            cell.defense, view, images, y, ids, seed=cell.settings.seed, rows=ROWS, attacker=cell.attacker
        )
    ]
    told = {check.id for check in checks if check.status in ("fail", "warn")}  # what fails at both is said once
    checks = [check for check in checks if (at := check.id.removesuffix(NEAR)) == check.id or at not in told]
    if view is not None:
        tape = Tape(cell.settings.seed, "preflight", ids).to(cell.device)
        checks.append(integral_check(cell.attacker, cell.view(keep=0), x, tape, rows=ROWS))
        checks.append(declared_check(cell.attacker, x[:4], y[:4], tape[:4]))
        some = slice(0, min(ROWS, len(cell.data)))
        x, y, ids = cell.data.images(some).to(cell.device), cell.data.labels[some].to(cell.device), cell.data.ids[some]
        tape = Tape(cell.settings.seed, "preflight", ids).to(cell.device).fold("climb")
        calls = Calls(cell.rows, PRECISIONS[cell.identity.precision]())
        checks.append(climb_check(cell.attacker, cell.view(keep=cell.keep), x, y, tape, cell.threat, calls))
    if (expected := getattr(cell.defense, "accuracy", None)) is not None:
        few = slice(0, min(KNOWN, len(cell.data)))
        x, y = cell.data.images(few).to(cell.device), cell.data.labels[few].to(cell.device)
        checks.append(accuracy_check(cell.defense.classifier, x, y, expected, rows=ROWS))
    if failed := failures(checks):
        cell.folder.discard()
        lines = "\n".join(f"  {c.id}: {c.value} (expected {c.threshold}): {c.advice}" for c in failed)
        raise RunError(
            f"preflight failed, nothing was run (--no-preflight runs anyway, and the table says so):\n{lines}"
        )
    cell.folder.note(warnings=[check.id for check in checks if check.status == "warn"])
    for check in () if cell.settings.quiet else (c for c in checks if c.status == "warn"):
        value = f"{check.value:.2g}" if isinstance(check.value, float) else check.value
        print(f"note: {check.id} is {value} (expected {check.threshold}): {check.advice}", file=sys.stderr)


def check_afterwards(cell: Cell) -> None:
    """Ask the defense again once it was attacked; what it says is noted in the run, whose grade hears it."""
    if not cell.settings.preflight or not cell.folder.done():
        return
    checks = afterwards(cell)
    cell.folder.note(afterwards=[check._asdict() for check in checks])
    for check in () if cell.settings.quiet else failures(checks):
        print(f"note: {check.id}: {check.value}: {check.advice}; its grade is F", file=sys.stderr)


def _other(logits: Tensor, stored: np.ndarray) -> bool:
    """Whether logits of some draws are others than those on disk, by more than another machine's rounding."""
    then = torch.from_numpy(stored).to(logits.dtype)
    scale = then.nan_to_num().abs().max().clamp_min(1)
    same = then.shape == logits.shape
    return not (same and torch.allclose(logits, then, rtol=0, atol=float(1e-3 * scale), equal_nan=True))
