"""The commands that read records: tables, figures, the page, audits and diagnoses."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmark import specs
from benchmark.cli.common import DONE, FAILED
from benchmark.cli.runs import cells_of
from benchmark.errors import RunError, UsageError, unknown


def report(arguments: argparse.Namespace) -> int:
    what = next((name for name in REPORTS if getattr(arguments, name, None) not in (None, False)), "table")
    made, taken = REPORTS[what]
    known = {option for _, options in REPORTS.values() for option in options}
    for option in sorted(known - set(taken)):
        if getattr(arguments, option) not in (None, []):
            of = f"--{what}" if what != "table" else "a table"
            raise UsageError(f"{of} takes no --{option.replace('_', '-')}")
    arguments.paths = arguments.paths or ["results"]
    print(made(arguments), end="")
    return DONE


def _table(arguments: argparse.Namespace) -> str:
    from benchmark import report, writers
    from benchmark.references import published

    form = arguments.format or "md"
    if form == "html":
        for option in ("rule", "columns", "sort", "with_published", "worst_case"):
            if getattr(arguments, option) is not None:
                raise UsageError(f"the page sorts, filters and takes every rule itself: leave out --{option}")
        return _page(_runs(arguments), arguments.out)
    if arguments.out:
        raise UsageError(f"--out is for html and figures; {form} is printed: redirect it into a file")
    if arguments.with_published and form != "md":
        raise UsageError("--with-published is for Markdown: a machine's table never mixes protocols")
    runs = _runs(arguments)
    worst = form in ("md", "latex") if arguments.worst_case is None else arguments.worst_case
    table = report.table(runs.chosen, worst_case=worst, rule=arguments.rule or "mean", beside=runs.beside)
    columns = arguments.columns.split(",") if arguments.columns else ()
    text = writers.render(table, form, columns=columns, sort=arguments.sort)
    return text + (published(Path(arguments.with_published)) if arguments.with_published else "")


def _compact(arguments: argparse.Namespace) -> str:
    from benchmark.compact import compact

    if (form := arguments.format or "md") == "html":
        raise UsageError("a line per defense is md, csv, json or latex; the page opens with one, too")
    runs = _runs(arguments)
    return compact(runs.chosen, form, arguments.rule or "mean", runs.beside)


class Runs(NamedTuple):
    """The runs that make rows; those that only count in the grades, what was left out among them."""

    chosen: list[dict[str, Any]]
    beside: list[dict[str, Any]]


def _runs(arguments: argparse.Namespace) -> Runs:
    """The runs that a report is asked for."""
    from benchmark.results import distinct, find_runs, where

    there = find_runs(arguments.paths)
    runs = distinct(there)
    kept = {id(run) for run in runs}
    for run in there:
        if id(run) not in kept:
            print(f"note: left out {run['folder']}, a copy of a run that is here already", file=sys.stderr)
    chosen = where(runs, arguments.where or [])
    beside = find_runs(arguments.beside) if arguments.beside else []
    kept = {id(run) for run in chosen}
    return Runs(chosen, [run for run in runs if id(run) not in kept] + beside)


def _compare(arguments: argparse.Namespace) -> str:
    from benchmark import paired, writers
    from benchmark.results import find_runs

    if arguments.paths != ["results"]:
        raise UsageError("name every folder behind --compare, the reference first: report --compare A B C")
    first, *others = arguments.compare
    reference, *more = find_runs([first])
    if more:
        raise UsageError(f"{first} holds {1 + len(more)} runs: name the folder of one as the reference")
    if not others:
        raise UsageError(f"name what {first} is compared with: report --compare {first} OTHER…")
    if (form := arguments.format or "md") == "html":
        raise UsageError("a comparison is md, csv, json or latex; the page shows which defenses tie")
    rule = arguments.rule or "mean"
    return writers.comparison([(reference, paired.comparison(reference, find_runs(others), rule))], form, rule)


def _against(arguments: argparse.Namespace) -> str:
    from benchmark import paired, writers

    if (form := arguments.format or "md") == "html":
        raise UsageError("differences are md, csv, json or latex; the page shows which defenses tie")
    rule = arguments.rule or "mean"
    pairs = paired.against(_runs(arguments).chosen, arguments.against, arguments.under)
    return writers.comparison([(one, paired.comparison(one, others, rule)) for one, others in pairs], form, rule)


def _match(arguments: argparse.Namespace) -> str:
    from benchmark import report, writers

    found = report.matched(_runs(arguments).chosen, _shares(arguments.match))
    if arguments.columns == "purifier":
        return ",".join(dict.fromkeys(one["purifier"] for one in found)) + "\n"
    if arguments.columns:
        raise UsageError(f"--match takes --columns purifier or none, got {arguments.columns}")
    return writers.matches(found)


def _figures(arguments: argparse.Namespace) -> str:
    from benchmark.plots import figures

    runs = _runs(arguments)
    kinds = arguments.figures.split(",") if arguments.figures else ()
    written = figures(runs.chosen, Path(arguments.out or "figures"), kinds, runs.beside)
    return "".join(f"{path}\n" for path in written)


def _bibtex(arguments: argparse.Namespace) -> str:
    from benchmark.references import bibtex

    return bibtex(_runs(arguments).chosen)


def _shares(text: str) -> list[float]:
    """Accuracies as fractions of a comma-separated list."""
    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UsageError(f"--match {text}: expected fractions with commas, e.g. 0.85,0.80")
    return shares


def _gallery(arguments: argparse.Namespace) -> str:
    from benchmark.gallery import SHOWN, beside, gallery

    if not arguments.gallery:
        written = [
            beside(replayed)
            for replayed in _replays(arguments, SHOWN if arguments.images is None else arguments.images, exactly=False)
        ]
    else:
        written = gallery(
            _replays(arguments, 2 if arguments.images is None else arguments.images), Path(arguments.gallery)
        )
    return "".join(f"{path}\n" for path in written)


def _replays(arguments: argparse.Namespace, count: int, *, exactly: bool = True) -> list[Any]:
    """The first images of the runs below some folders; of shorter runs all, unless ``exactly`` so many are wanted."""
    from benchmark.replay import replay
    from benchmark.results import find_runs, where

    if count < 1:
        raise UsageError(f"at least one image is needed, got {count}")
    weights = [Path(arguments.weights)] if arguments.weights else []
    runs = where(find_runs(arguments.paths), getattr(arguments, "where", None) or [])
    counts = [count if exactly else min(count, len(run["records"])) for run in runs]
    return [
        replay(run, n, weights=weights, data_dir=arguments.data_dir, dataset=arguments.dataset)
        for run, n in zip(runs, counts, strict=True)
    ]


def diagnose(arguments: argparse.Namespace) -> int:
    from benchmark.diagnose import diagnosis, render, saved

    files = [Path(path) for path in arguments.paths if path.endswith(".json")]
    if files and len(arguments.paths) > 1:
        raise UsageError("one saved diagnosis at a time: python -m benchmark diagnose FILE.json")
    if files:
        found = saved(files[0])
    else:
        found = [diagnosis(replayed) for replayed in _replays(arguments, arguments.n_examples, exactly=False)]
    if arguments.only:
        names = specs.split(arguments.only)
        known = [one["purifier"] for one in found]
        if missing := [name for name in names if name not in known]:
            raise UsageError(unknown("diagnosed purifier", missing[0], sorted(set(known))))
        found = [one for name in names for one in found if one["purifier"] == name]
    if arguments.spectra:
        from benchmark.spectra import draw

        print("\n".join(map(str, draw(found, Path(arguments.spectra)))))
        return DONE
    print(
        json.dumps({"runs": found}, indent=2) if arguments.json else render(found), end="\n" if arguments.json else ""
    )
    return DONE


def _page(runs: Runs, out: str | None) -> str:
    from benchmark.files import replace
    from benchmark.page import page

    text = page(runs.chosen, runs.beside)
    if out is None:
        return text
    target = Path(out) / "index.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, text)
    return f"{target}\n"


def audit(arguments: argparse.Namespace) -> int:
    from benchmark import audit
    from benchmark.results import distinct, find_runs

    saved = [Path(path) for path in arguments.paths if path.endswith(".json")]
    if saved:
        document = audit.saved(saved[0]) if len(arguments.paths) == 1 else {}
        if not document:
            raise UsageError("one saved audit at a time: python -m benchmark audit FILE.json")
    elif arguments.paths or arguments.only in ("black-box", "grades"):
        if arguments.only == "gradients":
            raise UsageError("--only gradients takes no folders: it builds the defense itself, with --purifier SPEC")
        if arguments.beside and arguments.only != "grades":
            raise UsageError("--beside is for --only grades: what else speaks in them")
        runs = distinct(find_runs(arguments.paths or ["results" if arguments.only == "grades" else "results/run"]))
        beside = find_runs(arguments.beside or [])
        document = audit.graded(runs, beside) if arguments.only == "grades" else audit.black_box(runs)
    else:
        document = {"gradients": [audit.gradients(cell) for cell in cells_of(arguments)]}
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        print(audit.render(document))
    return FAILED if audit.failed(document) else DONE


def tables(arguments: argparse.Namespace) -> int:
    from benchmark import tables
    from benchmark.files import replace

    for path in arguments.files:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        if not arguments.check:
            replace(path, tables.render(path.read_text()))
        elif tables.stale(path):
            raise RunError(f"{path}: a table isn't what its command prints; python -m benchmark tables {path}")
    return DONE


REPORTS: dict[str, tuple[Callable[[argparse.Namespace], str], tuple[str, ...]]] = {
    "compact": (_compact, ("format", "rule", "beside", "where")),
    "against": (_against, ("format", "rule", "where", "under")),
    "compare": (_compare, ("format", "rule")),
    "match": (_match, ("columns", "where")),
    "figures": (_figures, ("out", "beside", "where")),
    "gallery": (_gallery, ("images", "dataset", "weights", "data_dir", "where")),
    "bibtex": (_bibtex, ("where",)),
    "table": (_table, ("format", "rule", "worst_case", "columns", "sort", "with_published", "out", "beside", "where")),
}
"""What ``report`` makes by the option that asks for it: the function, and the options that it takes."""
