"""Tables from records: one row per run, and the worst case over attacks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmark import evidence, specs, stats
from benchmark.errors import UsageError
from benchmark.evidence import JOIN
from benchmark.grades import Grade, grades

COLUMNS = (
    "dataset purifier classifier attack display view norm eps budget n draws seed clean clean_low clean_high "
    "robust robust_low robust_high clean_majority robust_majority clean_worst robust_worst robust_any_iteration "
    "null_floor random_control nfe forwards backwards seconds_per_image grade run rule precision protocol torch commit"
).split()
PROTOCOL = ("budget", "n", "precision", "protocol")
"""The columns by which tables are split, beside data set, threat model and radius."""


RULES = {
    "mean": "the mean over fresh verdict draws{seen}",
    "majority": "the share of images that the majority of fresh verdict draws{seen} gets right (a tie is wrong)",
    "worst": "the share of images that all fresh verdict draws{seen} get right",
    "any": "the share of images of which the attack's loop saw no wrong draw (clean: of as many draws at x itself)",
    "mean-logits": "the share of images that the mean logits of fresh verdict draws{seen} get right",
}
"""What an accuracy is, by rule; clean accuracy stands under the same one."""


class Table(NamedTuple):
    """Rows of a report, and what a writer needs to hold them against each other.

    Attributes:
        rows: as ``report --format json`` prints them.
        scores: per row the robust accuracy of each image by its id, under the table's rule; empty where it is unknown.
        runs: the runs that the rows are of.
        rule: one of ``RULES``.
        grades: per row what else is recorded of its defense, and whether it contradicts the row.
        own: per row whether its attackers took the defense's own gradient.
    """

    rows: list[dict[str, Any]]
    scores: list[dict[int, float]] = []
    runs: list[dict[str, Any]] = []
    rule: str = "mean"
    grades: list[Grade] = []
    own: list[bool] = []

    def only(self, kept: Sequence[int]) -> Table:
        """Some rows, in this order, with what belongs to them."""
        rows = [self.rows[k] for k in kept]
        folders = {folder for row in rows for folder in str(row["run"]).split(JOIN)}
        return Table(
            rows,
            [self.scores[k] for k in kept] if self.scores else [],
            [run for run in self.runs if str(run["folder"]) in folders],
            self.rule,
            [self.grades[k] for k in kept] if self.grades else [],
            [self.own[k] for k in kept] if self.own else [],
        )

    def parts(self) -> list[list[int]]:
        """The rows of each data set, threat model, radius and protocol, which are never mixed; seeds stand together."""
        found: dict[tuple, list[int]] = {}
        for k, row in enumerate(self.rows):
            found.setdefault(tuple(row[key] for key in ("dataset", "norm", "eps", *PROTOCOL)), []).append(k)
        return list(found.values())


def rows(runs: Iterable[dict[str, Any]], *, worst_case: bool = False, rule: str = "mean") -> list[dict[str, Any]]:
    """The rows of ``table``."""
    return table(runs, worst_case=worst_case, rule=rule).rows


def table(
    runs: Iterable[dict[str, Any]],
    *,
    worst_case: bool = False,
    rule: str = "mean",
    beside: Iterable[dict[str, Any]] = (),
) -> Table:
    """A row per run: accuracies are fractions, unknown values None.

    With ``worst_case``, each group of runs of one protocol that differ only in the attack gets one more row: per image
    the attack with the fewest correct ``select`` draws, judged by *its* verdict draws. Verdict draws choose nothing.

    Args:
        beside: further runs that count in the grades, and make no row.

    Raises:
        UsageError: for an unknown rule.
    """
    if rule not in RULES:
        raise UsageError(f"--rule {rule}: known rules are {', '.join(RULES)}")
    runs = [r for r in runs if r["records"]]
    chosen: list[evidence.Row] = [(run, run["records"], [run]) for run in runs]
    if worst_case:
        chosen += evidence.worst_cases(runs)
    return assembled(chosen, runs, rule, grades(chosen, [*beside, *runs]))


def assembled(
    chosen: Sequence[evidence.Row], runs: list[dict[str, Any]], rule: str = "mean", graded: list[Grade] | None = None
) -> Table:
    """A table of these rows, each a run or a worst case with the runs behind it; all ``runs`` count in their grades.

    A grade is the same under every rule; ``graded`` are those of another table of the same rows.
    """
    known = [evidence.scores(run, records, "adv", rule) for run, records, _ in chosen]
    by_id = [
        {} if one is None else {r["id"]: float(v) for r, v in zip(records, one, strict=True)}
        for (_, records, _), one in zip(chosen, known, strict=True)
    ]
    graded = grades(chosen, runs) if graded is None else graded
    made = [row(run, records, rule, grade.letter) for (run, records, _), grade in zip(chosen, graded, strict=True)]
    own = [
        any(evidence.own(view, run["identity"]["purifier"]) for view in one["view"].split(", "))
        for (run, *_), one in zip(chosen, made, strict=True)
    ]
    return Table(made, by_id, runs, rule, graded, own)


def ranked(table: Table) -> list[int | None]:
    """The place of each row among those of its protocol on the same images; ties share one (``stats.ranks``).

    For tables with a row per defense. None without a rival, for a row without a grade or that it withholds, and for
    one whose attacker took another gradient than the defense's own.
    """
    groups: dict[tuple, list[int]] = {}
    for k, (one, scores, own) in enumerate(zip(table.rows, table.scores, table.own, strict=True)):
        if scores and own and one["grade"] not in ("F", None):
            key = tuple(one[c] for c in ("dataset", "norm", "eps", *PROTOCOL, "seed"))
            groups.setdefault((*key, tuple(sorted(scores))), []).append(k)
    places: list[int | None] = [None] * len(table.rows)
    for (*_, ids), these in groups.items():
        if len(these) > 1:
            shares = np.array([[table.scores[k][i] for i in ids] for k in these])
            for k, place in zip(these, stats.ranks(shares), strict=True):
                places[k] = place
    return places


def matched(runs: Iterable[dict[str, Any]], targets: Sequence[float]) -> list[dict[str, Any]]:
    """Of each purifier's settings the one whose clean accuracy comes closest to a target, for each target.

    Families are compared at matched clean accuracy; one of which a single setting was tried is left out. The runs
    are of validation images, so that no test image chooses.
    """
    found = []
    families: dict[tuple, list[dict[str, Any]]] = {}
    for run in [run for run in runs if run["records"]]:
        one, spec = row(run, run["records"]), specs.parse(run["identity"]["purifier"])
        name = f"file:{spec.argument}" if spec.name == "file" else spec.name
        families.setdefault((one["dataset"], name, one["classifier"]), []).append(one)
    for (_, name, _), settings in families.items():
        tried = len({one["purifier"] for one in settings})
        for target in targets if tried > 1 else ():
            best = min(settings, key=lambda one: (abs(one["clean"] - target), one["purifier"]))
            found.append(best | {"family": name, "target": target, "settings": tried})
    return found


def row(
    run: dict[str, Any], records: list[dict[str, Any]], rule: str = "mean", grade: str | None = None
) -> dict[str, Any]:
    """One row of a report; its grade depends on what else is reported of its defense."""
    identity, names = run["identity"], run["names"]
    label = np.array([r["label"] for r in records])
    clean, adv = (evidence.predicted(records, key) for key in ("clean", "adv"))
    draws = adv.shape[1]
    accuracies: dict[str, stats.Interval | tuple[None, None, None]] = {}
    for key in ("clean", "adv"):
        known = evidence.scores(run, records, key, rule)
        worth = draws if rule == "mean" else 1  # any other rule says one thing of an image
        accuracies[key] = (None, None, None) if known is None else stats.accuracy(known, worth)
    broken = np.array([r["broken_at"] for r in records]) >= 0
    watched, control = evidence.watched(run), evidence.scores(run, records, "random", rule)
    notes = [] if run.get("preflight", True) else ["no preflight"]
    notes += [f"noise: {run['noise']}"] if run["stochastic"] and run.get("noise", "keyed") != "keyed" else []
    notes += ["mixed environment"] if run.get("mixed_environment") else []
    notes += [] if run.get("complete", True) else [f"incomplete: {len(records)} of {run['n']}"]
    return {
        "dataset": identity["dataset"],
        "purifier": evidence.purifier(run),
        "classifier": names["classifier"],
        "attack": names["attack"],
        "display": names["display"] + "".join(f" [{note}]" for note in notes),
        "view": evidence.view(identity),
        "norm": identity["norm"],
        "eps": identity["eps"],
        "budget": identity["budget"],
        "n": len(records),
        "draws": draws,
        "seed": identity["seed"],
        **dict(zip(("clean", "clean_low", "clean_high"), accuracies["clean"], strict=True)),
        **dict(zip(("robust", "robust_low", "robust_high"), accuracies["adv"], strict=True)),
        "clean_majority": float(stats.majority_rule(clean, label).mean()),
        "robust_majority": float(stats.majority_rule(adv, label).mean()),
        "clean_worst": float(stats.worst_rule(clean == label[:, None]).mean()),
        "robust_worst": float(stats.worst_rule(adv == label[:, None]).mean()),
        "robust_any_iteration": float((~broken).mean()) if watched else None,
        "null_floor": float(np.mean([r["null_wrong"] == 0 for r in records])) if watched else None,
        "random_control": None if control is None else float(control.mean()),
        "nfe": run["nfe"],
        **{cost: run.get(cost, float(np.mean([r[cost] for r in records]))) for cost in ("forwards", "backwards")},
        "seconds_per_image": run["seconds"] / len(records) if run["seconds"] else None,
        "grade": grade,
        "run": str(run["folder"]),
        "rule": rule,
        **{key: identity[key] for key in ("precision", "protocol")},
        "torch": run["environment"]["packages"]["torch"] if "environment" in run else None,
        "commit": run["environment"].get("commit") if "environment" in run else None,
    }
