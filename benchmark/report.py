"""Tables from records: one row per run, and the worst case over attacks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmark import registry, stats
from benchmark.errors import UsageError

COLUMNS = (
    "dataset purifier classifier attack display view norm eps budget n draws seed clean clean_low clean_high "
    "robust robust_low robust_high clean_majority robust_majority clean_worst robust_worst robust_any_iteration "
    "null_floor random_control nfe forwards backwards seconds_per_image grade run"
).split()
CELL = (
    *("dataset", "fingerprint", "purifier", "classifier", "weights", "copies", "combine", "norm", "eps"),
    *("view", "attacker", "select", "draws", "seed", "precision", "protocol"),
)
"""What runs must share to be one defense under one threat, attacked in several ways."""
HEADLINE = ("pgd", "autoattack")
"""The attacks whose worst case is the headline of a stochastic defense."""


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
    """

    rows: list[dict[str, Any]]
    scores: list[dict[int, float]] = []
    runs: list[dict[str, Any]] = []
    rule: str = "mean"


def rows(runs: Iterable[dict[str, Any]], *, worst_case: bool = False, rule: str = "mean") -> list[dict[str, Any]]:
    """The rows of ``table``."""
    return table(runs, worst_case=worst_case, rule=rule).rows


def table(runs: Iterable[dict[str, Any]], *, worst_case: bool = False, rule: str = "mean") -> Table:
    """A row per run: accuracies are fractions, unknown values None.

    With ``worst_case``, each group of runs that differ only in the attack gets one more row: per image the attack with
    the fewest correct ``select`` draws, judged by *its* verdict draws. Verdict draws choose nothing.

    Raises:
        UsageError: for an unknown rule.
    """
    if rule not in RULES:
        raise UsageError(f"--rule {rule}: known rules are {', '.join(RULES)}")
    runs = [r for r in runs if r["records"]]
    chosen = [(run, run["records"]) for run in runs]
    if worst_case:
        chosen += [worst_of(group) for group in groups(runs) if len(group) > 1 and common(group)]
    known = [scores(run, records, "adv", rule) for run, records in chosen]
    by_id = [
        {} if one is None else {r["id"]: float(v) for r, v in zip(records, one, strict=True)}
        for (_, records), one in zip(chosen, known, strict=True)
    ]
    return Table([row(run, records, rule) for run, records in chosen], by_id, runs, rule)


def scores(run: dict[str, Any], records: list[dict[str, Any]], key: str, rule: str) -> np.ndarray | None:
    """How right each image is under a rule, in [0, 1]; None where the records can't tell.

    Args:
        run, records: of which.
        key: "clean", "adv" or "random".
        rule: one of ``RULES``; "mean-logits" needs the logits beside the records, "any" an attack that watched.
    """
    label, predicted = np.array([r["label"] for r in records]), _predicted(records, key)
    correct = predicted == label[:, None]
    if rule in ("mean", "worst"):
        return {"mean": stats.mean_rule, "worst": stats.worst_rule}[rule](correct)
    if rule == "majority":
        return stats.majority_rule(predicted, label)
    if rule == "any":
        fact = {"adv": lambda r: r["broken_at"] < 0, "clean": lambda r: r["null_wrong"] == 0}.get(key)
        return np.array([float(fact(r)) for r in records]) if fact and _watched(run) else None
    path = Path(str(run["folder"])) / "logits.npz"
    if run["names"]["attack"] == WORST or not path.is_file():
        return None
    with np.load(path) as stored:
        place = {int(i): k for k, i in enumerate(stored["id"])}
        mean = stored[key][[place[r["id"]] for r in records]].mean(1)
    return ((mean.argmax(1) == label) & np.isfinite(mean).all(1)).astype(float)


def _watched(run: dict[str, Any]) -> bool:
    """Whether the any-iteration rule may speak: of draws of the defense itself, seen in the loop of one attack."""
    identity = run["identity"]
    seen = run.get("watched", identity["view"] != "blind" and not identity["attacker"])
    return bool(run["stochastic"] and run["names"]["attack"] != WORST and seen)


def shares(records: list[dict[str, Any]], key: str = "adv") -> np.ndarray:
    """The share of correct draws per image."""
    label = np.array([r["label"] for r in records])
    return stats.mean_rule(_predicted(records, key) == label[:, None])


def matched(runs: Iterable[dict[str, Any]], targets: Sequence[float]) -> list[dict[str, Any]]:
    """Of each purifier's settings the one whose clean accuracy comes closest to a target, for each target.

    Families are compared at matched clean accuracy; one of which a single setting was tried is left out. The runs
    are of validation images, so that no test image chooses.
    """
    found = []
    families: dict[tuple, list[dict[str, Any]]] = {}
    for one in rows([run for run in runs if run["records"]]):
        name = one["purifier"].split(":")[0]
        families.setdefault((one["dataset"], name, one["classifier"]), []).append(one)
    for (_, name, _), settings in families.items():
        tried = len({one["purifier"] for one in settings})
        for target in targets if tried > 1 else ():
            best = min(settings, key=lambda one: (abs(one["clean"] - target), one["purifier"]))
            found.append(best | {"family": name, "target": target, "settings": tried})
    return found


def comparison(reference: dict[str, Any], others: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Robust accuracy of other runs minus that of a reference, paired over the images that both have.

    Beside each p-value stands Holm's correction for all rows, and the difference that would have been detected.

    Raises:
        UsageError: if a run shares no image with the reference.
    """
    table, others = [], list(others)
    for run in others:
        ids = {r["id"] for r in reference["records"]} & {r["id"] for r in run["records"]}
        if reference["identity"]["fingerprint"] != run["identity"]["fingerprint"] or not ids:
            raise UsageError(
                f"{run['folder']} shares no image with {reference['folder']}: compare runs on one data set"
            )
        ours, theirs = (shares([r for r in one["records"] if r["id"] in ids]) for one in (reference, run))
        names = run["names"]
        table.append(
            {key: names[key] for key in ("purifier", "classifier", "display")}
            | {key: run["identity"][key] for key in ("norm", "eps")}
            | {"view": _view(run["identity"]), "n": len(ids), "reference": float(ours.mean())}
            | {"robust": float(theirs.mean())}
            | stats.compare(theirs, ours)._asdict()
            | {"detectable": stats.detectable(theirs, ours, tests=len(others))}
        )
    for row, corrected in zip(table, stats.holm([row["p"] for row in table]), strict=True):
        row["p_holm"] = corrected
    return table


def row(run: dict[str, Any], records: list[dict[str, Any]], rule: str = "mean") -> dict[str, Any]:
    """One row of a report."""
    identity, names = run["identity"], run["names"]
    label = np.array([r["label"] for r in records])
    clean, adv = (_predicted(records, key) for key in ("clean", "adv"))
    draws = adv.shape[1]
    accuracies: dict[str, stats.Interval | tuple[None, None, None]] = {}
    for key in ("clean", "adv"):
        known = scores(run, records, key, rule)
        worth = draws if rule == "mean" else 1  # any other rule says one thing of an image
        accuracies[key] = (None, None, None) if known is None else stats.accuracy(known, worth)
    broken = np.array([r["broken_at"] for r in records]) >= 0
    watched, control = _watched(run), scores(run, records, "random", rule)
    copies = "" if identity["copies"] == 1 else f" × {identity['copies']} ({identity['combine']})"
    notes = [] if run.get("preflight", True) else ["no preflight"]
    notes += [f"noise: {run['noise']}"] if run["stochastic"] and run.get("noise", "keyed") != "keyed" else []
    notes += ["mixed environment"] if run.get("mixed_environment") else []
    notes += [] if run.get("complete", True) else [f"incomplete: {len(records)} of {run['n']}"]
    return {
        "dataset": identity["dataset"],
        "purifier": names["purifier"] + copies,
        "classifier": names["classifier"],
        "attack": names["attack"],
        "display": names["display"] + "".join(f" [{note}]" for note in notes),
        "view": _view(identity),
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
        "grade": None,
        "run": str(run["folder"]),
    }


def _view(identity: dict[str, Any]) -> str:
    """The view, and whom it differentiates if not the defense itself."""
    return identity["view"] if not identity["attacker"] else f"{identity['view']}@{identity['attacker']}"


def viewed(row: dict[str, Any]) -> str:
    """What stands behind a name where the gradient isn't the exact one: the surrogates, or the attacker's view."""
    surrogates = "surrogate:" in row["view"] and "@" not in row["view"]
    view = row["view"].replace("surrogate:gradient=", "") if surrogates else f"view {row['view']}"
    return "" if row["view"] == "exact" else f" ({view})"


WORST = "worst-case"


def groups(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs that differ only in the attack, together; which gradient an attack takes is part of it.

    Of a purifier that rounds every surrogate is a guess, and the strongest counts. Attackers that know less (blind,
    bpda, adjoint) or more (the verdict's draws) stand apart.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        identity = dict(run["identity"])
        identity["purifier"] = registry.completed("purifiers", identity["purifier"])
        if re.fullmatch(r"surrogate:gradient=\w+", identity["view"]):
            identity["view"] = "exact"
        identity["weights"] = {k: v for k, v in identity["weights"].items() if not k.startswith("attack.")}
        key = json.dumps([identity[k] for k in CELL], sort_keys=True)
        found.setdefault(key, []).append(run)
    return list(found.values())


def by_attack(group: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each attack of a group as a run and its records, on the images that all have; of several, their worst case last.

    An attack that took several gradients is the worst case over them, under its own name; attacks that one name stands
    for at several budgets bear those. Empty without a common image.
    """
    if not (ids := common(group)):
        return []
    attacks: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in group:
        shared = [r for r in run["records"] if r["id"] in ids]
        key = run["names"]["attack"], registry.completed("attacks", run["identity"]["attack"])
        attacks.setdefault(key, []).append(run | {"records": shared})
    found = []
    for (name, _), runs in attacks.items():
        run, records = worst_of(runs) if len(runs) > 1 else (runs[0], runs[0]["records"])
        several = sum(other == name for other, _ in attacks) > 1
        label = f"{name} ({runs[0]['identity']['budget']})" if several else name
        found.append((run | {"names": runs[0]["names"] | {"attack": label}}, records))
    return [*found, worst_of(group)] if len(found) > 1 else found


def common(group: list[dict[str, Any]]) -> set[int]:
    """The ids of the images that all runs of a group have."""
    return set.intersection(*({r["id"] for r in run["records"]} for run in group))


def widest(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of a group on the most images, and on the same: the few of one attack would shorten what all share."""
    first = max(group, key=lambda run: len(run["records"]))
    return [run for run in group if [r["id"] for r in run["records"]] == [r["id"] for r in first["records"]]]


def headline(
    runs: Iterable[dict[str, Any]],
) -> list[tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]]:
    """Per defense and threat what speaks for it, as (run, its records, the runs behind it).

    Of the attacks on most images the worst case, of views and settings the one with most images and the lowest robust
    accuracy: a table sorted by robust accuracy would otherwise open with the weakest attack.
    """
    found: dict[tuple, tuple] = {}
    for group in groups([run for run in runs if run["records"]]):
        of = widest(group)
        run, records = worst_of(of) if len(of) > 1 else (of[0], of[0]["records"])
        identity = run["identity"]
        keys = ("dataset", "fingerprint", "classifier", "copies", "combine", "norm", "eps")
        key = tuple(identity[k] for k in keys) + (registry.completed("purifiers", identity["purifier"]),)
        rank = (-len(records), float(shares(records).mean()))
        if key not in found or rank < found[key][0]:
            found[key] = (rank, run, records, of)
    return [(run, records, of) for _, run, records, of in found.values()]


def worst_of(group: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The worst case over the attacks of a group, as a run and its records, on the images that all have."""
    ids = common(group)
    # a tie goes to the attack that is stronger on the whole, by select draws
    group = sorted(group, key=lambda run: (_survival_of(run, ids), run["identity"]["attack"]))
    by_id = [{r["id"]: r for r in run["records"]} for run in group]
    chosen = [min((records[i] for records in by_id), key=_survival) for i in sorted(ids)]
    names = group[0]["names"] | {
        "attack": WORST,
        "display": f"worst case of {', '.join(dict.fromkeys(run['names']['display'] for run in group))}",
    }
    took = [run for run in group if any(r["backwards"] for r in run["records"])] or group
    views = {run["identity"]["view"] for run in took}  # of attacks that took a gradient
    budgets = {run["identity"]["budget"] for run in group}
    merged = group[0] | {
        "identity": group[0]["identity"]
        | {"budget": budgets.pop() if len(budgets) == 1 else "mixed", "view": ", ".join(sorted(views))},
        "names": names,
        "preflight": all(run.get("preflight", True) for run in group),
        "mixed_environment": any(run.get("mixed_environment") for run in group),
        "complete": all(run.get("complete", True) for run in group),
        "n": max(run["n"] for run in group),
        "seconds": sum(run["seconds"] for run in group),
        "folder": " + ".join(str(run["folder"]) for run in group),
    }
    for cost in ("forwards", "backwards"):
        merged[cost] = float(sum(np.mean([records[i][cost] for i in ids]) for records in by_id))
    return merged, chosen


def _survival_of(run: dict[str, Any], ids: set[int]) -> float:
    return float(np.mean([_survival(r) for r in run["records"] if r["id"] in ids]))


def _survival(record: dict[str, Any]) -> float:
    """Share of correct ``select`` draws."""
    return float(np.mean(np.array(record["select"]) == record["label"]))


def _predicted(records: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([r[key] for r in records])
