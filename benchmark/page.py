"""The leaderboard: one self-contained page, from records alone."""

from __future__ import annotations

import base64
import gzip
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import evidence, report, specs, wording
from benchmark.config import BUDGETS, PROTOCOL
from benchmark.gallery import ROWS, SHOWN
from benchmark.grades import MEANING, grades
from benchmark.report import RULES

ASSET = Path(__file__).parent / "assets" / "leaderboard.html"
SHOWN_COLUMNS = ("dataset", "purifier", "classifier", "display", "view", "n", "draws", "nfe", "grade")


def page(runs: Iterable[dict[str, Any]], beside: Iterable[dict[str, Any]] = ()) -> str:
    """HTML that asks nothing of a network: rows to sort and filter, each with protocol, command, pictures and records.

    A threat model is never mixed with another, nor a budget or a number of images: one is shown at a time. Every
    accuracy stands under every rule that the records can tell, clean and robust alike.

    Args:
        runs: those that are shown.
        beside: more that count in the grades.
    """
    runs = [run for run in runs if run["records"]]
    chosen: list[evidence.Row] = [(run, run["records"], [run]) for run in runs]
    worst = evidence.worst_cases(runs)
    # an attack with options of its own stands with the budget that it was run beside
    budgets = {_name([one]): run["identity"]["budget"] for run, _, of in reversed(worst) for one in of}
    chosen += worst
    leading = {_name(of) for _, _, of in evidence.headline(runs)}
    graded = grades(chosen, [*beside, *runs])
    tables = {rule: report.assembled(chosen, runs, rule, graded) for rule in RULES}
    heads = [k for k, (_, _, of) in enumerate(chosen) if _name(of) in leading]
    places = dict(zip(heads, report.ranked(tables["mean"].only(heads)), strict=True))
    defenses: dict[str, list[int]] = {}
    for k, (run, _, of) in enumerate(chosen):
        if len(of) == 1:
            defenses.setdefault(evidence.defense(run), []).append(k)
    document = {
        "about": "Clean and robust accuracy of purified classifiers, attacked as a whole and judged by draws that no "
        "attack saw. Intervals are 95 % over images and draws, not over training seeds. A row unfolds to its protocol, "
        "what its grade rests on, all else that was recorded of the defense, pictures, the command that measures it "
        "again, and its records.",
        "rules": {
            rule: f"Accuracy is {text.format(seen=' that no attack saw')}."
            for rule, text in RULES.items()
            if any(
                row["robust"] is not None for row in tables[rule].rows
            )  # logits stay with a run, and in no repository
        },
        "grades": MEANING,
        "ranks": wording.RANKS,
        "rows": [
            {
                "id": k,
                "leading": k in places,
                "rank": places.get(k),
                **_row(run, of, {rule: table.rows[k] for rule, table in tables.items()}, budgets.get(_name(of))),
                "checks": [list(check) for check in graded[k].checks],
                "beside": defenses[evidence.defense(run)],
            }
            for k, (run, _, of) in enumerate(chosen)
        ],
        "records": {str(run["folder"]): _packed(run) for run in runs},
        "broken": {str(run["folder"]): _broken(run) for run in runs if evidence.watched(run)},
        "galleries": {folder: picture for folder, picture in map(_picture, runs) if picture},
    }
    # a closing tag inside a string would end the script
    return ASSET.read_text().replace("@@DATA@@", json.dumps(document).replace("</", "<\\/"))


def _name(of: Sequence[dict[str, Any]]) -> str:
    return evidence.JOIN.join(sorted(str(one["folder"]) for one in of))


def _packed(run: dict[str, Any]) -> str:
    """A run's settings and records, as files, compressed: a tenth of their size. The time of packing isn't in it."""
    known = {key: value for key, value in run.items() if key not in ("records", "complete", "seconds", "folder")}
    files = {
        "run.json": json.dumps(known, indent=2) + "\n",
        "records.jsonl": "".join(json.dumps(record) + "\n" for record in run["records"]),
    }
    return base64.b64encode(gzip.compress(json.dumps(files).encode(), mtime=0)).decode()


def _broken(run: dict[str, Any]) -> list[float]:
    """The share of images of which the attack's loop had seen no wrong draw, at the end of each of its iterations."""
    at = np.array([r["broken_at"] for r in run["records"]])
    options = specs.parse(run["identity"]["attack"]).options
    length = max([int(at.max()), *(int(str(options[key])) for key in ("steps", "queries") if key in options)])
    shares = [round(float(((at < 0) | (at > k)).mean()), 4) for k in range(length + 1)]
    return shares[:: max(1, length // 100)]


def _picture(run: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The gallery beside a run's records, and in words what it shows."""
    folder = Path(str(run["folder"]))
    path = folder / "gallery.png"
    if not path.is_file():
        return str(folder), None
    shown = [(r["id"], r["label"], r["clean"][0], r["adv"][0]) for r in run["records"][:SHOWN]]
    return str(folder), {
        "png": base64.b64encode(path.read_bytes()).decode(),
        "rows": ROWS,
        "words": "; ".join(
            f"image {i} of class {label}: purified read as {clean}, attacked and purified as {adv}"
            for i, label, clean, adv in shown
        ),
    }


def command(run: dict[str, Any]) -> str:
    """The command line that measures a run again."""
    identity, names = run["identity"], run["names"]
    by_hand = [identity[kind] for kind in ("purifier", "classifier") if kind in identity["weights"]]
    if by_hand or identity["dataset"].startswith("tensors-"):
        return f"# built in Python: {', '.join(by_hand) or 'its images'}"
    custom = identity["budget"] == "custom"
    options: dict[str, Any] = {
        "dataset": identity["dataset"],
        "purifier": names["purifier"],
        "classifier": names["classifier"],
        "attack": identity["attack"] if custom else names["attack"],
        "norm": identity["norm"],
        "eps": identity["eps"],
        "view": identity["view"],
        "attacker": identity["attacker"],
        "copies": identity["copies"] if identity["copies"] > 1 else None,
        "combine": identity["combine"] if identity["copies"] > 1 else None,
        "budget": _like(identity) if custom else identity["budget"],
        "precision": identity["precision"] if identity["precision"] != "float32" else None,
        "n-examples": run["n"],
        "draws": identity["draws"] if custom and run["stochastic"] else None,
        "seed": identity["seed"],
    }
    words = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
    return shlex.join(["python", "-m", "benchmark", "run", *words])


def _like(identity: dict[str, Any]) -> str:
    """The budget with as many select draws as a run that has none of its own."""
    return next((name for name, b in BUDGETS.items() if b.select == identity["select"]), "quick")


def _row(
    run: dict[str, Any], of: Sequence[dict[str, Any]], by_rule: dict[str, dict[str, Any]], budget: str | None
) -> dict[str, Any]:
    """A row of the page: its names, its accuracies under every rule, and what unfolds; ``budget`` if not its own."""
    row, identity = by_rule["mean"], run["identity"]
    unknown = [None, None, None]
    rules = {
        rule: {
            "clean": [one["clean"], one["clean_low"], one["clean_high"]],
            "robust": [one["robust"], one["robust_low"], one["robust_high"]] if row["grade"] else unknown,
            "random": one["random_control"],
        }
        for rule, one in by_rule.items()
    }
    odd = [row["precision"]] if row["precision"] != "float32" else []
    odd += [f"protocol {row['protocol']}"] if row["protocol"] != PROTOCOL else []
    environments = [one["environment"] for one in of if "environment" in one]
    protocol = [
        ("purifier", identity["purifier"]),
        ("attacks" if len(of) > 1 else "attack", "; ".join(one["identity"]["attack"] for one in of)),
        ("budget", row["budget"]),
        ("select and verdict draws", f"{identity['select']} and {identity['draws']}"),
        ("seed, precision, protocol", f"{identity['seed']}, {identity['precision']}, {identity['protocol']}"),
        ("null floor of any iteration", _percent(row["null_floor"])),
        ("draws of the defense per image", f"{row['forwards']:,.0f} forward, {row['backwards']:,.0f} backward"),
        ("seconds per image", "unknown" if row["seconds_per_image"] is None else f"{row['seconds_per_image']:.2g}"),
        ("commit", ", ".join(sorted({str(e.get("commit")) for e in environments}))),
        ("torch, device", ", ".join(sorted({f"{e['packages']['torch']} on {e['device_name']}" for e in environments}))),
    ]
    return {
        **{key: row[key] for key in SHOWN_COLUMNS},
        "threat": f"{row['norm']} {row['eps']}",
        "effort": ", ".join([budget or row["budget"], f"{row['n']} images", *odd]),
        "worst": row["attack"] == evidence.WORST,
        "rules": rules,
        "protocol": protocol,
        "command": "\n".join(command(one) for one in of),
        "runs": [str(one["folder"]) for one in of],
    }


def _percent(value: float | None) -> str:
    return "not defined" if value is None else f"{100 * value:.1f} %"
