"""Tables for papers: LaTeX with booktabs, escaped, the best in bold with its ties."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

import numpy as np

from benchmark import evidence, stats, wording
from benchmark.config import slug
from benchmark.grades import MEANING
from benchmark.report import Table

ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "×": r"$\times$", "–": "--", "·": r"$\cdot$",
    "∘": r"$\circ$", "±": r"$\pm$", "…": r"\ldots{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "†": r"$^\dagger$",
}  # fmt: skip
"""What LaTeX would misread."""
BREAKS = re.compile("([:,=])(?=[^ ])")
"""Where a spec may break."""
MARKUP = re.compile(r"\\[a-z]+|[{}$\\]")
"""What LaTeX doesn't print of an escaped text."""
SHORT, LETTER = 20, 0.011
"""Letters of a text that needs no second line, such as an interval; a letter's share of a line."""
LONG, NOTED = 40, 100
"""Lines that a page holds of rows and of the note below them; letters in a line of the note."""
WITHHELD = "†"
"""The mark of a number that its grade withholds."""
DAGGER = f"{WITHHELD} Withheld (grade F): {MEANING['F'].partition(':')[0]}."
"""What the mark says."""
PACKAGES = r"% \usepackage{array,booktabs,graphicx,longtable}"
"""What the tables need."""


def escaped(text: str) -> str:
    """A text as LaTeX prints it; two hyphens stay two."""
    return "".join(ESCAPES.get(letter, letter) for letter in text.replace("--", "-\0-")).replace("\0", "{}")


def broken(text: str) -> str:
    """A text in which specs may break over lines."""
    return BREAKS.sub(r"\1\\allowbreak{}", text)


def latex(table: Table, columns: Sequence[str] = ()) -> str:
    """A booktabs table per data set, threat model and protocol; the strongest defense of each attack in bold, and ties.

    A defense ties with the strongest if a paired test on their common images doesn't tell them apart at 5 %. What is
    graded F bears a dagger and is no candidate.
    """
    if not table.rows:
        return "% no finished example yet\n"
    made: list[str] = []
    labels: list[str] = []
    for part in table.parts():
        of = table.only(part)
        bold, one = _strongest(of), of.rows[0]
        called = wording.attacks(of.rows)
        rows = []
        for k, r in enumerate(of.rows):
            mark = WITHHELD if r["grade"] == "F" else ""
            if columns:
                cells = [wording.cell(r, c) + mark * (c == "robust") for c in columns]
                rows.append([_cell(text, k in bold and c == "robust") for c, text in zip(columns, cells, strict=True)])
                continue
            attack = "worst case" if r["attack"] == evidence.WORST else called[k]
            names = (r["purifier"], r["classifier"], attack, r["view"])
            clean, robust = (wording.with_interval(r, key) for key in ("clean", "robust"))
            rows.append([*map(escaped, names), escaped(clean), _cell(robust + mark, k in bold)])
        head = [wording.titled(c) for c in columns] or "Purifier,Classifier,Attack,View,Clean,Robust".split(",")
        labels.append(_label(one["dataset"], one["norm"], one["eps"], one["budget"], f"n{one['n']}"))
        said = "" if columns else ": accuracy in % with 95 % intervals"
        told = (
            " Bold: the highest of each attack and view, and what a paired test at 5 % doesn't tell from it."
            if bold
            else ""
        )
        told += f" {DAGGER}" if any(r["grade"] == "F" for r in of.rows) else ""
        made.append(
            _floating(
                [escaped(title) for title in head], rows,
                f"{wording.dataset(one['dataset'])}, {one['norm']} {one['eps']}, budget {one['budget']}, n {one['n']}"
                f"{said}",
                f"{wording.facts(of)} {wording.accuracy(of)}{told}",
                labels[-1] if labels.count(labels[-1]) == 1 else f"{labels[-1]}-{labels.count(labels[-1])}",
            )
        )  # fmt: skip
    return "\n".join([PACKAGES, *made])


def tabular(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str,
    note: str,
    *,
    label: str | None = None,
    bold: Container[tuple[int, int]] = (),
) -> str:
    """One booktabs table of plain text; what is the same in several rows stands in the caption, and in no column.

    Args:
        head, rows: plain text.
        caption, note: above and below it.
        label: of which ``_label`` makes one; by default the caption.
        bold: the cells, by row and column, that are set in bold.
    """
    same = [k for k, texts in enumerate(zip(*rows, strict=True)) if len(rows) > 1 and len(set(texts)) == 1]
    kept = [k for k in range(len(head)) if k not in same]
    cells = [[_cell(row[k], (n, k) in bold) for k in kept] for n, row in enumerate(rows)]
    said = "; ".join([caption, *(f"{head[k]} {rows[0][k]}" for k in same)])
    return _floating([escaped(head[k]) for k in kept], cells, said, note, _label(label or caption))


def _cell(text: str, bold: bool) -> str:
    return rf"\textbf{{{escaped(text)}}}" if bold else escaped(text)


def _floating(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, note: str, label: str) -> str:
    """A table environment of escaped cells, as wide as the text at most; longer than a page, it breaks."""
    titles, lines = " & ".join(head) + r" \\", [" & ".join(row) + r" \\" for row in rows]
    above = [rf"\caption{{{broken(escaped(caption))}.}}", rf"\label{{{label}}}"]
    below = broken(escaped(note))
    if len(rows) + len(note) // NOTED > LONG:
        return "\n".join(
            [
                "% longer than a page: longtable wants a single column, e.g. after \\onecolumn",
                r"{\scriptsize\setlength\tabcolsep{2pt}\sloppy",
                rf"\begin{{longtable}}{{{_columns([head, *rows])}}}", *above, r"\\",
                r"\toprule", titles, r"\midrule", r"\endfirsthead", r"\toprule", titles, r"\midrule", r"\endhead",
                r"\bottomrule", r"\endlastfoot", *map(broken, lines),
                r"\end{longtable}}", "", rf"{{\footnotesize\sloppy {below}\par}}", "",
            ]
        )  # fmt: skip
    return "\n".join(
        [
            r"\begin{table}", r"\centering", *above, r"\medskip",
            r"\resizebox{\ifdim\width>\linewidth \linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * len(head)}}}", r"\toprule", titles, r"\midrule", *lines,
            r"\bottomrule", r"\end{tabular}}", "", r"\begin{minipage}{\linewidth}\medskip\footnotesize\sloppy", below,
            r"\end{minipage}", r"\end{table}", "",
        ]
    )  # fmt: skip


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """The columns of a table that breaks over pages: what is short stays on a line, the others share what is left."""
    needs = [max(len(MARKUP.sub("", cell)) for cell in column) for column in zip(*rows, strict=True)]
    shares = [min(need, 2 * SHORT) for need in needs if need > SHORT]
    left = 1 - LETTER * (len(needs) + sum(need for need in needs if need <= SHORT))
    scale = max(left, 0.12 * len(shares)) / sum(shares, 1e-9)
    wrapped = r">{\raggedright\arraybackslash}p{%.3f\linewidth}"
    return "".join("l" if need <= SHORT else wrapped % (scale * min(need, 2 * SHORT)) for need in needs)


def _label(*names: str) -> str:
    return "tab:" + slug("-".join(names).replace("/", "-"))


def _strongest(table: Table) -> set[int]:
    """Rows with the highest robust accuracy among the defenses that met one attack, and those that tie with it."""
    chosen: set[int] = set()
    kinds: dict[tuple, list[int]] = {}
    for k, r in enumerate(table.rows):
        if r["robust"] is not None and r["grade"] != "F":
            worst = r["attack"] == evidence.WORST  # of what the defense met; any other as it is displayed
            kinds.setdefault((r["attack"], *(() if worst else (r["display"], r["view"]))), []).append(k)
    for these in kinds.values():
        best = max(these, key=lambda k: table.rows[k]["robust"])
        if len(these) > 1:
            chosen |= {k for k in these if k == best or _ties(table.scores[k], table.scores[best])}
    return chosen


def _ties(one: dict[int, float], other: dict[int, float]) -> bool:
    ids = sorted(one.keys() & other.keys())
    if not ids:
        return False
    a, b = (np.array([scores[i] for i in ids]) for scores in (one, other))
    return stats.compare(a, b).p >= 0.05
