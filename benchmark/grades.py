"""Grades: what else is recorded of a defense, and whether it contradicts a row's robust accuracy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attacks.pgd import WALKED
from benchmark import config, evidence, registry, specs, stats
from benchmark.checks import Check
from benchmark.files import reading

MEANING = {
    "A": "all likely contradictions were tried, and none is significantly stronger",
    "B": "none is significantly stronger by more than 5 points, but a check warns",
    "C": "likely contradictions were not tried",
    "F": "something recorded is significantly stronger by more than 5 points, or an audit failed: no ranking counts it",
}
LARGE = ("paper", "standard")
"""Budgets that need no longer attack beside them."""
MARGIN = 0.05
"""By how much something stronger has to be stronger to withhold a number; by less, it warns."""
LEVEL = 0.025
"""Of the tests whether what leaves fewer draws correct is stronger; Holm-corrected for all that do, which some half do
by chance."""
IMAGES = 64
"""On how many of a row's images another run has to have been tried, at least, to count as tried; or on all."""
LED = 0.5
"""The share of an attack's gradients that were finite and not zero, at least."""
FEWEST = 32
"""Images of a row, at least."""
LOOKING = ("square", "spsa")
"""Searches that need no gradient; to draw at random isn't one."""
STEPS, QUERIES, EFFORT = 20, 500, 2
"""What an attack by gradients and one without spend at least to count as tried; how many times a row's steps and draws
per gradient a longer attack takes."""
EVERYTHING = "graded"
"""What ``--attack`` calls the attacks that a grade asks for."""


class Grade(NamedTuple):
    """A letter of ``MEANING``, and the checks that it sums up; None where nothing was attacked."""

    letter: str | None
    checks: list[Check]


def grades(rows: Sequence[evidence.Row], runs: Iterable[dict[str, Any]]) -> list[Grade]:
    """A grade for each row, of all runs on its defense under its threat.

    - ``nothing-stronger``: no other attack, view, budget or seed, and no random noise, leaves fewer draws correct on
      the images that both have, by one-sided paired sign flips (``LEVEL``). By more than ``MARGIN`` fails, by less
      warns. An attacker who knew the verdict's draws is no rival; what a worst
      case is made of is.
    - ``gradients``: a search of the whole ball by gradients of the defense itself is among them.
    - ``headline``: PGD and AutoAttack are, on losses and in the version that are for such a defense; of a
      deterministic one AutoAttack; PGD alone under a norm that AutoAttack doesn't know.
    - ``looking``: a search that needs no gradient is; AutoAttack's standard version has one.
    - ``transferred``: of a purifier, a search by the gradients of another defense, e.g. of the classifier alone, is: it
      meets one that only hides where its own gradient leads (Athalye et al. 2018, arXiv 1802.00420).
    - ``longer``: one of the row's attacks, or of the others, takes the steps times draws per gradient of budget
      standard, or ``EFFORT`` times those that the row's and a quick attack take.
    - ``images``: the row is of 32 images or more.
    - ``whole``: all images were attacked, after the preflight, in one environment, under keyed noise.
    - those of ``afterwards``, where a run knows them, and of an ``audit.json`` beside the records; a defense that
      answered otherwise in one of its runs does so in all.

    What counts as tried took ``STEPS`` iterations or ``QUERIES`` queries, on ``IMAGES`` of the row's images or all.
    """
    met: dict[str, list[dict[str, Any]]] = {}
    for run in {Path(str(run["folder"])).resolve(): run for run in runs}.values():  # what is named twice speaks once
        if run["records"]:
            met.setdefault(evidence.defense(run), []).append(run)
    known = {str(run["folder"]): _correct(run["records"]) for of in met.values() for run in of}
    return [_grade(*row, met.get(evidence.defense(row[0]), []), known) for row in rows]


def untried(grade: Grade) -> bool:
    """Whether attacks that the grade asks for didn't meet the defense."""
    met = ("gradients", "headline", "looking", "transferred")
    return any(
        check.status == "not run" if check.id in met else check.id == "longer" and check.status == "warn"
        for check in grade.checks
    )


def asked(stochastic: bool, budget: str, norm: str = "Linf", bare: bool = False) -> list[str]:
    """The attacks that ``grades`` asks for, after which only what they find can cost a defense its A.

    A deterministic one meets PGD and the package's AutoAttack, which looks without gradients and is long enough at any
    budget; a stochastic one PGD as others publish it, AutoAttack's version for it, a search without gradients, and PGD
    with momentum and halved steps, which finds most of such a defense: twice as long where the budget is quick. Under a
    norm that AutoAttack doesn't know every defense meets the rest. What fools the classifier alone is tried on each
    but the ``bare`` one, which has no purifier.
    """
    known, transferred = _knows("autoattack", norm), ["transfer"] * (not bare)
    if known and not stochastic:
        return ["pgd", "autoattack", *transferred]
    longer = "" if budget in LARGE else f"steps={EFFORT * STEPS},"
    rest = [_looking(norm), f"pgd:{longer}momentum=0.75,halving=true"]
    return ["pgd", *["autoattack"] * known, *rest, *transferred]


def letter(checks: Iterable[Check]) -> str:
    """The letter that checks sum up to."""
    statuses = {check.status for check in checks}
    return next((mark for status, mark in (("fail", "F"), ("not run", "C"), ("warn", "B")) if status in statuses), "A")


def _grade(
    run: dict[str, Any],
    records: list[dict[str, Any]],
    members: Sequence[dict[str, Any]],
    met: list[dict[str, Any]],
    known: dict[str, dict[int, float]],
) -> Grade:
    if all(_moves_nothing(member) for member in members):
        return Grade(None, [])
    folders = {str(member["folder"]) for member in members}
    rivals = [
        one for one in met if str(one["folder"]) not in folders and "noise=verdict" not in one["identity"]["view"]
    ]
    others = [*rivals, *(members if len(members) > 1 else ())]  # a worst case is as low as each that it is made of
    ids = {r["id"] for r in records}
    enough = min(len(ids), IMAGES)
    tried = [*members, *(one for one in rivals if len(ids & known[str(one["folder"])].keys()) >= enough)]
    searches = [one for one in tried if _searches(one)]
    names = {_name(one) for one in searches if _by_the_book(one)}
    wanted = [name for name in evidence.HEADLINE if _knows(name, run["identity"]["norm"])]
    wanted = wanted if run["stochastic"] else wanted[-1:]  # AutoAttack, where it knows the norm
    missing = [name for name in wanted if name not in names]
    looks = [one for one in tried if _looks(one)]
    own = [one for one in tried if _own(one)]
    checks = [
        _stronger(records, [(f"{one['names']['display']}{_aside(one)}", known[str(one["folder"])]) for one in others]),
        _met(
            "gradients",
            searches,
            [one for one in own if evidence.led(one) is not None],
            f"{STEPS} steps over the whole ball, half of the gradients at least not zero",
            "attack with --attack pgd --view auto",
            "too short, not of the whole ball, or led by no gradient",
        ),
        Check.of(
            "headline",
            not missing,
            f"without {' and '.join(missing)}" if missing else "",
            " and ".join(wanted),
            f"attack with {' and '.join(wanted)}",
            bad="not run",
        ),
        _met(
            "looking",
            looks,
            [one for one in own if _name(one) in LOOKING],
            f"{QUERIES} queries",
            f"attack with --attack {_looking(run['identity']['norm'])}, too",
            "too few queries",
        ),
        *_transferred(run, tried),
        _longer(members, searches, STEPS * (4 if run["stochastic"] else 1)),
        Check.of(
            "images", len(records) >= FEWEST, f"{len(records)}", FEWEST, "attack 32 images or more", bad="not run"
        ),
        *_whole(members),
    ]
    for member in members:
        checks += _afterwards(member)
        checks += _audited(Path(str(member["folder"])) / "audit.json")
    checks += [check for one in rivals for check in _afterwards(one) if check.status == "fail"]
    return Grade(letter(checks), checks)


def _stronger(records: list[dict[str, Any]], rivals: Sequence[tuple[str, dict[int, float]]]) -> Check:
    """Whether anything recorded leaves fewer draws correct than a row's records say."""
    ours = _correct(records)
    fewer: list[tuple[float, str, float]] = []
    for name, theirs in [("random noise", _correct(records, "random")), *rivals]:
        if common := sorted(ours.keys() & theirs.keys()):
            d = np.array([ours[i] - theirs[i] for i in common])
            if d.mean() > 0:
                fewer.append((float(d.mean()), name, float(stats.sign_flips(d[None], flips=4_000)[0])))
    p = stats.holm([p for *_, p in fewer])
    beaten = sorted(((d, name) for (d, name, _), q in zip(fewer, p, strict=True) if q < LEVEL), reverse=True)
    status = "fail" if beaten and beaten[0][0] > MARGIN else "warn" if beaten else "pass"
    told = [f"{name} leaves {100 * d:.1f} points fewer" for d, name in beaten[:3]]
    if fewer and not beaten:
        told = [f"{max(fewer)[1]} leaves {100 * max(fewer)[0]:.1f} points fewer, which may be chance"]
    value = "; ".join([*told, f"{1 + len(rivals)} recorded"])
    expected = f"nothing significantly stronger, by more than {100 * MARGIN:.0f} points least of all"
    return Check("nothing-stronger", status, value, expected, "report what leaves fewer, or the worst case over both")


def _correct(records: list[dict[str, Any]], key: str = "adv") -> dict[int, float]:
    """The share of correct draws of each image."""
    return {r["id"]: float(s) for r, s in zip(records, evidence.shares(records, key), strict=True)}


def _met(
    what: str, whole: Sequence[Any], less: Sequence[dict[str, Any]], expected: str, advice: str, lacking: str
) -> Check:
    """Whether a search of some kind was tried; if not, which of that kind did less than counts, and what it lacks."""
    displays = dict.fromkeys(one["names"]["display"] for one in less)
    value = "" if whole or not displays else f"{lacking}: {', '.join(displays)}"
    return Check.of(what, bool(whole), value, expected, advice, bad="not run")


def _longer(members: Sequence[dict[str, Any]], searches: Sequence[dict[str, Any]], quick: float) -> Check:
    """Whether attackers worked long enough, or a longer attack was tried, than the row's and a quick one.

    A worst case may hold the longer one itself: longer than the shortest search in it.
    """
    most = max(quick, min((e for one in members if (e := _effort(one))), default=0.0))
    standard = config.BUDGETS["standard"].attacks["pgd"]
    enough = min(EFFORT * most, standard["steps"] * (standard["eot"] if members[0]["stochastic"] else 1))
    long = [one for one in searches if one["identity"]["budget"] in LARGE or _standard(one) or _effort(one) >= enough]
    value = long[0]["names"]["display"] if long else members[0]["identity"]["budget"]
    expected = f"{enough:g} steps times draws, or budget standard"
    return Check.of("longer", bool(long), value, expected, "attack with --budget standard, or longer", bad="warn")


def _transferred(run: dict[str, Any], tried: Sequence[dict[str, Any]]) -> list[Check]:
    """Whether what fools another defense was tried on this one; nothing to ask where there is no purifier."""
    if _bare(run):
        return []
    others = [one for one in tried if _others(one)]
    expected = f"{STEPS} steps over the whole ball by gradients of another defense"
    advice, lacking = "attack with --attack transfer, too", "too short, or not of the whole ball"
    return [_met("transferred", [one for one in others if _walks(one)], others, expected, advice, lacking)]


def _whole(members: Sequence[dict[str, Any]]) -> list[Check]:
    notes = [
        note
        for note, flagged in (
            ("images are missing", any(not one.get("complete", True) for one in members)),
            ("no preflight", any(not one.get("preflight", True) for one in members)),
            ("mixed environment", any(one.get("mixed_environment") for one in members)),
            ("noise isn't keyed", any(one["stochastic"] and one.get("noise", "keyed") != "keyed" for one in members)),
        )
        if flagged
    ]
    warned = sorted({name for one in members for name in one.get("warnings", ())})
    return [
        Check.of("whole", not notes, ", ".join(notes), "nothing to note", "run it again, to the end", bad="warn"),
        *(Check(name, "warn", "at preflight", advice="mend it, or attack with square and blind") for name in warned),
    ]


def _afterwards(run: dict[str, Any]) -> list[Check]:
    """What a defense answered when it was asked again; nothing of runs that never ask."""
    found = run.get("afterwards", ())
    if found is None:
        advice = "the process ended before: the same command asks"
        return [Check("verdict-again", "not run", "not yet asked", "no fewer than in the verdict", advice)]
    return [Check(**check) for check in found]


def _audited(path: Path) -> list[Check]:
    """The checks of an audit beside the records."""
    if not path.is_file():
        return []
    known = {"pass": "pass", "fail": "fail", "n/a": "pass"}
    with reading(path):
        return [
            Check(c["id"], known.get(c["status"], "warn"), str(c["value"]), c.get("threshold", ""), c["advice"])
            for part in json.loads(path.read_text())["gradients"]
            for c in part["checks"]
        ]


def _searches(run: dict[str, Any]) -> bool:
    """Whether the attack searched the whole ball by gradients of the defense itself, for as long as counts."""
    attack = evidence.attack_class(run)
    blind = getattr(attack, "black_box", False) or getattr(attack, "restricted", False)
    led = evidence.led(run)
    leads = evidence.uncounted(run) if led is None else led >= LED
    return _own(run) and not blind and leads and (_walks(run) or _standard(run))


def _walks(run: dict[str, Any]) -> bool:
    """Whether the attack took as many steps as count, as far as the radius at least."""
    steps, step_size = _option(run, "steps"), _option(run, "step_size") or _option(run, "alpha")
    halves, eps = _options(run).get("halving", False), float(Fraction(run["identity"]["eps"]))
    walked = step_size * steps * (WALKED if halves else 1)
    far = walked >= eps if step_size else halves or _option(run, "step", 1) >= 1
    return bool(steps >= STEPS and far)


def _by_the_book(run: dict[str, Any]) -> bool:
    """Whether a search is one that its name promises: PGD on a loss that leads, AutoAttack for such a defense."""
    if _name(run) == "autoattack" and run["stochastic"]:
        return _standard(run) or "pyautoattack" not in run["names"]["display"]
    return _name(run) != "pgd" or _options(run).get("loss", "ce") in ("ce", "margin", "error")


def _looks(run: dict[str, Any]) -> bool:
    """Whether the attack searched the defense itself without gradients, for as long as counts."""
    queries = max(_option(run, "queries"), 2 * _option(run, "samples") * _option(run, "steps"))
    return _own(run) and (_name(run) in LOOKING and queries >= QUERIES or _standard(run) and not run["stochastic"])


def _own(run: dict[str, Any]) -> bool:
    return not run["identity"]["attacker"] and evidence.own(run["identity"]["view"], run["identity"]["purifier"])


def _others(run: dict[str, Any]) -> bool:
    """Whether the attack followed the gradients of another defense, or of the classifier alone."""
    return _name(run) == "transfer" or bool(run["identity"]["attacker"]) or run["identity"]["view"] == "blind"


def _bare(run: dict[str, Any]) -> bool:
    """Whether the classifier stands alone."""
    return specs.parse(run["identity"]["purifier"]).name == "identity"


def _effort(run: dict[str, Any]) -> float:
    """Steps times draws per gradient of one search; none of one that images leave early."""
    if _option(run, "retire"):
        return 0.0
    return _option(run, "steps") * max(_option(run, "eot"), 1)


def _knows(attack: str, norm: str) -> bool:
    """Whether an attack searches under a norm."""
    component: Any = registry.load("attacks", attack)
    return norm in component.norms


def _looking(norm: str) -> str:
    """The search without gradients that is asked for under a norm."""
    return next(name for name in LOOKING if _knows(name, norm))


def _name(run: dict[str, Any]) -> str:
    """The attack's name, without its options."""
    return specs.parse(run["identity"]["attack"]).name


def _option(run: dict[str, Any], name: str, default: float = 0) -> float:
    """A number in an attack's spec."""
    value = _options(run).get(name, default)
    return float(value) if isinstance(value, int | float) else default


def _options(run: dict[str, Any]) -> Mapping[str, Any]:
    return specs.parse(registry.completed("attacks", run["identity"]["attack"])).options


def _moves_nothing(run: dict[str, Any]) -> bool:
    return getattr(evidence.attack_class(run), "__name__", "") == "Identity"


def _standard(run: dict[str, Any]) -> bool:
    """AutoAttack at its own settings, which are no budget's, in the version that is for such a defense."""
    display = run["names"]["display"]
    version = "rand" if run["stochastic"] else "standard"
    return _name(run) == "autoattack" and display.startswith("AutoAttack") and version in display


def _aside(run: dict[str, Any]) -> str:
    return evidence.viewed(evidence.view(run["identity"]))
