"""Defenses by name, by grid, or built by hand, and what identifies them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import json
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmark import checkpoints, config, data, registry
from benchmark.data import Form
from benchmark.errors import UsageError
from benchmark.fetch import network
from benchmark.fingerprint import BOOKKEEPING, fingerprint, stamp
from benchmark.foreign import Foreign
from benchmark.grades import EVERYTHING, asked
from purifiers import Defense, Purifier

if TYPE_CHECKING:
    from benchmark.cell import Cell
    from benchmark.settings import Settings


BY_HAND = ("purifier", "classifier")
"""What the weights of a defense without specs are filed under: the fingerprints of its two modules."""


def load(
    purifier: str,
    classifier: str = "resnet",
    dataset: str | Form = "fashion-mnist",
    *,
    copies: int = 1,
    combine: str = "logits",
    norm: str = "Linf",
    weights: str | None = None,
    data_dir: str | None = None,
    offline: bool = False,
    trust: bool = False,
) -> Defense:
    """``benchmark.load``."""
    with network(not offline):
        form = data.form(dataset, data_dir=data_dir, offline=offline) if isinstance(dataset, str) else dataset
        need = checkpoints.Need(form, norm, (Path(weights),) if weights else (), offline, trust)
        return _made(checkpoints.Shelf(), purifier, classifier, need, copies, combine)


def _made(shelf: checkpoints.Shelf, purifier: str, classifier: str, need: Any, copies: int, combine: str) -> Defense:
    g, f = shelf.build("purifiers", purifier, need), shelf.build("classifiers", classifier, need)
    try:
        defense = Defense(g.module, f.module, copies=copies, combine=combine)
    except ValueError as error:
        raise UsageError(str(error)) from error
    defense.described = {  # type: ignore[assignment]
        "purifier": str(g.spec),
        "classifier": str(f.spec),
        "weights": {f"purifier.{k}": v for k, v in g.weights.items()}
        | {f"classifier.{k}": v for k, v in f.weights.items()},
        "names": {"purifier": purifier, "classifier": classifier},
    }
    defense.as_described = _stamps(defense)  # type: ignore[assignment]
    defense.accuracy = f.accuracy  # type: ignore[assignment]
    return defense


def describe(defense: Defense) -> dict[str, Any]:
    """What identifies a defense: canonical specs and weight hashes, or, if it was built or changed by hand, what it
    holds."""
    if getattr(defense, "as_described", None) == _stamps(defense):
        return defense.described  # type: ignore[return-value]
    parts = dict(zip(BY_HAND, (defense.purifier, defense.classifier), strict=True))
    names = {part: _named(module) for part, module in parts.items()}
    weights = {part: fingerprint(module) for part, module in parts.items()}
    return {**names, "weights": weights, "names": names}


def told(described: dict[str, Any]) -> str:
    """What identifies a defense, as one text: ``describe`` without what it is called."""
    return json.dumps({key: value for key, value in described.items() if key != "names"}, sort_keys=True)


def built_by_hand(identity: dict[str, Any]) -> bool:
    """Whether a run's defense has no specs by which it could be built again."""
    return all(part in identity["weights"] for part in BY_HAND)


def _named(module: nn.Module) -> str:
    """The class of a module and the numbers and words that its constructor took, written as a spec."""
    taken = inspect.signature(type(module).__init__).parameters
    options: dict[str, registry.Value] = {
        key: value
        for key, value in vars(module).items()
        if key in taken and (isinstance(value, bool | int | float) or re.fullmatch(r"[\w.-]+", str(value)))
    }
    return str(registry.Spec(type(module).__name__, None, options))


def _stamps(defense: Defense) -> list[tuple]:
    return [stamp(module) for module in (defense.purifier, defense.classifier)]


@contextmanager
def lent(defense: Defense) -> Iterator[None]:
    """Give the caller's defense back on the device that it came from.

    Raises:
        UsageError: if it isn't a ``Defense``.
    """
    if not isinstance(defense, Defense):
        raise UsageError(
            f"{type(defense).__name__} is no purifiers.Defense: wrap a purifier and a classifier, any two modules, in "
            "Defense(purifier, classifier); for a classifier alone take Defense(torch.nn.Identity(), classifier)"
        )
    for part in BY_HAND:
        if not isinstance(module := getattr(defense, part), nn.Module):
            raise UsageError(f"the {part} of a Defense is a torch.nn.Module, got {type(module).__name__}")
    tensors = itertools.chain(defense.parameters(), defense.buffers())
    home = next((tensor.device for tensor in tensors), None)
    try:
        yield
    finally:
        if home is not None:
            defense.to(home)


TORCHS = {*vars(nn.Module()), *BOOKKEEPING}
"""What torch keeps in every module."""
KEPT = (list, dict, set, Counter, defaultdict, OrderedDict)
"""Containers that are put back as they were; others may refuse, e.g. a configuration that is frozen."""


@contextmanager
def as_it_was(*defenses: Defense) -> Iterator[None]:
    """What calls leave behind in a module, e.g. a counter or a log, is undone at the end.

    It would else be another defense at the next attack. One whose answers depend on it fails the preflight.
    """
    modules = {module for defense in defenses for module in defense.modules()}
    held = [(vars(m), {k: v for k, v in vars(m).items() if k not in TORCHS}) for m in modules]
    filled: list[tuple[Any, Any]] = [(v, copy.copy(v)) for _, had in held for v in had.values() if type(v) in KEPT]
    buffers = [(m._buffers, dict(m._buffers)) for m in modules]
    values = [(b, b.clone()) for _, had in buffers for b in had.values() if b is not None]
    try:
        yield
    finally:
        for now, had in held:
            for name in [k for k in now if k not in TORCHS and k not in had]:
                del now[name]
            now.update(had)
        for container, content in filled:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for registered, before in buffers:
            registered.clear()
            registered.update(before)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):  # a buffer that repeats its elements can't be written to
                    buffer.copy_(value)


def tamed(defense: Defense, x: Tensor) -> Defense:
    """The defense with a purifier that obeys tapes: a module that knows nothing of them runs as ``Foreign``."""
    if isinstance(defense.purifier, Purifier):
        return defense
    with as_it_was(defense):
        foreign = Foreign(defense.purifier, x)
    tame = Defense(foreign, defense.classifier, copies=defense.copies, combine=defense.combine)
    tame.accuracy = getattr(defense, "accuracy", None)  # type: ignore[assignment]
    return tame


def is_foreign(defense: Defense) -> bool:
    """Whether the noise isn't keyed by example."""
    return isinstance(defense.purifier, Foreign)


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
    from benchmark.cell import Cell  # a cell describes its defense with this module

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
            lists.append(list(dict.fromkeys(s for item in registry.expand(text) for s in registry.split(item))))
        if not lists[-1]:
            raise UsageError(f"no {kind} are named: --{kind.removesuffix('s')} {text!r}")
    for p, c in itertools.product(*lists[:2]):
        defense = _made(settings.shelf, p, c, need, copies, combine)
        meets = [a for named in lists[2] for a in (_asked(defense, pool, settings) if named == EVERYTHING else [named])]
        for seed, view, eps, attack in itertools.product(seeds, views, radii, dict.fromkeys(meets)):
            yield Cell(defense, pool, attack, dataclasses.replace(settings, eps=eps, seed=seed, view=view))


def _asked(defense: Defense, pool: data.Dataset, settings: Settings) -> list[str]:
    """The attacks that a grade asks for of this defense."""
    stochastic = tamed(defense, pool.images(slice(0, 8))).stochastic
    return asked(stochastic, config.budget(settings.budget, torch.device(settings.device).type).name)


def _attacks(settings: Settings) -> list[str]:
    """The attacks that "all" names: those that need no argument, under the threat model that was asked for, or Linf."""
    components: dict[str, Any] = {name: registry.load("attacks", name) for name in registry.names("attacks")}
    norm = settings.norm or "Linf"
    return [name for name, a in components.items() if norm in a.norms and not hasattr(a, "argument")]
