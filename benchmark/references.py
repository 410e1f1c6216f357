"""What a report stands on: the papers of the components it used, and numbers that others published."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmark import registry, specs
from benchmark.errors import UsageError

CITED = re.compile(r"([A-Z][\w-]+)(?: and ([A-Z][\w-]+)| (et al\.))?,? (\d{4}) \(arXiv\s+(\d{4}\.\d{4,5})")
"""How a docstring names a paper: Nie et al. 2022 (arXiv 2205.07460)."""
PAPERS = Path(__file__).parent / "assets" / "papers.csv"
"""What papers are called, by their arXiv number."""
PUBLISHED = (
    "defense",
    "classifier",
    "dataset",
    "norm",
    "eps",
    "attack",
    "verdict",
    "clean",
    "robust",
    "source",
    "arxiv",
)
CHECKED = "checked"


def bibtex(runs: Iterable[dict[str, Any]]) -> str:
    """An entry for every paper that the docstrings of the runs' purifiers, attacks and classifiers cite.

    Authors and title are those of papers.csv; of a paper that isn't there, as a newcomer's may be, the docstring has
    the authors, and the entry no title.
    """
    papers = pd.read_csv(PAPERS, dtype=str).set_index("arxiv").to_dict("index")
    entries: dict[str, str] = {}
    for text in sorted({document for run in runs for document in _documents(run)}):
        for first, second, others, year, arxiv in CITED.findall(" ".join(text.split())):
            author = f"{first} and {second}" if second else f"{first} and others" if others else first
            known = papers.get(arxiv, {"authors": author, "year": year})
            fields = {"author": known["authors"], "title": f"{{{known['title']}}}" if "title" in known else None}
            fields |= {"year": known["year"], "eprint": arxiv, "archivePrefix": "arXiv"}
            fields |= {"url": f"https://arxiv.org/abs/{arxiv}"}
            lines = "".join(f"  {key} = {{{value}}},\n" for key, value in fields.items() if value)
            entries[arxiv] = f"@misc{{{first.lower()}{year}_{arxiv.replace('.', '_')},\n{lines}}}\n"
    return "\n".join(entries[key] for key in sorted(entries)) or "% no component cites a paper\n"


def published(path: Path) -> str:
    """Numbers from papers as Markdown, apart from ours: each under its own protocol, and only what was checked.

    The file's column ``checked`` says "checked" for a number that was held against its source; the others are counted
    and not shown.

    Raises:
        UsageError: if the file isn't there or lacks a column.
    """
    if not path.is_file():
        columns = ", ".join(PUBLISHED)
        raise UsageError(f"{path}: no such file; --with-published takes a CSV file with the columns {columns}")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' own, and of bytes that are no text
        raise UsageError(f"{path} isn't a CSV file: {error}") from error
    if missing := [c for c in (*PUBLISHED, "checked") if c not in table]:
        raise UsageError(f"{path} lacks the columns {', '.join(missing)}")
    shown = table[table["checked"].str.strip() == CHECKED]
    lines = ["", "**Published by others**, each under its own protocol, which is not this benchmark's:", ""]
    if len(shown):
        lines += [f"| {' | '.join(PUBLISHED)} |", "|" + "---|" * len(PUBLISHED)]
        lines += [f"| {' | '.join(row[c] for c in PUBLISHED)} |" for _, row in shown.iterrows()]
        lines.append("")
    rest = len(table) - len(shown)
    lines.append(
        f"{rest} of {len(table)} numbers in {path} are not shown: nobody has held them against their source yet."
    )
    return "\n".join(lines) + "\n"


def _documents(run: dict[str, Any]) -> list[str]:
    """The docstrings of a run's components, and of what they are built on."""
    found: list[str] = []
    for kind in ("purifiers", "attacks", "classifiers"):
        spec = specs.parse(run["identity"][kind[:-1]])
        try:
            component = registry.described(kind, spec.name, spec.argument)
        except UsageError:
            continue  # another machine's file, or a model of a library: it has no docstring of ours
        line = inspect.getmro(component) if inspect.isclass(component) else ()  # a file may name a function
        bases = [c for c in line if c.__module__.split(".")[0] in registry.BASES]
        found += [inspect.getdoc(c) or "" for c in bases]
    return found
