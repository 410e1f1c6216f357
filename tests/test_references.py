"""References and published numbers: from what stands in the code and in a file, and never more."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from benchmark import cli, registry
from benchmark.errors import UsageError
from benchmark.references import CITED, PAPERS, PUBLISHED, bibtex, published
from benchmark.results import find_runs

ROOT = Path(__file__).resolve().parents[1]


def test_the_papers_of_the_components_used():
    runs = find_runs([ROOT / "results" / "eight"])
    entries = bibtex(runs)
    for arxiv, author, title in (
        ("2205.07460", "Weili Nie and ", "Diffusion Models for Adversarial Purification"),
        ("2003.01690", "Francesco Croce and Matthias Hein", "Reliable evaluation of adversarial robustness"),
        ("1312.6114", "Diederik P. Kingma and Max Welling", "Auto-Encoding Variational Bayes"),
    ):
        (entry,) = re.findall(rf"@misc{{[^@]*eprint = {{{arxiv}}}[^@]*", entries)
        assert f"author = {{{author}" in entry and f"title = {{{{{title}" in entry
        assert f"https://arxiv.org/abs/{arxiv}" in entry
    keys = re.findall(r"@misc{([^,]+),", entries)
    assert len(keys) == len(set(keys)) and "2312" not in " ".join(keys)
    only = [run for run in runs if run["names"]["attack"] == "pgd" and run["names"]["purifier"] == "vae"]
    assert "2205.07460" not in bibtex(only) and "1706.06083" in bibtex(only)
    assert bibtex([]) == "% no component cites a paper\n"


@pytest.mark.parametrize("kind", registry.BASES)
def test_a_component_that_names_arxiv_is_read(kind):
    """Whatever a docstring cites by its arXiv number is found: no way of writing it escapes."""
    for name in registry.names(kind):
        text = " ".join((registry.load(kind, name).__doc__ or "").split())
        cited = {found[-1] for found in CITED.findall(text)}
        assert cited == set(re.findall(r"arXiv\s(\d{4}\.\d{4,5})", text)), name
        assert cited <= set(pd.read_csv(PAPERS, dtype=str)["arxiv"]), f"{name} cites what papers.csv has no title of"


def test_only_checked_numbers_are_shown(tmp_path, capsys):
    path = tmp_path / "published.csv"
    head = ",".join([*PUBLISHED, "checked"])
    path.write_text(f"{head}\nA,f,cifar10,Linf,8/255,AutoAttack,single draw,89.0,70.6,T 1,2205.07460,checked\n"
                    "B,f,cifar10,Linf,8/255,AutoAttack,single draw,90.0,71.0,T 2,2205.07461,recalled\n")  # fmt: skip
    shown = published(path)
    assert "| A | f | cifar10 | Linf | 8/255 |" in shown and "| B |" not in shown
    assert "1 of 2 numbers" in shown and "is not this benchmark's" in shown
    eight = str(ROOT / "results" / "eight")
    assert cli.main(["report", eight, "--with-published", str(path)]) == 0
    assert "**Published by others**" in capsys.readouterr().out
    assert cli.main(["report", eight, "--with-published", str(path), "--format", "csv"]) == cli.USAGE
    assert "never mixes protocols" in capsys.readouterr().err
    path.write_text("defense,robust\n")
    with pytest.raises(UsageError, match="lacks the columns classifier, dataset"):
        published(path)
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(UsageError, match="published.csv isn't a CSV file"):
        published(path)
    with pytest.raises(UsageError, match="no such file"):
        published(tmp_path / "none.csv")


def test_the_shipped_file_is_readable():
    shown = published(ROOT / "results" / "published.csv")
    assert re.search(r"\d+ of \d+ numbers", shown)
