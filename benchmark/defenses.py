"""Defenses by name, by grid, or built by hand, and what identifies them."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from benchmark import checkpoints, data, registry
from benchmark.errors import UsageError
from benchmark.foreign import Foreign
from purifiers import Defense, Purifier

if TYPE_CHECKING:
    from benchmark.cell import Cell, Settings


def load(
    purifier: str,
    classifier: str = "resnet",
    dataset: str = "fashion-mnist",
    *,
    copies: int = 1,
    combine: str = "logits",
    weights: str | None = None,
) -> Defense:
    """``benchmark.load``."""
    family = dataset.split(":")[0].replace("_", "-")
    shape = data.load(family).shape  # of the test set, which is always at hand
    roots = [Path(weights)] if weights else None
    g = checkpoints.build("purifiers", purifier, family, shape, roots)
    f = checkpoints.build("classifiers", classifier, family, shape, roots)
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
    return defense


def describe(defense: Defense) -> dict[str, Any]:
    """What identifies a defense: canonical specs and weight hashes, or, if it was built by hand, what it holds."""
    if hasattr(defense, "described"):
        return defense.described  # type: ignore[return-value]
    parts = {"purifier": defense.purifier, "classifier": defense.classifier}
    names = {part: type(module).__name__ for part, module in parts.items()}
    weights = {}
    for part, module in parts.items():
        digest = hashlib.sha256(_source(type(module)).encode())
        for key, value in module.state_dict().items():
            digest.update(key.encode() + value.detach().cpu().numpy().tobytes())
        for name, child in module.named_modules():
            plain = {k: v for k, v in vars(child).items() if _is_plain(v) and not k.startswith("_")}
            digest.update(f"{name} {type(child).__qualname__} {sorted(plain.items())}".encode())
        weights[part] = digest.hexdigest()
    return {**names, "weights": weights, "names": names}


def tamed(defense: Defense, x: Tensor) -> Defense:
    """The defense with a purifier that obeys tapes: a module that knows nothing of them runs as ``Foreign``."""
    if isinstance(defense.purifier, Purifier):
        return defense
    return Defense(Foreign(defense.purifier, x), defense.classifier, copies=defense.copies, combine=defense.combine)


def is_foreign(defense: Defense) -> bool:
    """Whether the noise isn't keyed by example."""
    return isinstance(defense.purifier, Foreign)


def _source(cls: type) -> str:
    """The text of a class, where it has one: another text is another component."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def _is_plain(value: Any) -> bool:
    """Whether a value means the same in every process: a number, a string, or a list of them."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | Fraction)


def grid(
    purifiers: str,
    classifiers: str,
    attacks: str,
    dataset: str,
    radii: Sequence[str | None],
    settings: Settings,
    copies: int = 1,
    combine: str = "logits",
) -> Iterator[Cell]:
    """The cells of specs with lists, braces and ``all``; made one at a time, so that one defense is in memory."""
    from benchmark.cell import Cell  # a cell describes its defense with this module

    roots = [Path(settings.weights)] if settings.weights else None
    family = dataset.split(":")[0].replace("_", "-")
    lists = []
    for kind, text in (("purifiers", purifiers), ("classifiers", classifiers), ("attacks", attacks)):
        if text == "all":
            known = registry.names(kind) if kind == "attacks" else checkpoints.names(kind, family, roots)
            lists.append(known)
        else:
            lists.append(list(dict.fromkeys(s for item in registry.expand(text) for s in registry.split(item))))
    for p in lists[0]:
        for c in lists[1]:
            defense = load(p, c, dataset, copies=copies, combine=combine, weights=settings.weights)
            for eps, a in itertools.product(radii, lists[2]):
                yield Cell(defense, dataset, a, dataclasses.replace(settings, eps=eps))
