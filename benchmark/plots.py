"""Figures from records: PDF for papers, PNG for talks, and the data of each as CSV."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd

from benchmark import report
from benchmark.config import slug
from benchmark.errors import UsageError

STYLE: Any = {
    "figure.dpi": 150, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.frameon": False, "savefig.bbox": "tight", "pdf.fonttype": 42,
}  # fmt: skip
COLOURS = ("#0b5cad", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#0e7490", "#be185d", "#4b5563")
MARKERS = "osD^vPX*"


def figures(runs: Iterable[dict[str, Any]], folder: Path) -> list[Path]:
    """Every figure that the runs can make; returns the files written.

    - ``clean-robust``: a point per defense with the intervals of both accuracies, and the Pareto front.
    - ``attacks``: for each defense that met several attacks on the same images, each attack and the worst case.
    - ``radius``: robust accuracy over the radius, a line per defense that was attacked at several.

    Threat models and data sets never share a figure.

    Raises:
        UsageError: if there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    speaking = [report.row(run, records) for run, records, _ in report.headline(runs)]
    if not speaking:
        raise UsageError("no finished run to draw")
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with plt.rc_context(STYLE):
        for (dataset, norm, eps), rows in _split(speaking, "dataset", "norm", "eps").items():
            name = f"clean-robust-{dataset}-{norm}-{eps}"
            written += _written(_clean_robust(plt, rows, f"{dataset}, {norm} {eps}"), rows, folder, name)
        for group in report.groups([run for run in runs if run["records"]]):
            widest = report.widest(group)
            if len(widest) > 1:
                rows = [report.row(run, run["records"]) for run in widest] + [report.row(*report.worst_of(widest))]
                one = rows[0]
                title = f"{one['purifier']} + {one['classifier']}, {one['norm']} {one['eps']}, n = {one['n']}"
                view = "" if one["view"] == "exact" else f"-{one['view']}"
                name = (
                    f"attacks-{one['dataset']}-{one['purifier']}-{one['classifier']}-{one['norm']}-{one['eps']}{view}"
                )
                written += _written(_attacks(plt, rows, title), rows, folder, f"{name}-n{one['n']}-d{one['draws']}")
        for (dataset, norm), rows in _split(speaking, "dataset", "norm").items():
            lines = {k: v for k, v in _split(rows, "purifier", "classifier").items() if len(v) > 1}
            if lines:
                drawn = [row for line in lines.values() for row in line]
                figure = _radius(plt, lines, f"{dataset}, {norm}")
                written += _written(figure, drawn, folder, f"radius-{dataset}-{norm}")
    return written


def _split(rows: list[dict[str, Any]], *keys: str) -> dict[tuple, list[dict[str, Any]]]:
    parts: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault(tuple(row[k] for k in keys), []).append(row)
    return parts


def _written(figure: Any, rows: list[dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """A figure as PDF and PNG, and the rows that it shows as CSV."""
    from matplotlib import pyplot as plt

    paths = [folder / f"{slug(name.replace('/', '-'))}.{end}" for end in ("pdf", "png", "csv")]
    figure.savefig(paths[0], metadata={"CreationDate": None})
    figure.savefig(paths[1])
    plt.close(figure)
    pd.DataFrame(rows, columns=list(report.COLUMNS)).to_csv(paths[2], index=False, lineterminator="\n")
    return paths


def _errors(rows: list[dict[str, Any]], key: str) -> list[list[float]]:
    """Distances from the estimate to the ends of its interval, in percent."""
    below = [100 * (r[key] - r[f"{key}_low"]) for r in rows]
    return [below, [100 * (r[f"{key}_high"] - r[key]) for r in rows]]


def _clean_robust(plt: Any, rows: list[dict[str, Any]], title: str) -> Any:
    figure, axes = plt.subplots(figsize=(4.4, 3.4))
    purifiers = list(dict.fromkeys(r["purifier"] for r in rows))
    classifiers = list(dict.fromkeys(r["classifier"] for r in rows))
    for row in rows:
        axes.errorbar(
            [100 * row["clean"]], [100 * row["robust"]], xerr=_errors([row], "clean"), yerr=_errors([row], "robust"),
            color=COLOURS[purifiers.index(row["purifier"]) % len(COLOURS)], capsize=2, elinewidth=1, markersize=6,
            marker=MARKERS[classifiers.index(row["classifier"]) % len(MARKERS)], linestyle="none",
            label=f"{row['purifier']} + {row['classifier']}",
        )  # fmt: skip
    front = [r for r in rows if not any(o["clean"] >= r["clean"] and o["robust"] > r["robust"] for o in rows)]
    front.sort(key=lambda r: r["clean"])
    axes.plot([100 * r["clean"] for r in front], [100 * r["robust"] for r in front], color="#6b7280", linewidth=1,
              linestyle=":", zorder=0, label="Pareto front")  # fmt: skip
    axes.set(xlabel="clean accuracy (%)", ylabel="robust accuracy (%)", title=title, ylim=(-3, 103))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _attacks(plt: Any, rows: list[dict[str, Any]], title: str) -> Any:
    *single, worst = rows
    single = sorted(single, key=lambda r: r["robust"], reverse=True)
    shown = [worst, *single[::-1]]
    figure, axes = plt.subplots(figsize=(5.2, 0.8 + 0.3 * len(shown)))
    places = range(len(shown))
    axes.barh(places, [100 * r["robust"] for r in shown], xerr=_errors(shown, "robust"), height=0.6,
              color=[COLOURS[1], *[COLOURS[0]] * len(single)], alpha=0.85,
              error_kw={"elinewidth": 1, "capsize": 2})  # fmt: skip
    axes.axvline(100 * worst["clean"], color="#6b7280", linestyle=":", linewidth=1)
    axes.annotate(
        "clean", (100 * worst["clean"], len(shown) - 0.5), fontsize=7, color="#6b7280", ha="center", va="bottom"
    )
    axes.set_yticks(places, ["worst case", *(r["display"] for r in single[::-1])])
    axes.set(xlabel="robust accuracy (%)", xlim=(0, 100))
    axes.set_title(title, pad=14)
    axes.grid(axis="y", visible=False)
    return figure


def _radius(plt: Any, lines: dict[tuple, list[dict[str, Any]]], title: str) -> Any:
    figure, axes = plt.subplots(figsize=(4.4, 3.2))
    for number, ((purifier, classifier), rows) in enumerate(lines.items()):
        rows = sorted(rows, key=lambda r: Fraction(r["eps"]))
        axes.errorbar(
            [float(Fraction(r["eps"])) for r in rows], [100 * r["robust"] for r in rows], yerr=_errors(rows, "robust"),
            color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)], markersize=5, capsize=2,
            linewidth=1.2, label=f"{purifier} + {classifier}",
        )  # fmt: skip
    radii = sorted({r["eps"] for rows in lines.values() for r in rows}, key=Fraction)
    axes.set_xticks([float(Fraction(eps)) for eps in radii], radii)
    axes.set(xlabel="radius eps", ylabel="robust accuracy (%)", title=title, ylim=(-3, 103))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
