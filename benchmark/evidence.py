"""What records say: of one run, of the attacks that met one defense, and of all that speak for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import registry, specs, stats
from benchmark.errors import UsageError
from benchmark.results import logits

CELL = (
    *("dataset", "fingerprint", "purifier", "classifier", "weights", "copies", "combine", "norm", "eps"),
    *("view", "attacker", "select", "draws", "seed", "precision", "protocol"),
)
"""What runs must share to be one defense under one threat, attacked in several ways."""
HEADLINE = ("pgd", "autoattack")
"""The attacks whose worst case is the headline of a stochastic defense."""
SURROGATE = re.compile(r"surrogate:gradient=(\w+)")
"""A view that takes another gradient than the exact one, as every attacker may."""
WORST = "worst-case"
"""The name of the row over attacks."""
Row = tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]
"""What makes a row: a run, its records, and the runs behind it; several in a worst case."""
JOIN = " + "
"""Between the folders that a row over attacks is of."""


def scores(run: dict[str, Any], records: list[dict[str, Any]], key: str, rule: str) -> np.ndarray | None:
    """How right each image is under a rule, in [0, 1]; None where the records can't tell.

    Args:
        run, records: of which.
        key: "clean", "adv" or "random".
        rule: one of ``RULES``; "mean-logits" needs the logits beside the records, "any" an attack that watched.
    """
    label, classes = np.array([r["label"] for r in records]), predicted(records, key)
    correct = classes == label[:, None]
    if rule in ("mean", "worst"):
        return {"mean": stats.mean_rule, "worst": stats.worst_rule}[rule](correct)
    if rule == "majority":
        return stats.majority_rule(classes, label)
    if rule == "any":
        fact = {"adv": lambda r: r["broken_at"] < 0, "clean": lambda r: r["null_wrong"] == 0}.get(key)
        return np.array([float(fact(r)) for r in records]) if fact and watched(run) else None
    stored = {} if run["names"]["attack"] == WORST else logits(Path(str(run["folder"])), key)
    if any(r["id"] not in stored for r in records):
        return None
    mean = np.stack([stored[r["id"]] for r in records]).mean(1)
    return ((mean.argmax(1) == label) & np.isfinite(mean).all(1)).astype(float)


def watched(run: dict[str, Any]) -> bool:
    """Whether the any-iteration rule may speak: of draws of the defense itself, seen in the loop of one attack."""
    identity = run["identity"]
    seen = run.get("watched", identity["view"] != "blind" and not identity["attacker"])
    return bool(run["stochastic"] and run["names"]["attack"] != WORST and seen)


def shares(records: list[dict[str, Any]], key: str = "adv") -> np.ndarray:
    """The share of correct draws per image."""
    label = np.array([r["label"] for r in records])
    return stats.mean_rule(predicted(records, key) == label[:, None])


def purifier(run: dict[str, Any]) -> str:
    """What a run's purifier is called, with the copies whose outputs are combined."""
    identity, name = run["identity"], str(run["names"]["purifier"])
    return name if identity["copies"] == 1 else f"{name} × {identity['copies']} ({identity['combine']})"


def view(identity: dict[str, Any]) -> str:
    """The view of a run, and whom it differentiates if not the defense itself."""
    return identity["view"] if not identity["attacker"] else f"{identity['view']}@{identity['attacker']}"


def viewed(view: str) -> str:
    """What stands behind a name where the gradient isn't the exact one: the surrogates, or the attacker's view."""
    surrogates = "surrogate:" in view and "@" not in view
    said = view.replace("surrogate:gradient=", "") if surrogates else f"view {view}"
    return "" if view == "exact" else f" ({said})"


def groups(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs that differ only in the attack, together; which gradient an attack takes is part of it.

    Of a purifier that rounds every surrogate is a guess, and the strongest counts. Attackers that know less (blind,
    bpda, adjoint) or more (the verdict's draws) stand apart.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        identity = dict(run["identity"])
        identity["purifier"] = registry.completed("purifiers", identity["purifier"])
        if identity["view"] == "exact" or SURROGATE.fullmatch(identity["view"]):
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


def met(runs: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Per defense and protocol the runs that attacked it: on the same images, at one budget.

    An attack with options of its own (budget "custom") is one more beside those of a named budget.
    """
    found: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        if run["records"]:
            found.setdefault(_judged(run, run["records"]), []).append(run)
    made = []
    for of in found.values():
        for group in groups(of):
            budgets: dict[str, list[dict[str, Any]]] = {}
            for run in group:
                budgets.setdefault(run["identity"]["budget"], []).append(run)
            beside = budgets.pop("custom", []) if len(budgets) > 1 else []
            made += [[*named, *beside] for named in budgets.values()]
    return made


def _judged(run: dict[str, Any], records: list[dict[str, Any]]) -> tuple:
    """What judged a run, beside its budget: images, precision and protocol version."""
    identity = run["identity"]
    return tuple(r["id"] for r in records), *(identity[key] for key in ("fingerprint", "precision", "protocol"))


def worst_cases(runs: Iterable[dict[str, Any]]) -> list[Row]:
    """The worst case of each defense that met several attacks under one protocol on the same images."""
    return [(*worst_of(of), of) for of in met(runs) if len(of) > 1]


def headline(runs: Iterable[dict[str, Any]]) -> list[Row]:
    """Per defense, threat and protocol what speaks for it: the worst case of its attacks, or the one that it met.

    Of several views the one that leaves fewest ``select`` draws correct: a table sorted by robust accuracy would
    otherwise open with the weakest attack. Of its seeds the lowest; verdict draws choose nothing here either. Who knew
    those draws speaks only where nobody else does.
    """
    found: dict[tuple, list[Row]] = {}
    for of in met(runs):
        run, records = worst_of(of) if len(of) > 1 else (of[0], of[0]["records"])
        key = (*_judged(run, records), run["identity"]["budget"], defense(run))
        found.setdefault(key, []).append((run, records, of))

    def left(row: Row) -> float:
        return float(np.mean([_survival(r) for r in row[1]])) + ("noise=verdict" in row[0]["identity"]["view"])

    chosen = []
    for rows in found.values():
        strongest = view(min(rows, key=left)[0]["identity"])
        same = [row for row in rows if view(row[0]["identity"]) == strongest]
        chosen.append(min(same, key=lambda row: (row[0]["identity"]["seed"], left(row))))
    return chosen


def defense(run: dict[str, Any]) -> str:
    """What two runs share if they attacked one defense, with one set of weights, within one threat model."""
    identity = run["identity"]
    keys = ("dataset", "fingerprint", "classifier", "copies", "combine", "norm", "eps")
    weights = {k: v for k, v in identity["weights"].items() if not k.startswith("attack")}
    purifier = registry.completed("purifiers", identity["purifier"])
    return json.dumps([[identity[k] for k in keys], purifier, weights], sort_keys=True)


def own(view: str, purifier: str) -> bool:
    """Whether a view is of the defense's own gradient: the exact one, or of a purifier that rounds one in its place.

    A class that has an exact gradient may offer surrogates too, e.g. one branch of diffusevae's: they stand for no
    attack on it. One that rounds and offers none is attacked through the identity. Of a purifier whose class isn't
    here neither counts.
    """
    surrogate = SURROGATE.fullmatch(view)
    if surrogate is None and view != "bpda":
        return view == "exact"
    try:
        spec = specs.parse(purifier)
        component: Any = registry.described("purifiers", spec.name, spec.argument)
    except UsageError:
        return False
    # a class that offers none has an instance that rounds: latent on a vector-quantised code
    offered = getattr(component, "surrogates", ())
    rounds = not getattr(component, "differentiable", True)
    return rounds and not offered if surrogate is None else rounds or surrogate[1] not in offered


def attack_class(run: dict[str, Any]) -> Any:
    """The class of a run's attack; None if it isn't here, e.g. another machine's file."""
    spec = specs.parse(run["identity"]["attack"])
    try:
        return registry.described("attacks", spec.name, spec.argument)
    except UsageError:
        return None


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
    budgets -= {"custom"} if len(budgets) > 1 else set()
    merged = group[0] | {
        "identity": group[0]["identity"]
        | {"budget": budgets.pop() if len(budgets) == 1 else "mixed", "view": ", ".join(sorted(views))},
        "names": names,
        "preflight": all(run.get("preflight", True) for run in group),
        "mixed_environment": any(run.get("mixed_environment") for run in group),
        "complete": all(run.get("complete", True) for run in group),
        "n": max(run["n"] for run in group),
        "seconds": sum(run["seconds"] for run in group),
        "folder": JOIN.join(str(run["folder"]) for run in group),
    }
    for cost in ("forwards", "backwards"):
        merged[cost] = float(sum(np.mean([records[i][cost] for i in ids]) for records in by_id))
    return merged, chosen


def led(run: dict[str, Any]) -> float | None:
    """The share of a run's gradients that led somewhere, of those that were counted; None if none was."""
    counted = [(r["backwards"], blank) for r in run["records"] if (blank := r.get("blank", 0)) is not None]
    took = sum(backwards for backwards, _ in counted)
    return 1 - sum(blank for _, blank in counted) / took if took else None


def uncounted(run: dict[str, Any]) -> bool:
    """Whether a package took gradients, of which nobody knows where they led."""
    return any(r["backwards"] and r.get("blank", 0) is None for r in run["records"])


def _survival_of(run: dict[str, Any], ids: set[int]) -> float:
    return float(np.mean([_survival(r) for r in run["records"] if r["id"] in ids]))


def _survival(record: dict[str, Any]) -> float:
    """Share of correct ``select`` draws."""
    return float(np.mean(np.array(record["select"]) == record["label"]))


def predicted(records: list[dict[str, Any]], key: str) -> np.ndarray:
    """The classes of every draw, (images, draws)."""
    return np.array([r[key] for r in records])
