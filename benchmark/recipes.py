"""Recipes: how weights are made, as recipes.toml says."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.errors import UsageError, unknown

RECIPES = Path(__file__).parent / "recipes.toml"
LARGER = "cifar10"
"""The data set whose recipes, for a GPU, stand in the cards of small models, too."""
COMPACT = "-compact"
"""What the names of its recipes for no GPU end with."""

ADVERSARIES = {"rs-fgsm": (1.0, 1.25, 1.0), "n-fgsm": (2.0, 1.0, 3.0)}
"""Attacks of one signed step: the radius of their uniform start, their step and the radius of the ball they end in, in
units of eps. RS-FGSM: Wong et al. 2020 (arXiv 2001.03994). N-FGSM, whose ball binds nothing but the range of pixels, so
that a long training doesn't learn to defeat this one step alone: de Jorge et al. 2022 (arXiv 2202.01181)."""


@dataclass(frozen=True)
class Recipe:
    """How a component's weights are made; a section of recipes.toml."""

    kind: str
    component: str
    size: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    ema: float
    augment: list[str]
    adversarial_eps: str | None = None
    adversary: str = "rs-fgsm"
    """How a classifier is attacked in adversarial training, as ``ADVERSARIES`` says."""
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    init: str | dict[str, str] | None = None
    """The weights that training starts from: a card, for parts of one name, or a "card.part" for every part."""
    critics: list[str] = field(default_factory=list)
    """Networks of ``Purifier.critics`` that train along."""
    judge: str | None = None
    """A classifier whose features the objective compares; never the victim of the tables."""
    skip_above: float | None = None
    """Steps with a longer gradient, or one that isn't finite, move nothing."""
    dial: str | None = None
    """The option that sets the strength of these weights, where it isn't the component's."""
    settle: int = 0
    """Training images handed to ``Purifier.settle``, before the training."""
    precision: str = "float32"
    """What networks compute in: "float32", or "bf16" for mixed precision; weights are float32 in either."""
    finish: float = 0.1
    """The share of steps, the last ones, on the finishing images, where there are any."""

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bf16"):
            raise ValueError(f"precision must be float32 or bf16, got {self.precision!r}")
        if self.adversary not in ADVERSARIES:
            raise ValueError(f"adversary must be one of {', '.join(ADVERSARIES)}, got {self.adversary!r}")

    @property
    def needs(self) -> set[str]:
        """The cards that have to be there first."""
        sources = self.init.values() if isinstance(self.init, dict) else [f"{self.init}."] if self.init else []
        return {source.rpartition(".")[0] for source in sources} | ({self.judge} if self.judge else set())


def recipes(dataset: str) -> dict[str, Recipe]:
    """The recipes for a data set, by name; a section with ``like`` changes what it names of another recipe."""
    sections = tomllib.loads(RECIPES.read_text())

    def whole(section: dict[str, Any]) -> dict[str, Any]:
        if "like" not in section:
            return section
        family, _, name = section["like"].partition(".")
        return whole(sections[family][name]) | {k: v for k, v in section.items() if k != "like"}

    return {name: Recipe(**whole(section)) for name, section in sections.get(dataset, {}).items()}


def larger(family: str, name: str) -> str | None:
    """The recipe for a GPU of what a recipe makes small, if there is one and its networks are others."""
    of, known = name.removesuffix(COMPACT), recipes(LARGER)
    return of if of in known and known[of].size != recipes(family)[name].size else None


def ordered(family: str, names: Iterable[str] | None = None) -> list[str]:
    """Names of a data set's recipes, each behind what it starts from or is judged by, if that is among them.

    Args:
        family: the data set.
        names: which; all by default.

    Raises:
        UsageError: for an unknown name, or if there are no recipes for the data set.
    """
    known = recipes(family)
    if not known:
        raise UsageError(f"there are no recipes for {family}; {RECIPES} has those for fashion-mnist and {LARGER}")
    names = known if names is None else names
    left, done = list(dict.fromkeys(names)), list[str]()
    for name in left:
        if name.startswith("file:"):
            raise UsageError(
                f"{name}: recipes are for components that are shipped; train your own as you like, and load its "
                "weights in __init__: they are part of what identifies it"
            )
        if name not in known:
            raise UsageError(unknown(f"recipe for {family}", name, sorted(known)))
    while left:
        ready = next(name for name in left if not known[name].needs & set(left))
        left.remove(ready)
        done.append(ready)
    return done
