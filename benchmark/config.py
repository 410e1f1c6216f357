"""What a run is: budgets, default radii, and the settings whose hash is its identity."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import isfinite

from benchmark import constructors
from benchmark.errors import UsageError, unknown
from benchmark.specs import Spec, show

PROTOCOL = 1
"""Raised by hand when a change of code can move a number."""


@dataclass(frozen=True)
class Budget:
    """How hard an attack tries, and how many draws judge it. n isn't part of a budget."""

    name: str
    n: int
    attacks: dict[str, dict[str, int]]
    select: int
    draws: int


def _efforts(*, pgd: int, apgd: int, queries: int, eot: int) -> dict[str, dict[str, int]]:
    """What each attack gets; an attack without an entry is like pgd."""
    return {
        "pgd": {"steps": pgd, "eot": eot},
        "apgd": {"steps": apgd, "eot": eot},
        "autoattack": {"steps": apgd, "eot": eot, "queries": queries},
        "square": {"queries": queries, "eot": eot},
        "uniform": {"queries": queries // 5, "eot": eot},
    }


BUDGETS = {
    b.name: b
    for b in (
        Budget("quick", 32, _efforts(pgd=20, apgd=20, queries=500, eot=4), 8, 9),
        Budget("standard", 256, _efforts(pgd=50, apgd=50, queries=2000, eot=10), 16, 17),
        Budget("paper", 512, _efforts(pgd=200, apgd=100, queries=5000, eot=20), 20, 21),
    )
}

RADII = {
    "fashion-mnist": {"Linf": "16/255", "L2": "1.5"},
    "mnist": {"Linf": "0.3"},
    "cifar10": {"Linf": "8/255", "L2": "0.5"},
    "cifar100": {"Linf": "8/255", "L2": "0.5"},
    "svhn": {"Linf": "8/255"},
    "imagenet": {"Linf": "4/255", "L2": "3.0"},
}
"""Default radii by data set and norm; Fashion-MNIST's other common Linf radius is 0.1. Flows: 0.05 everywhere."""


def budget(name: str, device: str) -> Budget:
    """The budget of a name; "auto" is quick on a CPU and standard on a GPU."""
    if name == "auto":
        name = "quick" if device == "cpu" else "standard"
    if name not in BUDGETS:
        raise UsageError(unknown("budget", name, ["auto", *BUDGETS]))
    return BUDGETS[name]


def radius(text: str | float | Fraction | None, norm: str, dataset: str) -> Fraction:
    """The exact radius of ``--eps``, or the default for the data set and norm.

    Raises:
        UsageError: if it isn't a number, is negative, or is a Linf radius above 1.
    """
    if text is None:
        defaults = {"StAdv": "0.05"} | RADII.get(dataset, {})
        if norm not in defaults:
            raise UsageError(f"no default {norm} radius for {dataset}: give --eps, e.g. --eps 8/255")
        text = defaults[norm]
    if isinstance(text, float) and isfinite(text):
        levels = round(255 * text)  # 8 / 255 in a program is 8/255, as long as no other fraction is meant
        if Fraction(levels, 255) == Fraction(text).limit_denominator(255):
            text = f"{levels}/255"
    try:
        eps = Fraction(str(text).replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"--eps {text}: expected a number or a fraction in [0, 1] pixel units, e.g. 8/255") from None
    if eps < 0:
        raise UsageError(f"--eps {text}: a radius isn't negative")
    if norm == "Linf" and eps > 1:
        raise UsageError(
            f"--eps {text}: Linf radii are in [0, 1] pixel units; for {text} of 255 levels write {text}/255"
        )
    return eps


def attack_options(
    spec: Spec, component: type, chosen: Budget, stochastic: bool, eot: int | None = None
) -> tuple[dict, bool]:
    """Every option of an attack, and whether the budget's numbers stand: defaults < budget < spec.

    A deterministic defense needs one draw per gradient; ``eot`` is another default than the budget's.
    """
    known = constructors.options(component)
    defaults = {k: v for k, v in chosen.attacks.get(spec.name, chosen.attacks["pgd"]).items() if k in known}
    if "eot" in known and not stochastic:
        defaults["eot"] = 1
    elif "eot" in known and eot is not None:
        defaults["eot"] = eot
    resolved = constructors.resolve(component, spec, defaults)
    return resolved, all(resolved[k] == v for k, v in defaults.items())


@dataclass(frozen=True)
class Identity:
    """Everything that can move a number of a run; hashed. Two runs of one identity are one run."""

    dataset: str
    fingerprint: str
    purifier: str
    classifier: str
    weights: dict[str, str]
    copies: int
    combine: str
    attack: str
    norm: str
    eps: str
    view: str
    attacker: str | None
    budget: str
    select: int
    draws: int
    seed: int
    precision: str
    protocol: int = PROTOCOL

    @property
    def hash8(self) -> str:
        """The first eight hex digits of the identity's sha256."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


def slug(text: str) -> str:
    """A folder name of [a-z0-9._=-] for a spec as the user wrote it."""
    return re.sub(r"[^a-z0-9._=-]+", "-", text.lower().replace("_", "-")).strip("-.") or "unnamed"


def eps_text(eps: Fraction) -> str:
    """A radius as people write it: over 255 where that is exact, else a decimal where that is, else the fraction."""
    over = eps * 255
    if over.denominator == 1 and eps.denominator > 1:
        return f"{over.numerator}/255"
    return show(float(eps)) if Fraction(show(float(eps))) == eps else str(eps)
