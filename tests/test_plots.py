"""Figures: each with its data, drawn from nothing else, threat models apart."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmark import cli, report
from benchmark.errors import UsageError
from benchmark.plots import figures
from benchmark.results import find_runs

ROOT = Path(__file__).resolve().parents[1]


def names(paths: list[Path]) -> set[str]:
    return {path.stem for path in paths}


def test_every_figure_is_pdf_png_and_its_data(tmp_path):
    from matplotlib import image

    runs = find_runs([ROOT / "results" / "eight"])
    other = copy.deepcopy(runs[0])
    other["identity"] |= {"norm": "StAdv", "eps": "0.05"}
    written = figures([*runs, other], tmp_path / "figures")
    assert names(written) == {
        "clean-robust-fashion-mnist-linf-16-255", "clean-robust-fashion-mnist-stadv-0.05",
        "attacks-fashion-mnist-diffpure-resnet-linf-16-255-n64-d9",
        "attacks-fashion-mnist-vae-resnet-linf-16-255-n64-d9",
    }  # fmt: skip
    assert sorted(written) == sorted((tmp_path / "figures").iterdir()) and len(written) == 12
    for path in written:
        if path.suffix == ".png":
            assert np.std(image.imread(path)) > 0.05, "a blank picture"
        if path.suffix == ".pdf":
            assert path.read_bytes().startswith(b"%PDF")
        if path.suffix == ".csv":
            assert len(set(pd.read_csv(path)["norm"])) == 1
    attacks = pd.read_csv(tmp_path / "figures" / "attacks-fashion-mnist-vae-resnet-linf-16-255-n64-d9.csv")
    rows = [r for r in report.rows(runs, worst_case=True) if r["purifier"] == "vae"]
    assert sorted(attacks["robust"]) == pytest.approx(sorted(r["robust"] for r in rows))
    assert len(attacks) == 9 and attacks["attack"].iloc[-1] == report.WORST


def test_a_line_over_the_radius_where_there_are_several(tmp_path):
    written = figures(find_runs([ROOT / "results" / "headline"]), tmp_path)
    radius = pd.read_csv(tmp_path / "radius-fashion-mnist-linf.csv")
    assert set(radius["eps"]) == {"16/255", "0.1"} and len(radius) == 12
    assert "radius-fashion-mnist-linf" in names(written)


def test_nothing_to_draw_is_said(tmp_path, capsys):
    with pytest.raises(UsageError, match="no finished run"):
        figures([], tmp_path)
    assert cli.main(["report", str(ROOT / "results" / "full"), "--figures", "--out", str(tmp_path / "f")]) == 0
    assert str(tmp_path / "f") in capsys.readouterr().out


def test_the_headline_of_a_defense_is_its_worst_case_on_most_images():
    runs = find_runs([ROOT / "results"])
    found = {
        tuple(report.row(run, records)[key] for key in ("dataset", "purifier", "classifier", "norm", "eps")): (
            run,
            records,
        )
        for run, records, _ in report.headline(runs)
    }
    run, records = found["fashion-mnist", "diffpure", "resnet", "Linf", "16/255"]
    assert len(records) == 256 and run["names"]["attack"] == report.WORST and run["identity"]["view"] == "exact"
    assert len(found) == len(report.headline(runs))
