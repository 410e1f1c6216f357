"""Paired differences: how much more of the same images one defense keeps than another."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmark import evidence, registry, stats
from benchmark.errors import UsageError
from benchmark.results import WHERE, conditions, meant

SAME = ("fingerprint", "norm", "eps", "budget", "precision", "protocol")
"""What a row shares with the one that it is held against, beside what ``against`` leaves alone."""
JUDGED = ("draws", "select", "seed")
"""What several references of one kind agree on, for the images alone to choose between them."""


def comparison(reference: dict[str, Any], others: Iterable[dict[str, Any]], rule: str = "mean") -> list[dict[str, Any]]:
    """Robust accuracy of other runs minus that of a reference, paired over the images that both have.

    Beside each p-value stands Holm's correction for all rows, and the difference that would have been detected.

    Args:
        reference, others: runs, or worst cases of several, each with its records.
        rule: what an accuracy is, one of ``report.RULES``.

    Raises:
        UsageError: if a run is of another threat model or radius, shares no image with the reference, or knows nothing
            of the rule.
    """
    table: list[dict[str, Any]] = []
    others = list(others)
    threat = tuple(reference["identity"][key] for key in ("norm", "eps"))
    for run in (reference, *others):
        if not run["records"]:
            raise UsageError(f"{run['folder']} has no finished image yet: the command that began it continues it")
    for run in others:
        if (theirs := tuple(run["identity"][key] for key in ("norm", "eps"))) != threat:
            raise UsageError(
                f"{run['folder']} is of {' '.join(theirs)}, {reference['folder']} of {' '.join(threat)}: accuracies "
                "under different threat models aren't compared"
            )
        ids = {r["id"] for r in reference["records"]} & {r["id"] for r in run["records"]}
        if reference["identity"]["fingerprint"] != run["identity"]["fingerprint"] or not ids:
            raise UsageError(
                f"{run['folder']} shares no image with {reference['folder']}: compare runs on one data set"
            )
        a, b = (_scores(one, ids, rule) for one in (run, reference))
        table.append(
            _named(run)
            | {"n": len(ids), "reference": float(b.mean()), "robust": float(a.mean())}
            | stats.compare(a, b)._asdict()
            | {"detectable": stats.detectable(a, b, tests=len(others))}
        )
    for row, corrected in zip(table, stats.holm([row["p"] for row in table]), strict=True):
        row["p_holm"] = corrected
    return table


def against(
    runs: Iterable[dict[str, Any]], wanted: Sequence[str], under: str | None = None
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The headline of each defense beside the one it is held against: (reference, others), a pair per reference.

    A headline is the worst case over the attacks that met a defense under one protocol. It is held against the one that
    is as ``wanted`` says, e.g. purifier=identity, and in all else of ``WHERE`` its like: of one classifier, say, with
    the same weights. Rows that have no such like are counted in a note.

    Args:
        runs: with their records.
        wanted: conditions NAME=VALUE.
        under: the one attack, as it was named, under which all are held against each other, instead of the worst case.

    Raises:
        UsageError: for a condition on nothing of ``WHERE``, for an attack that no run is of, or if none, or several,
            are meant.
    """
    asked = conditions(wanted, "--against")
    runs = list(runs)
    if under is not None:
        named = {run["names"]["attack"] for run in runs}
        if under not in named:
            raise UsageError(f"--under {under}: no such run; there are {', '.join(sorted(named))}")
        runs = [run for run in runs if run["names"]["attack"] == under]
    rows = [run | {"records": records} for run, records, _ in evidence.headline(runs)]
    free = [name for name in ("purifier", "classifier") if name not in asked]
    free += [key for key in SAME if key not in asked]
    references = [row for row in rows if meant(row, asked)]
    if not references:
        known = ", ".join(sorted({f"{n}={r['names'].get(n, r['identity'][n])}" for r in rows for n in asked}))
        raise UsageError(f"--against {' '.join(wanted)}: no such row; there are {known}")

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        identity = row["identity"]
        spelled = {"purifier": registry.completed("purifiers", identity["purifier"])}  # older records name less
        weights = [(k, v) for k, v in identity["weights"].items() if k.split(".")[0] in free]
        return *(spelled.get(name, identity[name]) for name in free), *sorted(weights)

    by_key: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for reference in references:
        by_key.setdefault(key(reference), []).append(reference)
    held: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    alone = 0
    for row in rows:
        if meant(row, asked):
            continue
        near = [one for one in by_key.get(key(row), []) if _shared(one, row)]
        if not near:
            alone += 1
            continue

        def fit(one: dict[str, Any], row: dict[str, Any] = row) -> tuple[int, int]:
            return _shared(one, row), -len(one["records"])

        like = max(near, key=fit)  # the most images in common, and the fewest others
        for twin in near:
            if twin is not like and (fit(twin) == fit(like) or _kind(twin) != _kind(like)):
                raise UsageError(
                    f"--against {' '.join(wanted)} means {like['folder']} and {twin['folder']}: name more of "
                    f"{', '.join(WHERE)}, or fewer folders"
                )
        held.setdefault(like["folder"], (like, []))[1].append(row)
    if not held:
        raise UsageError(f"--against {' '.join(wanted)}: nothing else is recorded that could be held against it")
    if alone:
        print(
            f"note: --against {' '.join(wanted)}: {alone} of {len(rows)} rows have none of the same "
            f"{', '.join(free)} and weights on any of their images; they aren't in the table",
            file=sys.stderr,
        )
    for reference, others in held.values():
        yield reference, sorted(others, key=lambda row: [row["identity"][k] for k in ("classifier", "purifier")])


def _shared(one: dict[str, Any], other: dict[str, Any]) -> int:
    """How many images two rows have in common."""
    return len({r["id"] for r in one["records"]} & {r["id"] for r in other["records"]})


def _kind(row: dict[str, Any]) -> tuple[Any, ...]:
    """A defense with its weights, and how it was judged: rows alike in it differ in images alone."""
    return evidence.defense(row), *(row["identity"].get(key) for key in JUDGED)


def _scores(run: dict[str, Any], ids: set[int], rule: str) -> Any:
    """How right each image is after the attack."""
    found = evidence.scores(run, [r for r in run["records"] if r["id"] in ids], "adv", rule)
    if found is None:
        raise UsageError(f"{run['folder']}: its records can't tell {rule}: take another --rule")
    return found


def _named(run: dict[str, Any]) -> dict[str, Any]:
    """What a run is called where it is compared."""
    identity, names = run["identity"], run["names"]
    return {
        "purifier": evidence.purifier(run),
        **{key: names[key] for key in ("classifier", "display")},
        "view": evidence.view(identity),
        **{key: identity[key] for key in ("norm", "eps", "budget", "draws", "seed")},
    }
