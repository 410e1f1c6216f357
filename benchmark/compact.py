"""A line per defense: clean accuracy, each attack beside the others, their worst case, its rank and its grade."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from benchmark import evidence, report, wording, writers
from benchmark.grades import grades
from benchmark.latex import DAGGER, PACKAGES, WITHHELD, tabular
from benchmark.report import COLUMNS, Table

OVER = [c for c in COLUMNS if c not in ("attack", "display")]
"""The columns of a row over attacks that machines read."""


class Line(NamedTuple):
    """A defense within one threat model.

    Attributes:
        row: the worst case of its attacks, or the one that it met, as ``report.row``.
        attacks: the robust accuracy under each attack by its name.
        displays: what those names are displayed as.
        parameters: of the purifier; None where the run doesn't say.
        place: its rank, as ``report.ranked``.
    """

    row: dict[str, Any]
    attacks: dict[str, float | None]
    displays: dict[str, str]
    parameters: int | None
    place: int | None


def compact(
    runs: Iterable[dict[str, Any]], form: str = "md", rule: str = "mean", beside: Iterable[dict[str, Any]] = ()
) -> str:
    """The lines of all defenses, over the images that all attacks of one have: a table per protocol.

    Args:
        runs: what makes lines.
        form: one of ``writers.FORMATS``; machines get one table, in which each attack has a column.
        rule: what an accuracy is, one of ``report.RULES``.
        beside: runs that count in the grades, and make no line.
    """
    runs = [r for r in runs if r["records"]]
    grouped = [(group, evidence.by_attack(group)) for group in sorted(evidence.met(runs), key=_order)]
    chosen: list[evidence.Row] = [(*attacks[-1], group) for group, attacks in grouped]
    table = report.assembled(chosen, runs, rule, grades(chosen, [*beside, *runs]))
    lines = [
        _line(group, attacks, row, place, rule)
        for (group, attacks), row, place in zip(grouped, table.rows, report.ranked(table), strict=True)
    ]
    if form in ("csv", "json"):
        attacks = _attacks(lines)
        rows = [
            {**{c: line.row[c] for c in OVER}, **{a: line.attacks.get(a) for a in attacks}}
            | {f"{a} is": line.displays.get(a) for a in attacks}
            | {"parameters": line.parameters, "rank": line.place}
            for line in lines
        ]
        columns = [*OVER, *(name for a in attacks for name in (a, f"{a} is")), "parameters", "rank"]
        return writers.machine([{c: row[c] for c in columns} for row in rows], form, columns)
    if not lines:
        return "% no finished example yet\n" if form == "latex" else "no finished example yet\n"
    return (_latex if form == "latex" else _markdown)(lines, table)


def _line(
    group: Sequence[dict[str, Any]],
    pairs: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]],
    row: dict[str, Any],
    place: int | None,
    rule: str,
) -> Line:
    """The line of one defense: its runs, and its attacks as ``evidence.by_attack`` gives them."""
    alone = [(run, records) for run, records in pairs if run["names"]["attack"] != evidence.WORST]
    met = {run["names"]["attack"]: report.row(run, records, rule)["robust"] for run, records in alone}
    displays = {run["names"]["attack"]: run["names"]["display"] for run, _ in alone}
    return Line(row, met, displays, group[0].get("parameters"), place)


def _attacks(lines: Sequence[Line]) -> list[str]:
    """The attacks of all lines, those of the headline first."""
    first = evidence.HEADLINE
    base = {name: re.split("[: ]", name)[0] for line in lines for name in line.attacks}
    return sorted(base, key=lambda a: (base[a] not in first, base[a] != first[0], a))


def _cells(lines: Sequence[Line], shown: Displays, *, costs: bool = True) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of one protocol's table to read, with random noise and costs where they are wanted.

    A number under another search than its column's first bears the mark of that search.
    """
    attacks = _attacks(lines)
    sized = costs and any(line.parameters is not None for line in lines)
    several = len({line.row["seed"] for line in lines}) > 1
    head = [*"purifier classifier norm eps n draws".split(), "clean % [95 %]", *(f"{a} %" for a in attacks)]
    head += [WORST, *["random noise %"] * costs, *["NFE", "parameters", "s/image"] * sized, "rank", "grade"]
    rows = []
    for line in lines:
        one = line.row
        view = evidence.viewed(one["view"]) + (f", seed {one['seed']}" if several else "")
        cells = [one["purifier"] + view, *(str(one[k]) for k in ("classifier", "norm", "eps", "n", "draws"))]
        met = [wording.share(line.attacks.get(a)) + _mark(shown[a], line.displays.get(a)) for a in attacks]
        cells += [wording.with_interval(one, "clean"), *met]
        cells += [wording.with_interval(one, "robust"), *[wording.share(one["random_control"])] * costs]
        cells += [str(one["nfe"]), wording.count(line.parameters), wording.seconds(one)] * sized
        rows.append([*cells, "–" if line.place is None else str(line.place), one["grade"] or "–"])
    return head, rows


Displays = dict[str, list[str]]
"""What each attack is displayed as; in the order of their marks."""


def _displays(lines: Sequence[Line]) -> Displays:
    """What each attack is displayed as: one name may stand for several searches, by defense."""
    shown: dict[str, list[str]] = {}
    for line in lines:
        for name, display in line.displays.items():
            shown.setdefault(name, []).append(display)
    return {name: list(dict.fromkeys(shown[name])) for name in _attacks(lines)}


def _mark(shown: Sequence[str], display: str | None) -> str:
    """Stars that tell a number from those of a column's first search: one for its second, two for its third."""
    return "" if display is None else "*" * shown.index(display)


WORST = "worst case % [95 %]"
"""The head of the column that is ranked."""
OVERALL = (
    "Worst case: per image the attack that left the fewest correct draws, judged on fresh draws, so that it can lie "
    "slightly above a single attack's number."
)
"""What stands in that column."""


def _markdown(lines: Sequence[Line], table: Table) -> str:
    made, shown = [], _displays(lines)
    for part in table.parts():
        grid = writers.grid(*_cells([lines[k] for k in part], shown))
        made += [wording.facts(table.only(part)), "", *grid, ""]
    return "\n".join([*made, *_notes(lines, table)]) + "\n"


def _latex(lines: Sequence[Line], table: Table) -> str:
    """Per protocol a table as wide as a page: first places are bold, withheld numbers bear a dagger."""
    made, labels = [PACKAGES], []
    for part in table.parts():
        these, of = [lines[k] for k in part], table.only(part)
        head, rows = _cells(these, _displays(these), costs=False)
        column, first = head.index(WORST), [k for k, line in enumerate(these) if line.place == 1]
        for line, row in zip(these, rows, strict=True):
            row[column] += WITHHELD * (line.row["grade"] == "F")
        one = these[0].row
        caption = f"{wording.dataset(one['dataset'])}, budget {one['budget']}: accuracy in %"
        told = [wording.facts(of), *_notes(these, of)]
        told += ["Bold: rank 1."] * bool(first) + [DAGGER] * any(WITHHELD in row[column] for row in rows)
        labels.append(
            "-".join(["compact", *(str(one[c]) for c in ("dataset", "norm", "eps", "budget")), f"n{one['n']}"])
        )
        label = "-".join([labels[-1], *[str(labels.count(labels[-1]))] * (labels.count(labels[-1]) > 1)])
        made.append(tabular(head, rows, caption, " ".join(told), label=label, bold={(k, column) for k in first}))
    return "\n".join(made)


def _notes(lines: Sequence[Line], table: Table) -> list[str]:
    """What attacks, purifiers, accuracies, ranks and grades stand for."""
    displays = [
        f"{name} is {', '.join([of[0], *(f'with {_mark(of, one)} {one}' for one in of[1:])])}"
        for name, of in _displays(lines).items()
    ]
    told = [wording.accuracy(table), OVERALL]
    told += [wording.RANKS] * any(line.place for line in lines)
    return ["; ".join([*displays, *writers.specs(table.runs)]) + ".", " ".join([*told, wording.GRADES])]


def _order(group: list[dict[str, Any]]) -> tuple:
    identity, names = group[0]["identity"], group[0]["names"]
    eps = float(Fraction(identity["eps"]))
    known = [names["purifier"] == p for p in ("identity", "vae", "diffpure")]
    return identity["norm"], eps, [not k for k in known], names["purifier"], names["classifier"]
