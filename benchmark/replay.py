"""The images of a run again: what was attacked, what came of it, and what the purifier makes of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmark import checkpoints, data
from benchmark.defenses import built_by_hand
from benchmark.errors import UsageError
from benchmark.files import reading
from benchmark.foreign import Foreign
from purifiers import Purifier, Tape
from purifiers._base import call


class Replay(NamedTuple):
    """Images (B, C, H, W) in [0, 1] of one run, purified as its records' first draws were; of several copies the first.

    A module that draws from global generators takes its noise from its place in a batch, so it draws as it did, but
    not the same.

    Attributes:
        run: as ``results.read_run`` gives it.
        records: those of the images.
        purifier: the run's.
        noise: the tape of the first verdict draw.
        x, x_adv: unperturbed and adversarial images.
        purified: g(x) in the first draw at x itself.
        purified_adv: g(x_adv) in the first verdict draw.
        unmoved: g(x) under the noise of that verdict draw.
    """

    run: dict[str, Any]
    records: list[dict[str, Any]]
    purifier: torch.nn.Module
    noise: Tape
    x: Tensor
    x_adv: Tensor
    purified: Tensor
    purified_adv: Tensor
    unmoved: Tensor


def replay(
    run: dict[str, Any],
    count: int,
    *,
    weights: Sequence[Path] = (),
    data_dir: str | None = None,
    dataset: str | None = None,
) -> Replay:
    """The first ``count`` images of a run.

    Args:
        run: as ``results.read_run`` gives it.
        count: how many.
        weights: folders with further cards.
        data_dir: where data sets lie.
        dataset: where the data set is, if it came from files.

    Raises:
        UsageError: if the run has no adversarial images at hand, fewer than ``count``, or other weights or images.
    """
    identity, folder = run["identity"], Path(run["folder"])
    if built_by_hand(identity):
        raise UsageError(f"{folder}: {identity['purifier']} was built in Python: no command can purify with it again")
    records = run["records"][:count]
    path = folder / "adversarial.npy"
    if not records:
        raise UsageError(f"{folder} has no finished image yet: the command that began it continues it")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; adversarial images stay with the run: repeat it with another --out")
    if len(records) < count:
        raise UsageError(f"{folder} has {len(records)} images, {count} were asked for")
    try:
        images = data.load(dataset or identity["dataset"], len(run["records"]), data_dir=data_dir)
    except UsageError as error:
        raise UsageError(f"{error}; say where the images of {folder} are: --dataset, --data-dir") from error
    if images.fingerprint != identity["fingerprint"]:
        raise UsageError(f"{folder} attacked other images of {identity['dataset']} than {images.name} holds here")
    rows = [int((images.ids == r["id"]).nonzero()[0]) for r in records]
    with reading(path):
        stored = np.load(path, mmap_mode="r")
    component = checkpoints.build(
        "purifiers", identity["purifier"], checkpoints.Need(images.form, roots=tuple(weights))
    )
    for part, digest in component.weights.items():
        if identity["weights"].get(f"purifier.{part}") != digest:
            raise UsageError(f"{folder}: {part} of {identity['purifier']} has other weights than the run had")
    x, x_adv = images.images(torch.tensor(rows)), torch.from_numpy(np.array(stored[rows]))
    purifier = component.module if isinstance(component.module, Purifier) else Foreign(component.module, x)
    clean, noise = (_first(Tape(identity["seed"], role, images.ids[rows]), identity) for role in ("clean", "verdict"))
    with torch.no_grad():
        purified, purified_adv, unmoved = (call(purifier, z, n) for z, n in ((x, clean), (x_adv, noise), (x, noise)))
    return Replay(run, records, purifier, noise, x, x_adv, purified, purified_adv, unmoved)


def _first(tape: Tape, identity: dict[str, Any]) -> Tape:
    """The tape of a role's first draw; where several copies are purified, of the first copy."""
    tape, copies = tape.draws(1), identity["copies"]
    return tape if copies == 1 else tape.fold("copies", copies).draws(copies)[::copies]


def codes(replayed: Replay) -> Tensor | None:
    """The discrete codes of the unperturbed images, (B, …); None without a codebook."""
    purifier = replayed.purifier
    if not isinstance(purifier, Purifier):
        return None
    with torch.no_grad():
        return purifier.codes(purifier.start(replayed.x, replayed.noise.fold("round", 0))[0])
