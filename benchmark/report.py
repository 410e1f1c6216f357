"""Tables from records: one row per run, and the worst case over attacks."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

from benchmark import stats
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


def rows(runs: Iterable[dict[str, Any]], *, worst_case: bool = False) -> list[dict[str, Any]]:
    """The rows of ``report --format json``: accuracies are fractions, unknown values None.

    With ``worst_case``, each group of runs that differ only in the attack gets one more row: per image the attack with
    the fewest correct ``select`` draws, judged by *its* verdict draws. Verdict draws choose nothing.
    """
    runs = [r for r in runs if r["records"]]
    table = [_row(run, run["records"]) for run in runs]
    if worst_case:
        for group in groups(runs):
            if len(group) > 1:
                table.append(_worst_row(group))
    return table


def render(table: list[dict[str, Any]], form: str, runs: Sequence[dict[str, Any]] = ()) -> str:
    """The rows as "md", "csv" or "json"; Markdown also says what the names of the runs' purifiers stand for.

    Raises:
        UsageError: for another format.
    """
    if form == "json":
        return json.dumps(table, indent=2) + "\n"
    if form == "csv":
        buffer = io.StringIO()
        pd.DataFrame(table, columns=list(COLUMNS)).to_csv(buffer, index=False, lineterminator="\n")
        return buffer.getvalue()
    if form == "md":
        return _markdown(table, _specs(runs))
    raise UsageError(f"--format {form}: known formats are md, csv, json")


def compact(runs: Iterable[dict[str, Any]]) -> str:
    """A Markdown line per defense and radius, over the images that all its attacks have, a table per threat model.

    Clean accuracy, each attack beside the other, and their worst case where both attacks of the headline are there.
    """
    runs = [r for r in runs if r["records"]]
    norms = sorted({run["identity"]["norm"] for run in runs})
    return "\n".join(_compact([run for run in runs if run["identity"]["norm"] == norm]) for norm in norms)


def _compact(runs: list[dict[str, Any]]) -> str:
    """``compact`` of one threat model."""
    used = {run["names"]["attack"] for run in runs}
    attacks = sorted(used, key=lambda a: (_base(a) not in HEADLINE, _base(a) != HEADLINE[0], a))
    head = [*"purifier classifier norm eps n draws".split(), "clean % [95 %]", *(f"{a} %" for a in attacks)]
    head += ["worst case % [95 %]", "random noise %"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    displays: dict[str, list[str]] = {}
    for group in sorted(groups(runs), key=_order):
        ids = set.intersection(*({r["id"] for r in run["records"]} for run in group))
        rows_of = {
            run["names"]["attack"]: _row(run, [r for r in run["records"] if r["id"] in ids]) for run in group if ids
        }
        if not rows_of:
            continue
        for attack, row in rows_of.items():
            displays.setdefault(attack, []).append(row["display"])
        whole = set(HEADLINE) <= set(map(_base, rows_of))
        one = _worst_row(group) if whole else next(iter(rows_of.values()))
        view = "" if one["view"] == "exact" else f" (view {one['view']})"
        cells = [str(one[k]) for k in ("purifier", "classifier", "norm", "eps", "n", "draws")] + [
            _with_interval(one, "clean"),
            *(_percent(rows_of[a]["robust"]) if a in rows_of else "–" for a in attacks),
            _with_interval(one, "robust") if whole else "–",
            _percent(one["random_control"]),
        ]
        lines.append(f"| {' | '.join([cells[0] + view, *cells[1:]])} |")
    legend = [f"{a}: {' or '.join(dict.fromkeys(displays[a]))}" for a in attacks if a in displays]
    return "\n".join([*lines, "", f"{'; '.join(legend + _specs(runs))}."]) + "\n"


def _base(attack: str) -> str:
    """The name in an attack's spec."""
    return attack.split(":")[0]


def _specs(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What the names of purifiers stand for, where they have options."""
    specs = {run["names"]["purifier"]: run["identity"]["purifier"] for run in runs}
    return [f"{name} is {spec}" for name, spec in sorted(specs.items()) if name != spec.removesuffix(":rounds=1")]


def _order(group: list[dict[str, Any]]) -> tuple:
    identity, names = group[0]["identity"], group[0]["names"]
    eps = float(Fraction(identity["eps"]))
    known = [names["purifier"] == p for p in ("identity", "vae", "diffpure")]
    return identity["norm"], eps, [not k for k in known], names["purifier"], names["classifier"]


def shares(records: list[dict[str, Any]], key: str = "adv") -> np.ndarray:
    """The share of correct draws per image."""
    label = np.array([r["label"] for r in records])
    return stats.mean_rule(_predicted(records, key) == label[:, None])


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
            | {"view": run["identity"]["view"], "n": len(ids), "reference": float(ours.mean())}
            | {"robust": float(theirs.mean())}
            | stats.compare(theirs, ours)._asdict()
            | {"detectable": stats.detectable(theirs, ours, tests=len(others))}
        )
    for row, corrected in zip(table, stats.holm([row["p"] for row in table]), strict=True):
        row["p_holm"] = corrected
    return table


def render_comparison(table: list[dict[str, Any]]) -> str:
    """The comparison as Markdown, in points."""
    lines = [
        "| purifier | classifier | attack | view | norm | eps | n | robust % | reference % | difference [95 %] | p | "
        "p (Holm) | detectable |",
        "|" + "---|" * 13,
    ]
    for r in table:
        difference = points(r["difference"], r["low"], r["high"])
        cells = [str(r[key]) for key in ("purifier", "classifier", "display", "view", "norm", "eps", "n")]
        cells += [_percent(r["robust"]), _percent(r["reference"]), difference]
        cells += [f"{r['p']:.4f}", f"{r['p_holm']:.4f}", share(r["detectable"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _row(run: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    identity, names = run["identity"], run["names"]
    label = np.array([r["label"] for r in records])
    clean, adv, random = (_predicted(records, key) for key in ("clean", "adv", "random"))
    draws = adv.shape[1]
    clean_accuracy = stats.accuracy(stats.mean_rule(clean == label[:, None]), draws)
    robust = stats.accuracy(stats.mean_rule(adv == label[:, None]), draws)
    broken = np.array([r["broken_at"] for r in records]) >= 0
    # the any-iteration rule speaks of draws of the defense itself, seen in the loop of one attack
    seen = run.get("watched", identity["view"] != "blind" and not identity["attacker"])
    watched = run["stochastic"] and names["attack"] != WORST and seen
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
        "view": identity["view"] if not identity["attacker"] else f"{identity['view']}@{identity['attacker']}",
        "norm": identity["norm"],
        "eps": identity["eps"],
        "budget": identity["budget"],
        "n": len(records),
        "draws": draws,
        "seed": identity["seed"],
        "clean": clean_accuracy.mean,
        "clean_low": clean_accuracy.low,
        "clean_high": clean_accuracy.high,
        "robust": robust.mean,
        "robust_low": robust.low,
        "robust_high": robust.high,
        "clean_majority": float(stats.majority_rule(clean, label).mean()),
        "robust_majority": float(stats.majority_rule(adv, label).mean()),
        "clean_worst": float(stats.worst_rule(clean == label[:, None]).mean()),
        "robust_worst": float(stats.worst_rule(adv == label[:, None]).mean()),
        "robust_any_iteration": float((~broken).mean()) if watched else None,
        "null_floor": float(np.mean([r["null_wrong"] == 0 for r in records])) if watched else None,
        "random_control": float((random == label[:, None]).mean()),
        "nfe": run["nfe"],
        "forwards": float(np.mean([r["forwards"] for r in records])),
        "backwards": float(np.mean([r["backwards"] for r in records])),
        "seconds_per_image": run["seconds"] / len(records) if run["seconds"] else None,
        "grade": None,
        "run": str(run["folder"]),
    }


WORST = "worst-case"


def groups(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs that differ only in the attack, together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        identity = dict(run["identity"])
        identity["weights"] = {k: v for k, v in identity["weights"].items() if not k.startswith("attack.")}
        key = json.dumps([identity[k] for k in CELL], sort_keys=True)
        found.setdefault(key, []).append(run)
    return list(found.values())


def _worst_row(group: list[dict[str, Any]]) -> dict[str, Any]:
    ids = set.intersection(*({r["id"] for r in run["records"]} for run in group))
    common = sorted(ids)
    # a tie goes to the attack that is stronger on the whole, by select draws
    group = sorted(group, key=lambda run: (_survival_of(run, ids), run["identity"]["attack"]))
    by_id = [{r["id"]: r for r in run["records"]} for run in group]
    chosen = [min((records[i] for records in by_id), key=_survival) for i in common]
    names = group[0]["names"] | {
        "attack": WORST,
        "display": f"worst case of {', '.join(run['names']['display'] for run in group)}",
    }
    budgets = {run["identity"]["budget"] for run in group}
    merged = group[0] | {
        "identity": group[0]["identity"] | {"budget": budgets.pop() if len(budgets) == 1 else "mixed"},
        "names": names,
        "preflight": all(run.get("preflight", True) for run in group),
        "mixed_environment": any(run.get("mixed_environment") for run in group),
        "complete": all(run.get("complete", True) for run in group),
        "n": max(run["n"] for run in group),
        "seconds": sum(run["seconds"] for run in group),
        "folder": " + ".join(str(run["folder"]) for run in group),
    }
    row = _row(merged, chosen)
    for cost in ("forwards", "backwards"):
        row[cost] = float(sum(np.mean([records[i][cost] for i in common]) for records in by_id))
    return row


def _survival_of(run: dict[str, Any], ids: set[int]) -> float:
    return float(np.mean([_survival(r) for r in run["records"] if r["id"] in ids]))


def _survival(record: dict[str, Any]) -> float:
    """Share of correct ``select`` draws."""
    return float(np.mean(np.array(record["select"]) == record["label"]))


def _predicted(records: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([r[key] for r in records])


def _markdown(table: list[dict[str, Any]], specs: Sequence[str] = ()) -> str:
    """Tables to read, one per threat model: accuracies in percent with their 95 % intervals."""
    if not table:
        return "no finished example yet\n"
    norms = list(dict.fromkeys(r["norm"] for r in table))
    lines = []
    for norm in norms:
        lines += [f"**{norm}**", ""] if len(norms) > 1 else []
        lines += [*_lines([r for r in table if r["norm"] == norm]), ""]
    datasets, seeds = sorted({r["dataset"] for r in table}), sorted({str(r["seed"]) for r in table})
    budgets = sorted({r["budget"] for r in table})
    foreknown = any("noise=verdict" in r["view"] for r in table)
    lines += [
        f"{', '.join(datasets)}; budget {', '.join(budgets)}; seed {', '.join(seeds)}. Accuracy is the mean over fresh "
        f"verdict draws that no attack saw{', unless its row says so' if foreknown else ''}; clean accuracy stands "
        "under the same rule. Intervals are 95 % Wilson over "
        "images and draws, and say nothing about training seeds. Any iteration: no draw in the attack's loop was ever "
        "wrong; its null floor is what that rule reads at x itself. s/image is wall time; draws at x "
        "are shared between the attacks of a defense.",
        *([f"{'; '.join(specs)}."] if specs else []),
    ]
    return "\n".join(lines) + "\n"


def _lines(table: list[dict[str, Any]]) -> list[str]:
    """One Markdown table, head and rows."""
    head = (
        "purifier | classifier | attack | view | norm | eps | n | draws | clean % [95 %] | robust % [95 %] | "
        "majority clean / robust | worst draw clean / robust | "
        "any iteration (null floor) | random noise | NFE | s/image"
    )
    lines = [f"| {head} |", "|" + "---|" * (head.count(" | ") + 1)]
    for r in table:
        any_iteration = "–"
        if r["robust_any_iteration"] is not None:
            any_iteration = f"{_percent(r['robust_any_iteration'])} ({_percent(r['null_floor'])})"
        seconds = "–" if r["seconds_per_image"] is None else _two_digits(r["seconds_per_image"])
        cells = [
            r["purifier"], r["classifier"], r["display"], r["view"], r["norm"], r["eps"], str(r["n"]), str(r["draws"]),
            _with_interval(r, "clean"),
            _with_interval(r, "robust"),
            f"{_percent(r['clean_majority'])} / {_percent(r['robust_majority'])}",
            f"{_percent(r['clean_worst'])} / {_percent(r['robust_worst'])}",
            any_iteration, _percent(r["random_control"]), str(r["nfe"]), seconds,
        ]  # fmt: skip
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return lines


def _with_interval(row: dict[str, Any], key: str) -> str:
    return f"{_percent(row[key])} [{_percent(row[f'{key}_low'])}, {_percent(row[f'{key}_high'])}]"


def share(value: float | None) -> str:
    """A fraction in percent, or a dash where it is unknown."""
    return "–" if value is None else _percent(value)


def points(difference: float, low: float, high: float) -> str:
    """A difference of accuracies with its interval, in percentage points."""
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _two_digits(value: float) -> str:
    """A number to two digits, without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
