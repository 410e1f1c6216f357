"""Writers: every format from the same rows, every rule from the same records, and LaTeX that LaTeX takes."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmark import audit, cli, evidence, latex, paired, references, report, wording, writers
from benchmark.compact import compact
from benchmark.errors import UsageError
from benchmark.results import find_runs
from tests.synthetic import made

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    """The recorded runs of eight attacks on two defenses."""
    return find_runs([ROOT / "results" / "eight"])


def by_hand(run: dict, key: str, rule: str) -> float:
    """A rule in plain loops."""
    total = 0.0
    for r in run["records"]:
        right = [p == r["label"] for p in r[key]]
        if rule == "mean":
            total += sum(right) / len(right)
        if rule == "worst":
            total += all(right)
        if rule == "majority":
            votes = {c: r[key].count(c) for c in set(r[key])}
            total += votes.get(r["label"], 0) > max([v for c, v in votes.items() if c != r["label"]], default=0)
        if rule == "any":
            total += r["broken_at"] < 0 if key == "adv" else r["null_wrong"] == 0
    return total / len(run["records"])


@pytest.mark.parametrize("rule", ["mean", "majority", "worst", "any"])
def test_a_rule_is_what_it_says_for_clean_and_robust_alike(rule, runs):
    table = report.table(runs, rule=rule)
    for run, row, scores in zip(runs, table.rows, table.scores, strict=True):
        if rule == "any" and row["attack"] == "transfer":  # its loop never saw the defense
            assert row["robust"] is None and row["clean_low"] is None and scores == {}
            continue
        assert row["robust"] == pytest.approx(by_hand(run, "adv", rule))
        assert row["clean"] == pytest.approx(by_hand(run, "clean", rule))
        assert np.mean(list(scores.values())) == pytest.approx(row["robust"])
        assert row["robust_low"] <= row["robust"] <= row["robust_high"]
    assert report.RULES[rule].split("{")[0] in writers.render(table, "md")


def test_mean_logits_needs_the_logits_and_reads_them(runs, tmp_path):
    run = copy.deepcopy(runs[0])
    run["folder"] = tmp_path / "none"
    assert report.table([run], rule="mean-logits").rows[0]["robust"] is None
    n, draws = len(run["records"]), len(run["records"][0]["adv"])
    rng = np.random.default_rng(0)
    logits = {key: rng.normal(size=(n, draws, 10)) for key in ("clean", "adv", "random")}
    order = rng.permutation(n)
    ids = np.array([r["id"] for r in run["records"]])
    np.savez(tmp_path / "logits.npz", id=ids[order], **{k: v[order] for k, v in logits.items()})
    run["folder"] = tmp_path
    row = report.table([run], rule="mean-logits").rows[0]
    label = np.array([r["label"] for r in run["records"]])
    assert row["robust"] == pytest.approx(float((logits["adv"].mean(1).argmax(1) == label).mean()))
    assert row["clean"] == pytest.approx(float((logits["clean"].mean(1).argmax(1) == label).mean()))


def test_columns_and_order(runs):
    table = report.table(runs, worst_case=True)
    some = json.loads(writers.render(table, "json", columns=["purifier", "robust"], sort="-robust"))
    assert [list(row) for row in some] == [["purifier", "robust"]] * len(table.rows)
    values = [row["robust"] for row in some]
    assert values == sorted(values, reverse=True)
    assert writers.render(table, "csv", columns=["attack"]).splitlines()[0] == "attack"
    plain = writers.render(table, "md", columns=["attack", "null_floor"], sort="null_floor")
    assert plain.splitlines()[2] == "| attack | null_floor % |" and "| transfer | – |" in plain
    shown = json.loads(writers.render(report.table(runs, rule="any"), "json", columns=["robust"], sort="robust"))
    assert shown[-1]["robust"] is None and shown[0]["robust"] is not None
    for wrong in ({"columns": ["robustt"]}, {"sort": "-robus"}):
        with pytest.raises(UsageError, match="unknown column .*did you mean"):
            writers.render(table, "md", **wrong)
    with pytest.raises(UsageError, match="known formats are md, csv, latex, json"):
        writers.render(table, "xlsx")
    with pytest.raises(UsageError, match="known rules are mean, majority"):
        report.table(runs, rule="best")


def test_every_table_says_how_it_was_made(runs):
    for form in ("md", "latex"):
        shown = writers.render(report.table(runs), form)
        assert "budget quick" in shown and "protocol 1" in shown and "torch 2." in shown
        assert all(run["environment"]["commit"] in shown for run in runs)


def test_several_seeds_are_told_apart_and_their_spread_is_stated(runs):
    one = next(run for run in runs if run["names"]["attack"] == "pgd")
    other = copy.deepcopy(one)
    other["identity"]["seed"] = 1
    for record in other["records"][:32]:
        record["adv"] = [record["label"]] * len(record["adv"])
    table = report.table([one, other])
    shown = writers.render(table, "md")
    a, b = (row["robust"] for row in table.rows)
    spread = f"{50 * (a + b):.1f} ± {100 * abs(a - b) / 2**0.5:.1f} (2)"
    assert ", seed 0 |" in shown and ", seed 1 |" in shown and spread in shown
    assert ", seed" not in writers.render(report.table([one]), "md") and "±" not in writers.render(
        report.table([one]), "md"
    )


def test_what_a_package_says_stands_below_with_its_floor():
    runs = find_runs([ROOT / "results" / "attacks"])
    (package,) = [run for run in runs if run["records"][0].get("package_null") is not None]
    verdict, null, same = (100 * np.mean([r[k] for r in package["records"]])
                           for k in ("package_verdict", "package_null", "fallback"))  # fmt: skip
    shown = writers.render(report.table(runs), "md")
    assert f"{verdict:.1f} % robust, where its rule reads {null:.1f} % at x itself; {same:.1f} %" in shown
    assert "own verdict" not in writers.render(report.table([r for r in runs if r is not package]), "md")


SEARCH = "PGD & co × 2"


def synthetic() -> report.Table:
    """Five rows by hand: a tie, a lone attack, a worst case that nothing is known of."""
    base = dict.fromkeys(report.COLUMNS) | {
        "dataset": "a_b", "classifier": "f", "norm": "Linf", "eps": "16/255", "view": "exact", "n": 40, "draws": 1,
        "budget": "quick", "seed": 0, "clean": 0.9, "clean_low": 0.8, "clean_high": 0.95, "robust_low": 0.4,
        "robust_high": 0.6, "clean_majority": 0.9, "robust_majority": 0.5, "clean_worst": 0.8, "robust_worst": 0.25,
        "random_control": 0.85, "nfe": 3, "forwards": 203.0, "backwards": 80.0, "seconds_per_image": 0.123,
    }  # fmt: skip
    rows, scores = [], []
    for purifier, attack, display, robust in (
        ("good_one", "pgd", SEARCH, 0.5), ("close", "pgd", SEARCH, 0.475), ("weak", "pgd", SEARCH, 0.0),
        ("alone", "lf", "LF", 0.1), ("weak", evidence.WORST, "worst case of PGD, LF", None),
    ):  # fmt: skip
        rows.append(base | {"purifier": purifier, "attack": attack, "display": display, "robust": robust})
        scores.append({} if robust is None else {i: float(i < 40 * robust) for i in range(40)})
    return report.Table(rows, scores)


def by_hand_runs() -> list[dict]:
    """Runs of three defenses by hand, two of them under two attacks, one at another budget, one withheld."""
    runs = [
        made(0.5, purifier="diffpure"), made(0.45, purifier="diffpure", attack="autoattack", gradients=168.0),
        made(0.1), made(0.6, purifier="jpeg", draws=1, random=0.2), made(0.4, purifier="diffpure", budget="standard"),
    ]  # fmt: skip
    for run in runs:
        run["identity"]["purifier"] = run["names"]["purifier"]  # the components' own defaults are no writer's affair
    return runs


def written(name: str) -> str:
    """What a writer makes of rows and runs by hand."""
    stem, _, form = name.partition(".")
    form = {"tex": "latex"}.get(form, form)
    runs = by_hand_runs()
    if stem == "table":
        return writers.render(synthetic(), form)
    if stem == "columns":
        columns = ["purifier", "attack", "robust", "nfe"]
        return writers.render(synthetic(), form, columns=columns, sort="-robust")
    if stem == "runs":
        return writers.render(report.table(runs, worst_case=True), form)
    if stem == "compact":
        return compact(runs, form)
    if stem == "comparison":
        return writers.comparison([(runs[0], paired.comparison(runs[0], runs[1:]))], form)
    if stem == "matches":
        return writers.matches(report.matched([*runs, made(0.7, purifier="vae:temperature=2.0", clean=0.7)], [0.8]))
    if stem == "grades":
        return audit.render(audit.graded(runs))
    return references.bibtex(runs)


GOLDEN = ROOT / "tests" / "golden"
NAMES = (
    "table.md", "table.csv", "table.json", "table.tex", "columns.md", "columns.tex", "runs.md", "runs.tex",
    "compact.md", "compact.tex", "compact.csv", "compact.json",
    "comparison.md", "comparison.csv", "comparison.json", "comparison.tex", "matches.md", "grades.md", "references.bib",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_writer_writes_what_it_wrote(name):
    """Golden files: a change here is a change for everybody who parses or reads the output."""
    assert written(name) == (GOLDEN / name).read_text()


def test_latex_escapes_and_sets_the_best_and_its_ties_in_bold():
    shown = (GOLDEN / "table.tex").read_text()
    assert r"good\_one & f & PGD \& co $\times$ 2 & exact & 90.0 [80.0, 95.0] & \textbf{50.0 [40.0, 60.0]}" in shown
    assert r"close & f & PGD \& co $\times$ 2 & exact & 90.0 [80.0, 95.0] & \textbf{47.5 [40.0, 60.0]}" in shown
    assert r"weak & f & PGD \& co $\times$ 2 & exact & 90.0 [80.0, 95.0] & 0.0 [40.0, 60.0]" in shown
    assert r"\label{tab:a-b-linf-16-255-quick-n40}" in shown and r"95 \% Wilson" in shown
    withheld = (GOLDEN / "runs.tex").read_text()
    assert withheld.count(r"$^\dagger$ \\") == 1
    assert "Withheld (grade F): something recorded is significantly stronger" in withheld
    assert latex.escaped(r"\{}~^#$") == r"\textbackslash{}\{\}\textasciitilde{}\textasciicircum{}\#\$"
    assert writers.render(report.Table([]), "latex").startswith("% no finished example")


def test_threat_models_are_never_one_latex_table(runs):
    other = copy.deepcopy(runs[0])
    other["identity"]["norm"], other["identity"]["eps"] = "StAdv", "0.05"
    shown = writers.render(report.table([runs[0], other]), "latex")
    assert shown.count(r"\begin{tabular}") == 2 and "StAdv 0.05" in shown


@pytest.mark.slow
def test_a_real_latex_compiles_every_recorded_result(tmp_path, capsys):
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex isn't installed: apt install texlive-latex-base texlive-latex-recommended")
    for words in ([], ["curves", "--compact"], ["cifar10-compact", "--compact"]):
        folder = ROOT.joinpath("results", *words[:1])
        assert cli.main(["report", str(folder), *words[1:], "--format", "latex"]) == 0
    packages = "array,booktabs,graphicx,longtable"
    opening = f"\\documentclass{{article}}\\usepackage[T1]{{fontenc}}\\usepackage{{{packages}}}\\begin{{document}}\n"
    (tmp_path / "tables.tex").write_text(opening + capsys.readouterr().out + "\n\\end{document}\n")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"], cwd=tmp_path, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Output written on tables.pdf" in done.stdout and "Float too large" not in done.stdout
    wide = [float(points) for points in re.findall(r"Overfull \\hbox \((\d+\.\d+)pt too wide", done.stdout)]
    assert max(wide, default=0) < 20, "a column beyond the page"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("parquet:cifar10,family=cifar10,only=exact", "CIFAR-10"),
        ("parquet:cifar10,split=validation,family=cifar10", "CIFAR-10, validation images"),
        ("fashion-mnist", "Fashion-MNIST"),
        ("images:2afe", "images:2afe"),
    ],
)
def test_a_caption_calls_a_data_set_by_its_name(spec, said):
    assert wording.dataset(spec) == said
