"""Whether an attack could have known better: gradients held against each other, white-box against black-box attacks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attacks import Calls, NotApplicable, Victim
from attacks._gradient import ce
from benchmark import evidence, stats, wording
from benchmark.checks import Check
from benchmark.errors import UsageError
from benchmark.gate import check_shapes
from benchmark.grades import EVERYTHING, MEANING, grades
from benchmark.preflight import finite_difference_error, generic
from benchmark.report import row
from benchmark.verdict import Judge
from benchmark.views import View
from purifiers import Tape

if TYPE_CHECKING:
    from benchmark.cell import Cell

JUDGES = 16
"""Draws that judge each view's images in an audit."""


def views(cell: Cell) -> list[str]:
    """Every view that a purifier may have; whether it has it shows when it is asked."""
    offered = getattr(cell.defense.purifier, "surrogates", ())
    return ["exact", *(f"surrogate:gradient={name}" for name in offered), "adjoint", "bpda", "blind"]


def gradients(cell: Cell) -> dict[str, Any]:
    """Every view's gradient against the exact one, under one tape, and what an attack makes of it.

    Per view: the cosine between its gradient of the cross-entropy and the exact one, mean and smallest over images; the
    median ratio of their norms; the robust accuracy that the cell's attack reaches with it, on fresh draws, and its
    paired difference to the exact view. Then the exact gradient against finite differences, in float64.

    Returns:
        {"defense", "n", "draws", "rows": one dict per view, "checks": ``Check`` as dicts}
    """
    if cell.view.spec.name != "exact" or cell.attacker is not cell.defense or cell.attack.black_box:
        raise UsageError(
            f"{cell}: the audit tries every view itself, with an attack by gradients of the defense: leave out --view "
            "and --attacker, and name e.g. --attack pgd"
        )
    check_shapes(cell)
    cell.prepare()
    n = cell.n
    x, y = cell.data.images(slice(0, n)).to(cell.device), cell.data.labels[:n].to(cell.device)
    ids = cell.data.ids[:n]
    draws = JUDGES if cell.stochastic else 1
    rows: list[dict[str, Any]] = []
    exact: Tensor | None = None
    shares: dict[str, np.ndarray] = {}
    for name in views(cell):
        view = View(name)(keep=1)
        tape = Tape(cell.settings.seed, "attack", ids).to(cell.device)
        victim = Victim(cell.defense, view, tape, Calls(cell.rows), stochastic=cell.stochastic)
        try:
            gradient = victim.evaluate(x, y, ce, "audit", eot=1).gradient.flatten(1).double()
            found = cell.attack.perturb(x, y, victim, cell.threat)
        except NotApplicable as missing:
            rows.append({"view": name, "status": "n/a", "why": str(missing)})
            continue
        exact = gradient if exact is None else exact
        cosine = torch.nn.functional.cosine_similarity(gradient, exact)
        ratio = gradient.norm(dim=1) / exact.norm(dim=1)
        right = Judge(cell, Calls(cell.rows)).share(found.candidates, y, ids, draws).cpu().numpy()
        shares[name] = right
        difference = stats.compare(right, shares["exact"])
        rows.append(
            {
                "view": name, "status": "pass", "cosine": _number(cosine.mean()), "cosine_low": _number(cosine.min()),
                "norm_ratio": _number(ratio.nanmedian()), "robust": float(right.mean()),
                "difference": difference.difference, "low": difference.low, "high": difference.high,
            }
        )  # fmt: skip
    tape = Tape(cell.settings.seed, "preflight", ids[:2])
    error = finite_difference_error(
        lambda module, z: ce(module(z, tape, View("exact")(keep=1)), y[:2]), cell.defense, generic(x[:2], tape).double()
    )
    nothing = exact is None or not bool(exact.any())
    default = str(View("auto").fitting(cell.defense.purifier))
    checks = [
        Check.of("finite-differences", error <= 1e-2, error, 1e-2,
              "the exact view isn't the gradient of the defense: look for detach, no_grad or a custom backward"),
        Check.of("exact-says-something", not nothing, "zero" if nothing else "", "not zero everywhere",
              "the purifier rounds: attack it with --view auto, and with each surrogate that it names"),
        _strongest("exact-is-strongest", "exact", shares),
    ]  # fmt: skip
    if default != "exact":  # it says that it rounds: nobody takes that view, and it judges nothing
        checks = [c._replace(status="n/a", advice="it says that it has no gradient") for c in checks]
        checks.append(_strongest("default-is-strongest", default, shares))
    return {"defense": str(cell), "n": n, "draws": draws, "rows": rows, "checks": [c._asdict() for c in checks]}


def _strongest(name: str, view: str, shares: dict[str, np.ndarray]) -> Check:
    """Whether no other view finds significantly more than one does: shares of correct draws by view."""
    others = [other for other in shares if other != view]
    p = stats.holm([stats.compare(shares[view], shares[other], one_sided=True).p for other in others])
    beats = [other for other, corrected in zip(others, p, strict=True) if corrected < 0.05]
    return Check.of(
        name, not beats, ", ".join(beats), f"no view beats {view}",
        f"another view finds more: the gradient of {view} is masked, vanishes or misleads; attack with that view, too",
    )  # fmt: skip


def _render_gradients(found: dict[str, Any]) -> str:
    """The audit of gradients as Markdown."""
    lines = [
        f"{found['defense'].replace(', view exact', '')}; judged by {found['draws']} fresh draws",
        "",
        "| view | cosine with exact: mean (min) | norm / exact | robust % | difference to exact [95 %] |",
        "|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        if r["status"] == "n/a":
            lines.append(f"| {r['view']} | not applicable: {r['why']} | – | – | – |")
            continue
        difference = "–" if r["view"] == "exact" else wording.points(r["difference"], r["low"], r["high"])
        lines.append(
            f"| {r['view']} | {_text(r['cosine'], '.3f')} ({_text(r['cosine_low'], '.3f')}) | "
            f"{_text(r['norm_ratio'], '.3g')} | {100 * r['robust']:.1f} | {difference} |"
        )
    return "\n".join(lines) + "\n"


def black_box(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """White-box against black-box attacks on one defense, paired over their images: none may be weaker.

    One-sided: p is the probability, were both equally strong, of a robust accuracy as much higher under the white-box
    attack as the one seen (sign flips). Beside it stands the true difference that such a test, at its share of 5 %,
    would notice in four of five cases.

    Returns:
        {"pairs": one dict per white-box and black-box attack, "checks": ``Check`` as dicts}. An attack that is
        restricted to a part of the ball or to another goal stands in the pairs and fails no check.
    """
    pairs: list[dict[str, Any]] = []
    for group in evidence.groups([r for r in runs if r["records"]]):
        white = [r for r in group if r["identity"]["view"] == "exact" and _white(r)]
        black = [r for r in group if _black(r)]
        for w in white:
            for b in black:
                ids = {r["id"] for r in w["records"]} & {r["id"] for r in b["records"]}
                theirs, ours = (evidence.shares([r for r in one["records"] if r["id"] in ids]) for one in (w, b))
                if not ids:
                    continue
                compared = stats.compare(theirs, ours, one_sided=True)
                names = w["names"]
                pairs.append(
                    {
                        "purifier": names["purifier"], "classifier": names["classifier"],
                        "norm": w["identity"]["norm"], "eps": w["identity"]["eps"], "n": len(ids),
                        "white_box": names["display"], "black_box": b["names"]["display"],
                        "white": float(theirs.mean()), "black": float(ours.mean()),
                        "difference": compared.difference, "low": compared.low, "high": compared.high, "p": compared.p,
                        "shares": (theirs, ours), "restricted": evidence.attack_class(w).restricted,
                    }
                )  # fmt: skip
    for pair in pairs:
        pair["detectable"] = stats.detectable(*pair.pop("shares"), tests=len(pairs), one_sided=True)
    weaker = [
        f"{p['white_box']} than {p['black_box']} on {p['purifier']} + {p['classifier']}"
        for p, corrected in zip(pairs, stats.holm([pair["p"] for pair in pairs]), strict=True)
        if corrected < 0.05 and not p["restricted"]
    ]
    check = Check(
        "white-box-beats-black-box", "fail" if weaker else "pass" if pairs else "n/a", "; ".join(weaker),
        "no white-box attack on the label and the whole ball is weaker at 5 %, Holm-corrected",
        "gradients find less than looking does: they are masked; try other losses, targets and views",
    )  # fmt: skip
    return {"pairs": pairs, "checks": [check._asdict()]}


def graded(runs: Iterable[dict[str, Any]], beside: Iterable[dict[str, Any]] = ()) -> dict[str, Any]:
    """What the grade of each defense rests on, of the runs that speak for it; runs ``beside`` speak, and have no grade.

    Returns:
        {"grades": one dict per defense and threat, with its grade and checks}. A grade F is a failed check.
    """
    runs = [run for run in runs if run["records"]]
    chosen = evidence.headline(runs)
    return {
        "grades": [
            row(run, records) | {"grade": grade.letter, "checks": [check._asdict() for check in grade.checks]}
            for (run, records, _), grade in zip(chosen, grades(chosen, [*beside, *runs]), strict=True)
            if grade.letter
        ]
    }


def _render_grades(found: Sequence[dict[str, Any]]) -> str:
    """What grades rest on, as Markdown."""
    lines = []
    for one in found:
        low, high = 100 * one["robust_low"], 100 * one["robust_high"]
        lines.append(
            f"- **{one['grade']}** {one['purifier']} + {one['classifier']} under {one['display']}"
            f"{evidence.viewed(one['view'])}, {one['norm']} {one['eps']}: {100 * one['robust']:.1f} [{low:.1f}, "
            f"{high:.1f}], n={one['n']}"
        )
        for c in one["checks"]:
            advice = f": {c['advice']}" if c["status"] != "pass" else ""
            expected = f"expected {c['threshold']}" if c["status"] != "pass" and c["threshold"] != "" else ""
            value = f" ({'; '.join(filter(None, (c['value'], expected)))})" if c["value"] or expected else ""
            lines.append(f"  - {c['id']}: {c['status']}{value}{advice}")
    if any(c["status"] == "not run" for one in found for c in one["checks"]):
        lines += ["", f"`run --attack {EVERYTHING}` with the rest of a defense's command meets all that wasn't tried."]
    return "\n".join([*lines, "", *(f"{letter}: {meaning}." for letter, meaning in MEANING.items())]) + "\n"


def saved(path: Path) -> dict[str, Any]:
    """An audit as ``--json`` printed it.

    Raises:
        UsageError: if the file isn't one.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(document, dict) or not {"gradients", "pairs", "grades"} & set(document):
        raise UsageError(f"{path} is no audit: save one with python -m benchmark audit ... --json")
    return document


def failed(document: dict[str, Any]) -> bool:
    """Whether a check of an audit failed."""
    parts = next((document[kind] for kind in ("gradients", "grades") if kind in document), [document])
    return any(c["status"] == "fail" for part in parts for c in part["checks"])


def render(document: dict[str, Any]) -> str:
    """An audit as Markdown: a table and its checks, per defense where gradients are compared."""
    if "gradients" in document:
        return "\n".join(_render_gradients(part) + _render_checks(part["checks"]) for part in document["gradients"])
    if "grades" in document:
        return _render_grades(document["grades"])
    return _render_black_box(document["pairs"]) + _render_checks(document["checks"])


def _render_checks(checks: Sequence[dict[str, Any]]) -> str:
    lines = [""]
    for c in checks:
        value = f"{c['value']:.2g}" if isinstance(c["value"], float) else c["value"]
        advice = f": {c['advice']}" if c["status"] == "fail" else ""
        lines.append(f"- {c['id']}: **{c['status']}**{f' ({value})' if value else ''}{advice}")
    return "\n".join(lines) + "\n"


def _render_black_box(pairs: Sequence[dict[str, Any]]) -> str:
    """The audit of attacks as Markdown, in points."""
    if not pairs:
        return "No defense met both a white-box and a black-box attack: run e.g. --attack pgd,square on one.\n"
    lines = [
        "| purifier | classifier | white-box attack | black-box attack | norm | eps | n | white % | black % | "
        "difference [95 %] | p (white weaker) | detectable |",
        "|" + "---|" * 12,
    ]
    for p in pairs:
        cells = [str(p[k]) for k in ("purifier", "classifier", "white_box", "black_box", "norm", "eps", "n")]
        cells += [f"{100 * p[k]:.1f}" for k in ("white", "black")]
        cells += [
            wording.points(p["difference"], p["low"], p["high"]),
            wording.p_value(p["p"]),
            wording.share(p["detectable"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: Tensor) -> float | None:
    """A number that JSON knows."""
    return float(value) if value.isfinite() else None


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _black(run: dict[str, Any]) -> bool:
    attack = evidence.attack_class(run)
    return getattr(attack, "black_box", False) and attack.__name__ != "Identity"


def _white(run: dict[str, Any]) -> bool:
    """Gradients of the defense itself."""
    attack = evidence.attack_class(run)
    return attack is not None and not attack.black_box and not run["identity"]["attacker"]
