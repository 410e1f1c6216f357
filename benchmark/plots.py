"""Figures from records: PDF for papers, PNG for talks, and the data of each as CSV."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmark import evidence, grids, report
from benchmark.config import slug
from benchmark.errors import UsageError

STYLE: Any = {
    "figure.dpi": 150, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.frameon": False, "savefig.bbox": "tight", "pdf.fonttype": 42,
}  # fmt: skip
COLOURS = ("#0b5cad", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#0e7490", "#be185d", "#4b5563")
MARKERS = "osD^vPX*"
MANY = 12
"""Above so many purifiers in one figure, a family is drawn alike; above so many defenses, markers are small."""


def figures(
    runs: Iterable[dict[str, Any]], folder: Path, kinds: Sequence[str] = (), beside: Sequence[dict[str, Any]] = ()
) -> list[Path]:
    """Every figure that the runs can make; returns the files written.

    - ``clean-robust``: a point per defense with the intervals of both accuracies, and the Pareto front. Faint is what
      its grade F withholds.
    - ``cost``: the same defenses' robust accuracy over their network evaluations and over the seconds an image took.
    - ``attacks``: for each defense that met several attacks on the same images, each attack and the worst case.
    - ``views``, ``seeds``, ``copies``: one attack on one defense, side by side for each that a grid varied.
    - over a number: accuracies over each that a grid varied, named by it (``eps``, ``t_star``, ``attack-steps``), a
      line per defense, a figure per attack. A marker is empty where the grade is F.
    - ``dials``: robust against clean accuracy along each option of a purifier, a line per option and defense.

    Threat models, data sets, budgets and numbers of images never share a figure.

    Args:
        runs: with their records.
        folder: where the files go.
        kinds: only figures whose names begin with one of these; all without.
        beside: runs that count in the grades, and are nowhere drawn.

    Raises:
        UsageError: if there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    wanted = tuple(slug(kind) for kind in kinds if kind)
    drawable = [(slug(name.replace("/", "-")), draw, rows) for name, draw, rows in _drawn(list(runs), beside)]
    drawn = [drawing for drawing in drawable if not wanted or drawing[0].startswith(wanted)]
    unmet = [kind for kind in wanted if not any(name.startswith(kind) for name, _, _ in drawable)]
    if not drawn or unmet:
        there = f"; there are {', '.join(name for name, _, _ in drawable)}" if drawable else ""
        raise UsageError("no finished run to draw" + (f" as {' or '.join(kinds)}" if wanted else "") + there)
    met: dict[str, int] = {}
    paths: list[Path] = []
    with plt.rc_context(STYLE):
        for name, draw, rows in drawn:
            met[name] = met.get(name, 0) + 1  # what a name leaves out may differ, e.g. precision
            path = folder / (name if met[name] == 1 else f"{name}-{met[name]}")
            paths += written(draw(plt), path, pd.DataFrame(rows, columns=list(report.COLUMNS)))
    return paths


Drawing = tuple[str, Callable[[Any], Any], list[dict[str, Any]]]
"""A figure's name, what draws it on pyplot, and the rows that it shows."""


def _drawn(runs: list[dict[str, Any]], beside: Sequence[dict[str, Any]]) -> Iterator[Drawing]:
    speaking = report.assembled(evidence.headline(runs), [*beside, *runs])
    for part in speaking.parts():
        rows = [row for row in speaking.only(part).rows if row["grade"]]
        if not rows:
            continue  # nothing was attacked
        dataset, norm, eps, budget, n = (rows[0][key] for key in ("dataset", "norm", "eps", "budget", "n"))
        name, title = f"{dataset}-{norm}-{eps}-{budget}-n{n}", f"{dataset}, {norm} {eps}, budget {budget}, n = {n}"
        yield f"clean-robust-{name}", partial(_clean_robust, rows, title), rows
        yield f"cost-{name}", partial(_cost, rows, title), rows
    for run, records, of in evidence.headline(runs):
        if len(of) > 1:
            rows = [report.row(one, one["records"]) for one in of] + [report.row(run, records)]
            one = rows[0]
            title = f"{one['purifier']} + {one['classifier']}, {one['norm']} {one['eps']}, budget {one['budget']}, "
            title += f"n = {one['n']}"
            view = "" if one["view"] == "exact" else f"-{one['view']}"
            name = f"attacks-{one['dataset']}-{one['purifier']}-{one['classifier']}-{one['norm']}-{one['eps']}{view}"
            labels = [*(row["display"] for row in rows[:-1]), "worst case"]
            yield f"{name}-{one['budget']}-n{one['n']}{_seed(one)}", partial(_bars, rows, labels, title), rows
    yield from _sides([run for run in runs if run["records"]])
    yield from _curves(grids.lines(runs, beside))


SIDES = {"views": ("view", "attacker"), "seeds": ("seed",), "copies": ("copies", "combine")}
"""What is held side by side: a figure's name, and where its bars differ."""


def _sides(runs: list[dict[str, Any]]) -> Iterator[Drawing]:
    """One attack on one defense and the same images, for each view, seed or number of copies that it was run with."""
    for kind, keys in SIDES.items():
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for run in runs:
            identity = run["identity"]
            shared = [identity[key] for key in (*evidence.CELL, "attack") if key not in keys]
            ids = [r["id"] for r in run["records"]]
            label = {"views": evidence.view(identity), "seeds": f"seed {identity['seed']}"}.get(
                kind, f"{identity['copies']} × {identity['combine']}"
            )
            found.setdefault(json.dumps([shared, ids], sort_keys=True), {})[label] = run
        for of in found.values():
            if len(of) > 1:
                rows = [report.row(run, run["records"]) for run in of.values()]
                one = rows[0]
                title = f"{one['purifier']} + {one['classifier']}, {one['display']}, {one['norm']} {one['eps']}"
                name = "-".join(
                    [kind, *(one[k] for k in ("dataset", "purifier", "classifier", "attack", "norm", "eps"))]
                )
                name += f"-n{one['n']}" + ("" if kind == "seeds" else _seed(one))
                yield name, partial(_bars, rows, list(of), f"{title}, n = {one['n']}"), rows


def _curves(lines: Sequence[grids.Line]) -> Iterator[Drawing]:
    """The figures over a number, and of all dials together the one of robust and clean accuracy."""
    figures: dict[tuple[str, str], list[grids.Line]] = {}
    planes: dict[tuple[str, str], list[grids.Line]] = {}
    for line in lines:
        one = line.rows[0]
        threat = [one["dataset"], one["norm"], *([] if line.axis == "eps" else [one["eps"]])]
        title = f"{threat[0]}, {' '.join(threat[1:])}, {line.attack.replace('-', ' ')}, n = {one['n']}"
        title += f", seed {one['seed']}" if one["seed"] else ""
        name = "-".join([*threat, line.attack, f"n{one['n']}"]) + _seed(one)
        figures.setdefault((f"{line.axis.replace(' ', '-')}-{name}", title), []).append(line)
        if line.dial:
            planes.setdefault((f"dials-{name}", title), []).append(line)
    for draw, found in ((_over, figures), (_plane, planes)):
        for (name, title), together in found.items():
            several = len({line.rows[0]["classifier"] for line in together}) > 1
            labels = [_label(line, several) for line in together]
            yield name, partial(draw, together, labels, title), [row for line in together for row in line.rows]


def _seed(row: dict[str, Any]) -> str:
    return f"-seed{row['seed']}" if row["seed"] else ""


def _label(line: grids.Line, with_classifier: bool) -> str:
    one = line.rows[0]
    return line.purifier + (f" + {one['classifier']}" if with_classifier else "") + evidence.viewed(one["view"])


def written(figure: Any, path: Path, table: pd.DataFrame | None = None, *, dpi: float | None = None) -> list[Path]:
    """A figure as PDF and PNG, and what it shows as CSV, beside each other; closes it."""
    from matplotlib import pyplot as plt

    paths = [path.with_name(f"{path.name}.{end}") for end in ("pdf", "png", *(["csv"] if table is not None else []))]
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(paths[0], metadata={"CreationDate": None})
    figure.savefig(paths[1], dpi=dpi or "figure")
    plt.close(figure)
    if table is not None:
        table.to_csv(paths[2], index=False, lineterminator="\n")
    return paths


def _errors(rows: list[dict[str, Any]], key: str) -> list[list[float]]:
    """Distances from the estimate to the ends of its interval, in percent."""
    below = [100 * (r[key] - r[f"{key}_low"]) for r in rows]
    return [below, [100 * (r[f"{key}_high"] - r[key]) for r in rows]]


def _clean_robust(rows: list[dict[str, Any]], title: str, plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(4.4, 3.4))
    _points(axes, rows, "clean", 100)
    front = [r for r in rows if r["grade"] != "F"]
    front = [r for r in front if not any(_dominates(other, r) for other in front)]
    front.sort(key=lambda r: r["clean"])
    axes.plot([100 * r["clean"] for r in front], [100 * r["robust"] for r in front], color="#6b7280", linewidth=1,
              linestyle=":", zorder=0, label="Pareto front")  # fmt: skip
    named: list[dict[str, Any]] = []
    for row in sorted(front, key=lambda r: -r["robust"]) if len(rows) > MANY else ():
        if all(abs(row["robust"] - other["robust"]) > 0.04 for other in named):  # names over names can't be read
            named.append(row)
            axes.annotate(row["purifier"], (100 * row["clean"], 100 * row["robust"]), fontsize=6, xytext=(4, 2),
                          textcoords="offset points")  # fmt: skip
    axes.set(xlabel="clean accuracy (%)", ylabel="robust accuracy (%)", title=title, ylim=(-3, 103))
    _legend(axes)
    return figure


def _dominates(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a defense is at least as good in both accuracies and better in one."""
    theirs, ours = ((row["clean"], row["robust"]) for row in (other, one))
    return ours != theirs and ours[0] >= theirs[0] and ours[1] >= theirs[1]


def _cost(rows: list[dict[str, Any]], title: str, plt: Any) -> Any:
    """Robust accuracy over what a defense costs: network evaluations of one purification, and seconds of an attack."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure, panels = plt.subplots(1, 2, figsize=(7.4, 3.4), sharey=True, gridspec_kw={"wspace": 0.08})
    for axes, key in zip(panels, ("nfe", "seconds_per_image"), strict=True):
        _points(axes, [row for row in rows if row[key] is not None], key)
    panels[0].set(xlabel="NFE: network evaluations per image", xscale="symlog", ylabel="robust accuracy (%)")
    panels[1].set(xlabel="seconds per image, attack and verdict", xscale="log", ylim=(-3, 103))
    for axes in panels:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    figure.suptitle(title, fontsize=10)
    _legend(panels[1], middle=-0.05)
    return figure


def _styles(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How a defense is drawn: a colour and shape for its purifier, of many its family; a fill for its classifier.

    What a grade withholds is faint.
    """
    many = len(rows) > MANY
    alike = len({r["purifier"] for r in rows}) > MANY
    names = [re.split("[:-]", r["purifier"])[0] if alike else r["purifier"] for r in rows]
    kinds, classifiers = list(dict.fromkeys(names)), sorted({r["classifier"] for r in rows})
    return [
        {
            "color": COLOURS[kinds.index(name) % len(COLOURS)],
            "marker": MARKERS[kinds.index(name) // len(COLOURS) % len(MARKERS)],
            "fillstyle": ("full", "none", "left", "bottom")[classifiers.index(row["classifier"]) % 4],
            "markersize": 4 if many else 6, "linestyle": "none", "elinewidth": 0.4 if many else 1,
            "capsize": 0 if many else 2,
            "label": name + (f" + {row['classifier']}" if len(classifiers) > 1 else ""),
            "alpha": 0.3 if row["grade"] == "F" else 1,
        }
        for name, row in zip(names, rows, strict=True)
    ]  # fmt: skip


def _points(axes: Any, rows: list[dict[str, Any]], key: str, across: float = 1) -> None:
    """A point per defense with its intervals, robust accuracy over a column."""
    for row, style in zip(rows, _styles(rows), strict=True):
        errors = {"yerr": _errors([row], "robust")} | ({"xerr": _errors([row], key)} if f"{key}_low" in row else {})
        axes.errorbar([across * row[key]], [100 * row["robust"]], **errors, **style)


def _legend(axes: Any, middle: float = 0.5) -> None:
    """Each name once, beside the figure; many below it, around a place in units of the axes."""
    handles, names = axes.get_legend_handles_labels()
    named = dict(sorted(zip(names, handles, strict=True), key=lambda item: item[0]))
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    if len(named) > 12:
        place = {"loc": "upper center", "bbox_to_anchor": (middle, -0.16), "ncols": 3}
    axes.legend(named.values(), named, fontsize=7, **place)


def _bars(rows: list[dict[str, Any]], labels: list[str], title: str, plt: Any) -> Any:
    """Robust accuracies side by side, the highest on top; a worst case below all others."""
    order = sorted(range(len(rows)), key=lambda k: (rows[k]["attack"] != evidence.WORST, rows[k]["robust"]))
    shown = [rows[k] for k in order]
    figure, axes = plt.subplots(figsize=(5.2, 0.8 + 0.3 * len(shown)))
    places = range(len(shown))
    colours = [COLOURS[row["attack"] == evidence.WORST] for row in shown]
    axes.barh(places, [100 * r["robust"] for r in shown], xerr=_errors(shown, "robust"), height=0.6,
              color=colours, alpha=0.85, error_kw={"elinewidth": 1, "capsize": 2})  # fmt: skip
    axes.axvline(100 * shown[0]["clean"], color="#6b7280", linestyle=":", linewidth=1)
    axes.annotate(
        "clean",
        (100 * shown[0]["clean"], len(shown) - 0.5),
        fontsize=7,
        color="#6b7280",
        ha="center",
        va="bottom",
        annotation_clip=False,
    )
    axes.set_yticks(places, [labels[k] for k in order])
    axes.set(xlabel="robust accuracy (%)", xlim=(0, 100))
    axes.set_title(title, pad=14)
    axes.grid(axis="y", visible=False)
    return figure


def line_style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line of this number."""
    return {
        "color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5,
        "linewidth": 1.2, "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3],
    }  # fmt: skip


def _hollow(axes: Any, across: list[float], rows: list[dict[str, Any]], style: dict[str, Any]) -> None:
    """Empty the markers of what a grade F withholds."""
    withheld = [(x, 100 * r["robust"]) for x, r in zip(across, rows, strict=True) if r["grade"] == "F"]
    if withheld:
        axes.plot(*zip(*withheld, strict=True), **style | {"linestyle": "none"}, markerfacecolor="white", zorder=3)


def _named_beside(axes: Any, lines: list[grids.Line]) -> None:
    """The legend of lines, and of an empty marker if there is one."""
    if any(row["grade"] == "F" for line in lines for row in line.rows):
        axes.plot([], [], "o", color="#6b7280", markerfacecolor="white", markersize=5, label="empty: grade F")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _over(lines: list[grids.Line], labels: list[str], title: str, plt: Any) -> Any:
    """Robust accuracy over a number; along a dial clean accuracy, too, which no radius and no attack changes."""
    figure, axes = plt.subplots(figsize=(4.4, 3.2))
    ticks = {float(v): r["eps"] if line.axis == "eps" else f"{float(v):g}" for line in lines for v, r in line.points}
    for number, line in enumerate(lines):
        values, rows, style = [float(v) for v in line.values], list(line.rows), line_style(number)
        errors = {"yerr": _errors(rows, "robust"), "capsize": 2, "elinewidth": 0.8}
        axes.errorbar(values, [100 * r["robust"] for r in rows], label=labels[number], **errors, **style)
        _hollow(axes, values, rows, style)
        if line.dial:
            axes.plot(values, [100 * r["clean"] for r in rows], color=style["color"], linewidth=0.9, linestyle=":")
    if len(ticks) <= 8:
        axes.set_xticks(sorted(ticks), [ticks[value] for value in sorted(ticks)])
    axes.set(xlabel="radius eps" if lines[0].axis == "eps" else lines[0].axis, title=title, ylim=(-3, 103))
    axes.set_ylabel("robust accuracy (%); dotted: clean" if lines[0].dial else "robust accuracy (%)")
    _named_beside(axes, lines)
    return figure


def _plane(lines: list[grids.Line], labels: list[str], title: str, plt: Any) -> Any:
    """Robust against clean accuracy along each dial, its first and last value beside the line's ends."""
    figure, axes = plt.subplots(figsize=(5.4, 4.4))
    for number, line in enumerate(lines):
        clean, robust = ([100 * row[key] for row in line.rows] for key in ("clean", "robust"))
        axes.plot(clean, robust, label=f"{labels[number]}: {line.axis}", **line_style(number))
        _hollow(axes, clean, list(line.rows), line_style(number))
        for k in (0, -1):
            text, style = f"{float(line.values[k]):g}", {"fontsize": 6, "color": COLOURS[number % len(COLOURS)]}
            axes.annotate(text, (clean[k], robust[k]), xytext=(3, 3), textcoords="offset points", **style)
    axes.set(xlabel="clean accuracy (%)", ylabel="robust accuracy (%)", title=title, ylim=(-3, 103))
    _named_beside(axes, lines)
    return figure
