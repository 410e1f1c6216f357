"""Lines through the runs of a grid: what an accuracy does as one number changes and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from benchmark import evidence, registry, report, specs
from benchmark.errors import UsageError
from benchmark.grades import grades

Number = int | float | Fraction
Members = list[dict[str, Any]]
UNSHARED = ("purifier", "draws", "select")
"""What the points of a line needn't share, of ``evidence.CELL``; of the purifier, all but one option."""


class Line(NamedTuple):
    """Runs that differ in one number.

    Attributes:
        axis: that number: "eps", an option of the purifier ("t_star") or one of the attack ("attack steps").
        purifier: as it is named, without the number.
        attack: the attack without the number, or that it is the worst case over several.
        values: the number in each, ascending.
        rows: the row of each, as in a report.
    """

    axis: str
    purifier: str
    attack: str
    values: tuple[Number, ...]
    rows: tuple[dict[str, Any], ...]

    @property
    def dial(self) -> bool:
        """Whether the number is the purifier's, so that clean accuracy changes with it."""
        return self.axis != "eps" and not self.axis.startswith("attack ")

    @property
    def points(self) -> list[tuple[Number, dict[str, Any]]]:
        """Each value with its row."""
        return list(zip(self.values, self.rows, strict=True))


def lines(runs: Iterable[dict[str, Any]], beside: Iterable[dict[str, Any]] = ()) -> list[Line]:
    """Every line of two values and more, over the radius, the purifier's options and the attack's.

    A point is one attack on one defense, over what gradients it took; where the same attacks met a defense at each
    value, their worst case makes another line. Runs on other images share none; the number of draws may
    differ, for it moves only the intervals, and a setting without noise has one.

    Args:
        runs: with their records.
        beside: further runs that count in the grades, and are no point.
    """
    runs = [run for run in runs if run["records"]]
    points = list(_points(runs))
    graded = grades([point[:3] for point in points], [*beside, *runs])
    found: dict[str, dict[Number, dict[str, Any]]] = {}
    facts: dict[str, tuple[str, str, str]] = {}
    for (run, records, _, attacks), grade in zip(points, graded, strict=True):
        shared = {key: run["identity"][key] for key in evidence.CELL if key not in UNSHARED}
        shared |= {"ids": sorted(r["id"] for r in records)}
        parts = {"": specs.parse(registry.completed("purifiers", run["identity"]["purifier"]))}
        if len(attacks) == 1:
            parts["attack "] = specs.parse(attacks[0])
        else:
            shared["attacks"] = attacks
        row = report.row(run, records, grade=grade.letter)
        for axis, value in _numbers(parts, shared["eps"]).items():
            rest = {key: value for key, value in shared.items() if key != axis}
            others = [
                replace(s, options={k: v for k, v in s.options.items() if p + k != axis}) for p, s in parts.items()
            ]
            key = json.dumps([axis, rest, *map(str, others)], sort_keys=True)
            along = found.setdefault(key, {})
            if value not in along or along[value]["draws"] < row["draws"]:
                along[value] = row
            facts[key] = axis, *_names(axis, run["names"], row)
    made = [Line(*facts[key], *zip(*sorted(along.items()), strict=True)) for key, along in found.items()]
    return sorted((line for line in made if len(line.values) > 1), key=lambda line: line[:3])


def _points(runs: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]], Members, list[str]]]:
    """Each attack, and each worst case, on each defense: a run, its records, and the runs and specs behind it."""
    for part in evidence.met(runs):
        searches = [registry.completed("attacks", run["identity"]["attack"]) for run in part]
        for run, records in evidence.by_attack(part):
            if run["names"]["attack"] == evidence.WORST:
                yield run, records, part, sorted(set(searches))
            else:
                spec = registry.completed("attacks", run["identity"]["attack"])
                yield run, records, [one for one, its in zip(part, searches, strict=True) if its == spec], [spec]


def _numbers(parts: dict[str, specs.Spec], eps: str) -> dict[str, Number]:
    """What a line could run over: the radius and each option that is a quantity."""
    numbers: dict[str, Number] = {"eps": Fraction(eps)}
    for prefix, spec in parts.items():
        kind = "attacks" if prefix else "purifiers"
        for option, value in spec.options.items():
            number = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
            if number and not (value == 0 and option in _unset_at_zero(kind, spec)):
                numbers[prefix + option] = value  # type: ignore[assignment]
    return numbers


def _unset_at_zero(kind: str, spec: specs.Spec) -> tuple[str, ...]:
    """Options of a component whose 0 is no quantity; of one that isn't here, none are known."""
    try:
        return getattr(registry.described(kind, spec.name, spec.argument), "unset_at_zero", ())
    except UsageError:
        return ()


def _names(axis: str, names: dict[str, str], row: dict[str, Any]) -> tuple[str, str]:
    """The purifier and the attack of a row, without the number on the axis."""
    purifier, attack = names["purifier"], row["attack"]
    copies = row["purifier"].removeprefix(purifier)
    if axis.startswith("attack "):
        attack = _without(attack, axis.removeprefix("attack "))
    elif axis != "eps":
        purifier = _without(purifier, axis)
    return purifier + copies, attack


def _without(text: str, option: str) -> str:
    """A spec as it was named, without one of its options; a name that is none stays as it is."""
    try:
        spec = specs.parse(text)
    except UsageError:
        return text
    return str(replace(spec, options={key: value for key, value in spec.options.items() if key != option}))
