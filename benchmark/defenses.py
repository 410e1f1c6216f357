"""Defenses by name or built by hand, and what identifies them."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark import checkpoints, data, specs
from benchmark.dataset import Form
from benchmark.errors import UsageError
from benchmark.fetch import network
from benchmark.fingerprint import BOOKKEEPING, fingerprint, stamp
from benchmark.foreign import Foreign
from purifiers import Defense, Purifier

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
        return made(checkpoints.Shelf(), purifier, classifier, need, copies, combine)


def made(shelf: checkpoints.Shelf, purifier: str, classifier: str, need: Any, copies: int, combine: str) -> Defense:
    """A defense of two specs, with networks from a shelf, that knows what it is described by."""
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
    defense.need = need  # type: ignore[assignment]
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
    options: dict[str, specs.Value] = {
        key: value
        for key, value in vars(module).items()
        if key in taken and (isinstance(value, bool | int | float) or re.fullmatch(r"[\w.-]+", str(value)))
    }
    return str(specs.Spec(type(module).__name__, None, options))


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
                if torch.equal(buffer, value):
                    continue
                if buffer.shape == value.shape and buffer.is_contiguous():
                    buffer.copy_(value)
                else:  # it was resized, or repeats its elements and can't be written to
                    buffer.data = value


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
