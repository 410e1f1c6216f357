"""Tables on paper: Markdown to read, CSV and JSON for machines, LaTeX for papers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmark import evidence, report, wording
from benchmark.errors import UsageError, unknown
from benchmark.latex import PACKAGES, latex, tabular
from benchmark.report import COLUMNS, Table

FORMATS = ("md", "csv", "latex", "json")


def render(table: Table, form: str, *, columns: Sequence[str] = (), sort: str | None = None) -> str:
    """A report in one of ``FORMATS``.

    Args:
        table: what is reported.
        form: "md" also says what the names of purifiers stand for; "latex" wants the package booktabs.
        columns: only these, in this order; names as in ``COLUMNS``.
        sort: rows by this column, ascending; descending with a "-" before it.

    Raises:
        UsageError: for an unknown format or column.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form}: known formats are {', '.join(FORMATS)}")
    for name in [*columns, *([sort.removeprefix("-")] if sort else [])]:
        if name not in COLUMNS:
            raise UsageError(f"{unknown('column', name, COLUMNS)}")
    if sort:
        table = _sorted(table, sort)
    if form == "latex":
        return latex(table, columns)
    if form == "md":
        return _markdown(table, columns)
    return machine([{key: row[key] for key in columns or COLUMNS} for row in table.rows], form, columns or COLUMNS)


def machine(rows: Sequence[dict[str, Any]], form: str, columns: Sequence[str]) -> str:
    """Rows as JSON or CSV: accuracies are fractions, unknown values null or empty."""
    if form == "json":
        return json.dumps(rows, indent=2) + "\n"
    return pd.DataFrame(rows, columns=list(columns), dtype=object).to_csv(index=False, lineterminator="\n")


def _sorted(table: Table, sort: str) -> Table:
    """The table in the order of a column; rows that don't know it come last."""
    key, down = sort.removeprefix("-"), sort.startswith("-")
    known = [k for k, row in enumerate(table.rows) if row[key] is not None]
    order = sorted(known, key=lambda k: table.rows[k][key], reverse=down)
    return table.only(order + [k for k in range(len(table.rows)) if k not in known])


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [_line(head), "|" + "---|" * len(head), *map(_line, rows)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def matches(found: Sequence[dict[str, Any]]) -> str:
    """``report.matched`` as Markdown."""
    if not found:
        return "no purifier was tried at two settings or more\n"
    rows = [
        (
            f["family"], f"{100 * f['target']:.0f}", f["purifier"], wording.with_interval(f, "clean"), str(f["n"]),
            str(f["draws"]), str(f["settings"]),
        )
        for f in found
    ]  # fmt: skip
    head = ("family", "target clean %", "setting", "clean % [95 %]", "n", "draws", "settings tried")
    return "\n".join([wording.facts(Table(list(found))), "", *grid(head, rows)]) + "\n"


def specs(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What the names of purifiers stand for, where they have options."""
    known = {run["names"]["purifier"]: run["identity"]["purifier"] for run in runs}
    return [f"{name} is {spec}" for name, spec in sorted(known.items()) if name != spec.removesuffix(":rounds=1")]


def comparison(
    pairs: Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]], form: str = "md", rule: str = "mean"
) -> str:
    """``paired.comparison`` with each of some references: points to read, fractions for machines.

    Args:
        pairs: a reference, and the rows that are held against it.
        form: one of ``FORMATS``.
        rule: what an accuracy is.
    """
    if form in ("json", "csv"):
        rows = [row | {"against": _defense(one), "rule": rule} for one, table in pairs for row in table]
        return machine(rows, form, list(rows[0]) if rows else [])
    texts = [(_compared_latex if form == "latex" else _compared)(one, table, rule) for one, table in pairs]
    return f"{PACKAGES}\n{''.join(texts)}" if form == "latex" else "\n".join(texts)


HEAD = [
    *("purifier", "classifier", "attack", "view", "budget", "draws", "n", "robust %", "reference %"),
    *("difference [95 %]", "p", "p (Holm)", "detectable"),
]
"""The columns of a comparison."""
LABELLED = (
    *("purifier", "classifier", "display", "dataset", "norm", "eps", "budget", "n"),
    *("draws", "seed", "precision", "protocol"),
)
"""What tells a reference from another."""


def _compared(reference: dict[str, Any], table: Sequence[dict[str, Any]], rule: str) -> str:
    return "\n".join([*grid(HEAD, _cells(table)), "", *_paired(reference, table, rule)]) + "\n"


def _compared_latex(reference: dict[str, Any], table: Sequence[dict[str, Any]], rule: str) -> str:
    one = report.row(reference, reference["records"], rule)
    on = f"{wording.dataset(one['dataset'])}, {one['norm']} {one['eps']}"
    caption = f"Robust accuracy on {on}, paired with {_defense(reference)}"
    label = "paired-with " + " ".join(str(one[k]) for k in LABELLED)
    return tabular(HEAD, _cells(table), caption, " ".join(_paired(reference, table, rule)), label=label)


def _cells(table: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            *(str(r[key]) for key in ("purifier", "classifier", "display", "view", "budget", "draws", "n")),
            wording.percent(r["robust"]), wording.percent(r["reference"]),
            wording.points(r["difference"], r["low"], r["high"]),
            wording.p_value(r["p"]), wording.p_value(r["p_holm"]), wording.share(r["detectable"]),
        ]
        for r in table
    ]  # fmt: skip


def _paired(reference: dict[str, Any], table: Sequence[dict[str, Any]], rule: str) -> list[str]:
    """What a comparison says below itself: of the reference, of differences, and of attacks where they differ."""
    one = report.row(reference, reference["records"], rule)
    notes = [
        f"Reference: {_defense(reference)} under {one['display']}, view {one['view']}; {wording.facts(Table([one]))}",
        "Differences to it are paired over the images that both have: intervals are normal, with an image not seen "
        "either way, p by sign flips, Holm over the rows; detectable is what such a test would notice in four of five "
        "cases.",
    ]
    if any(r["display"] != one["display"] for r in table):
        notes.append(
            "Where attacks differ, so may their strength: such a difference is theirs as much as the defense's."
        )
    return notes


def _defense(run: dict[str, Any]) -> str:
    return f"{evidence.purifier(run)} + {run['names']['classifier']}"


def _markdown(table: Table, columns: Sequence[str] = ()) -> str:
    """Tables to read, one per protocol: accuracies in percent with their 95 % intervals."""
    if not table.rows:
        return "no finished example yet\n"
    lines = []
    for part in table.parts():
        these = table.only(part)
        lines += [wording.facts(these), "", *(_plain(these.rows, columns) if columns else _lines(these.rows)), ""]
    lines += [
        wording.accuracy(table) if columns else wording.explained(table),
        *_packages(table.runs),
        *_spread(table.rows),
        *([f"{'; '.join(named)}."] if (named := specs(table.runs)) else []),
    ]
    return "\n".join(lines) + "\n"


def _packages(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What packages say of stochastic defenses by single draws of their own, and what their rule reads at x itself."""
    told = []
    for run in runs:
        if any(r.get("package_null") is None for r in run["records"]):
            continue
        verdict, null, same = (
            wording.percent(float(np.mean([r[key] for r in run["records"]])))
            for key in ("package_verdict", "package_null", "fallback")
        )
        names = run["names"]
        told.append(
            f"{names['purifier']} + {names['classifier']} under {names['display']}: {verdict} % robust, where its rule "
            f"reads {null} % at x itself; {same} % of the images that it returned are x itself"
        )
    return [f"The package's own verdict by single draws: {'; '.join(told)}."] if told else []


def _spread(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How robust accuracy spreads over seeds, per defense and attack that ran under several."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        keys = ("dataset", "purifier", "classifier", "attack", "view", "norm", "eps", *report.PROTOCOL, "draws")
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    told = []
    for of in groups.values():
        known = [row["robust"] for row in of if row["robust"] is not None]
        seeds = len({row["seed"] for row in of})
        if seeds > 1 and len(known) == seeds:
            one = of[0]
            mean, spread = np.mean(known), np.std(known, ddof=1)
            told.append(
                f"{one['purifier']} + {one['classifier']} under {one['display']}, {one['norm']} {one['eps']}, "
                f"n {one['n']}: {wording.percent(float(mean))} ± {wording.percent(float(spread))} ({seeds})"
            )
    return [f"Robust accuracy over seeds, mean ± standard deviation (seeds): {'; '.join(told)}."] if told else []


def _plain(rows: list[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """One Markdown table of chosen columns."""
    return grid([wording.titled(c) for c in columns], [[wording.cell(row, c) for c in columns] for row in rows])


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    """One Markdown table, head and rows."""
    head = (
        "purifier | classifier | attack | view | norm | eps | n | draws | clean % [95 %] | robust % [95 %] | "
        "majority clean / robust | worst draw clean / robust | "
        "any iteration (null floor) | random noise | NFE | s/image | grade"
    ).split(" | ")
    made = []
    for r, attack in zip(rows, wording.attacks(rows), strict=True):
        any_iteration = "–"
        if r["robust_any_iteration"] is not None:
            any_iteration = f"{wording.percent(r['robust_any_iteration'])} ({wording.percent(r['null_floor'])})"
        cells = [
            r["purifier"], r["classifier"], attack, r["view"],
            r["norm"], r["eps"], str(r["n"]), str(r["draws"]),
            wording.with_interval(r, "clean"),
            wording.with_interval(r, "robust"),
            f"{wording.percent(r['clean_majority'])} / {wording.percent(r['robust_majority'])}",
            f"{wording.percent(r['clean_worst'])} / {wording.percent(r['robust_worst'])}",
            any_iteration, wording.share(r["random_control"]), str(r["nfe"]), wording.seconds(r), r["grade"] or "–",
        ]  # fmt: skip
        made.append(cells)
    return grid(head, made)
