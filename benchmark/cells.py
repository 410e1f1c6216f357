"""The cells of a table: every combination of the purifiers, classifiers, attacks, radii, seeds and views named."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmark import checkpoints, config, registry, specs
from benchmark.cell import Cell
from benchmark.dataset import Dataset
from benchmark.defenses import made
from benchmark.errors import UsageError
from benchmark.grades import EVERYTHING, asked
from benchmark.settings import Settings
from purifiers import Defense


def grid(
    purifiers: str,
    classifiers: str,
    attacks: str,
    dataset: str,
    radii: Sequence[str | None],
    settings: Settings,
    copies: int = 1,
    combine: str = "logits",
    seeds: Sequence[int] = (0,),
    views: Sequence[str] = ("auto",),
) -> Iterator[Cell]:
    """The cells of specs with lists, braces and ``all``, a defense after the other; cells of one share its draws.

    The attacks may be ``graded``, too: for each defense those that its grade asks for.
    """
    pool = settings.examples(dataset)
    roots = (Path(settings.weights),) if settings.weights else ()
    if combine in ("probabilities", "vote") and copies == 1:
        raise UsageError(f"--combine {combine} would have no effect on one copy: add --copies N")
    need = checkpoints.Need(pool.form, settings.norm or "Linf", roots, settings.offline, settings.trust)
    lists = []
    for kind, text in (("purifiers", purifiers), ("classifiers", classifiers), ("attacks", attacks)):
        if text == "all":
            lists.append(_attacks(settings) if kind == "attacks" else checkpoints.at_hand(kind, need))
        else:
            lists.append(list(dict.fromkeys(s for item in specs.expand(text) for s in specs.split(item))))
        if not lists[-1]:
            raise UsageError(f"no {kind} are named: --{kind.removesuffix('s')} {text!r}")
    if settings.name and len(lists[0]) > 1:
        raise UsageError(f"--name {settings.name}: one purifier at a time, got {', '.join(lists[0])}")
    for p, c in itertools.product(*lists[:2]):
        defense = made(settings.shelf, p, c, need, copies, combine)
        one = dataclasses.replace(settings, eps=radii[0])
        known = _asked(defense, pool, one, specs.parse(p).name == "identity") if EVERYTHING in lists[2] else []
        meets = [a for named in lists[2] for a in (known if named == EVERYTHING else [named])]
        for seed, view, eps, attack in itertools.product(seeds, views, radii, dict.fromkeys(meets)):
            yield Cell(defense, pool, attack, dataclasses.replace(settings, eps=eps, seed=seed, view=view))


def _asked(defense: Defense, pool: Dataset, settings: Settings, bare: bool) -> list[str]:
    """The attacks that a grade asks for of this defense, under the threat model that was asked for, or Linf."""
    stochastic = Cell(defense, pool, "pgd", settings).stochastic
    budget = config.budget(settings.budget, torch.device(settings.device).type).name
    return asked(stochastic, budget, settings.norm or "Linf", bare)


def _attacks(settings: Settings) -> list[str]:
    """The attacks that "all" names: those that need no argument, under the threat model that was asked for, or Linf."""
    return [name for name in registry.names("attacks") if _searches(name, settings)]


def _searches(name: str, settings: Settings) -> bool:
    component: Any = registry.load("attacks", name)
    return (settings.norm or "Linf") in component.norms and not hasattr(component, "argument")
